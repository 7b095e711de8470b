#!/usr/bin/env bash
# ViT-S with 12 layers, with the recipe of DeiT III: 800 epochs of ImageNet-1k at 224 pixels.
#
# Expected: 81.4% top-1, as reported by the paper (arXiv 2204.07118, ImageNet-1k at 224 pixels, quoted second-hand).
# Never run here at full length.
# Length: 800 epochs: 1,025 million images; at 2,000 images/s in all, 5.9 days (estimated, not measured).
# Where each number of the recipe comes from, and which of them are not certain: docs/deit3.md.
#
#   DATA_PATH=/data/imagenet bash scripts/reproduce/deit3_small_12.sh
#
# NUM_GPUS    processes, one a GPU; 8, for the recipe's batch of 2,048 images. With 4 GPUs append --batch-size 512,
#             with one --grad-accum 8; the rate stays as it is (--unscale-lr)
# DATA_PATH, appended flags, where results go, restarts: scripts/reproduce/imagenet.bash
source "$(dirname "${BASH_SOURCE[0]}")/imagenet.bash"

torchrun --standalone --nproc_per_node="${NUM_GPUS:-8}" main.py \
    --auto_reload --model deit_small_12 --batch-size 256 --epochs 800 \
    --model-kwargs init_values=1e-4 no_embed_class=True uniform_drop_path=True \
    --opt lamb --lr 4e-3 --unscale-lr --weight-decay 0.05 --warmup-epochs 5 \
    --drop-path 0.05 --bce-loss --smoothing 0 --mixup 0.8 --cutmix 1.0 --three-augment --color-jitter 0.3 --reprob 0 \
    --repeated-aug --eval-crop-ratio 1.0 \
    --data-path "$DATA_PATH" --data-set IMNET --input-size 224 \
    --output_dir ./logs/imnet1k_deit3_small_12 "$@"
