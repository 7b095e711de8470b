#!/usr/bin/env bash
# DeiT-S with 12 layers and FeatScale, on ImageNet-1k.
#
# Expected: 80.9% top-1, as reported by the paper (arXiv 2203.05962, its ImageNet results, quoted second-hand);
# the plain DeiT-S-12 there: 79.8%. Never run here at full length.
# Length: --epochs is left at 500: 640 million images; at 2,000 images/s in all, 3.7 days (estimated, not measured).
#
#   DATA_PATH=/data/imagenet bash scripts/reproduce/featscale_small_12.sh
#
# NUM_GPUS    processes, one per GPU; 2 as in the paper. The recipe's batch is 1,024 images: with 8 GPUs append
#             --batch-size 128, with one --grad-accum 2
# DATA_PATH, appended flags, where results go, restarts: scripts/reproduce/imagenet.bash
source "$(dirname "${BASH_SOURCE[0]}")/imagenet.bash"

python -m torch.distributed.launch --nproc_per_node="${NUM_GPUS:-2}" --master_port 29702 --use_env main.py \
    --auto_reload --model featscale_small_12 --batch-size 512 \
    --data-path "$DATA_PATH" --data-set IMNET --input-size 224 \
    --output_dir ./logs/imnet1k_featscale_small_12 "$@"
