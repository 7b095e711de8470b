#!/usr/bin/env bash
# DeiT-S with 24 layers and AttnScale, on ImageNet-1k.
#
# Expected: 81.1% top-1, as reported by the paper (arXiv 2203.05962, its ImageNet results, quoted second-hand);
# the plain DeiT-S-24 there: 80.5%. Never run here at full length.
# Length: --epochs is left at 500: 640 million images; at 1,000 images/s in all, 7.4 days (estimated, not measured).
#
#   DATA_PATH=/data/imagenet bash scripts/reproduce/attnscale_small_24.sh
#
# NUM_GPUS    processes, one per GPU; 2 as in the paper. The recipe's batch is 512 images: with 8 GPUs append
#             --batch-size 64, with one --grad-accum 2
# DATA_PATH, appended flags, where results go, restarts: scripts/reproduce/imagenet.bash
source "$(dirname "${BASH_SOURCE[0]}")/imagenet.bash"

python -m torch.distributed.launch --nproc_per_node="${NUM_GPUS:-2}" --master_port 29701 --use_env main.py \
    --auto_reload --model attnscale_small_24 --batch-size 256 --drop 0.2 \
    --data-path "$DATA_PATH" --data-set IMNET --input-size 224 \
    --output_dir ./logs/imnet1k_attnscale_small_24 "$@"
