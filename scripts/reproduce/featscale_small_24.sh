#!/usr/bin/env bash
# DeiT-S with 24 layers and FeatScale, on ImageNet-1k.
#
# Expected: 81.3% top-1, as reported by the paper (arXiv 2203.05962, its ImageNet results, quoted second-hand);
# the plain DeiT-S-24 there: 80.5%. Never run here at full length.
# Length: --epochs is left at 500: 640 million images; at 1,000 images/s in all, 7.4 days (estimated, not measured).
#
#   DATA_PATH=/data/imagenet bash scripts/reproduce/featscale_small_24.sh
#
# DATA_PATH   folder of ImageNet with train/<class>/ and val/<class>/ (scripts/prepare_imagenet.py makes it)
# NUM_GPUS    processes, one per GPU; 2 as in the paper. The recipe's batch is 512 images: with 8 GPUs append
#             --batch-size 64, with one --grad-accum 2
# Further flags of main.py can be appended. Results go to logs/imnet1k_featscale_small_24/ of this repository.
# After an interruption run it again: it continues from there.
set -euo pipefail
DATA_PATH=$(realpath "${DATA_PATH:?set it to the ImageNet folder that holds train/ and val/}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python -m torch.distributed.launch --nproc_per_node="${NUM_GPUS:-2}" --master_port 29703 --use_env main.py \
    --auto_reload --model featscale_small_24 --batch-size 256 --drop 0.2 \
    --data-path "$DATA_PATH" --data-set IMNET --input-size 224 \
    --output_dir ./logs/imnet1k_featscale_small_24 "$@"
