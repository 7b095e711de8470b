#!/usr/bin/env bash
# CaiT-S24 fine-tuned with FeatScale, on ImageNet-1k.
#
# Expected: 83.2% top-1, as reported by the paper (arXiv 2203.05962, its ImageNet results, quoted second-hand);
# the plain CaiT-S24 there: 82.6%. Never run here at full length.
# Length: 60 epochs: 77 million images; at 500 images/s in all, 1.8 days (estimated, not measured).
#
#   DATA_PATH=/data/imagenet CHECKPOINT=S24_224.pth bash scripts/reproduce/featscale_cait_s24_224.sh
#
# CHECKPOINT  weights of the plain CaiT-S24 at 224 px, a file or a URL; DeiT's authors published them as
#             https://dl.fbaipublicfiles.com/deit/S24_224.pth
# NUM_GPUS    processes, one per GPU; 2 as in the paper. The recipe's batch is 256 images: with 8 GPUs append
#             --batch-size 32, with one --grad-accum 2
# DATA_PATH, appended flags, where results go, restarts: scripts/reproduce/imagenet.bash
source "$(dirname "${BASH_SOURCE[0]}")/imagenet.bash"
: "${CHECKPOINT:?set it to the plain CaiT-S24 weights (a file or a URL)}"

python -m torch.distributed.launch --nproc_per_node="${NUM_GPUS:-2}" --master_port 29705 --use_env main.py \
    --auto_reload --model featscale_cait_S24_224 --batch-size 128 --epochs 60 --lr 5e-5 --weight-decay 5e-4 \
    --min-lr 1e-6 --warmup-epochs 1 --decay-epochs 5 \
    --data-path "$DATA_PATH" --data-set IMNET --input-size 224 \
    --output_dir ./logs/imnet1k_featscale_cait_s24_224 --resume "$CHECKPOINT" "$@"
