#!/usr/bin/env bash
# Evaluation of DeiT-S with 12 layers and AttnScale on the 50,000 validation images of ImageNet-1k.
#
# Expected: 80.7% top-1, as reported by the paper (arXiv 2203.05962, its ImageNet results, quoted second-hand), with
# its published weights (huggingface.co/peihaowang/vit-anti-oversmoothing). Never run here with those.
# Length: one pass over the validation images.
#
#   DATA_PATH=/data/imagenet CHECKPOINT=attnscale_small_12.pth bash scripts/reproduce/eval_attnscale_small_12.sh
#
# CHECKPOINT  weights to evaluate, a file or a URL
# NUM_GPUS    processes, one per GPU; 2 as in the paper. Neither it nor --batch-size changes the accuracy
# DATA_PATH, appended flags, where results go, restarts: scripts/reproduce/imagenet.bash
source "$(dirname "${BASH_SOURCE[0]}")/imagenet.bash"
: "${CHECKPOINT:?set it to the weights to evaluate (a file or a URL)}"

python -m torch.distributed.launch --nproc_per_node="${NUM_GPUS:-2}" --master_port 29701 --use_env main.py \
    --model attnscale_small_12 --batch-size 256 --drop 0.2 \
    --data-path "$DATA_PATH" --data-set IMNET --input-size 224 \
    --output_dir ./logs/imnet1k_attnscale_small_12 --eval --resume "$CHECKPOINT" "$@"
