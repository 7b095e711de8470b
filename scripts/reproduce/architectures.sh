#!/usr/bin/env bash
# One picture of five architectures: DeiT, CaiT, EVA-02, DINOv3 and Swin of timm and of this zoo, 12 blocks and about 96
# channels each, trained alike on 1,797 handwritten digits and analysed on the 360 held-out ones. Makes
# docs/architectures.png, the picture of the README.
#
# It shows what scripts/analyze.py draws, not which architecture is better: the models are tiny, the recipe is the same
# for all and tuned for none, and there is one seed. Measured once, top-1 of the 360 images: DeiT 91.1%, CaiT 89.7%,
# EVA-02 97.5%, DINOv3 71.9%, Swin 98.1%.
# Length: about 10 minutes of processor time.
#
#   bash scripts/reproduce/architectures.sh
#
# EPOCHS  of each model                                                [20]
# FIGURE  where the figure goes; empty: only into the report's folder  [docs/architectures.png]
# Run it again and it skips what is done; stop it and it continues. Nothing is downloaded but the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup_env.sh

data=data/digits
epochs="${EPOCHS:-20}"
logs="logs/architectures_${epochs}_epochs"
figure="${FIGURE-docs/architectures.png}"
recipe=(
    --input-size 32 --data-set FOLDER --data-path "$data" --batch-size 32 --num_workers 1 --print-freq 100
    --epochs "$epochs" --lr 8e-3 --warmup-epochs 2 --drop-path 0 --no-repeated-aug --hflip 0 --aa none --reprob 0
    --mixup 0 --cutmix 0 --no-model-ema
)
vit=(embed_dim=96 depth=12 num_heads=3 patch_size=8)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

"$PYTHON" scripts/prepare_digits.py --output "$data"

compared=()
add() { # label, model, model's arguments
    local label="$1" model="$2"
    shift 2
    echo "== $label: $model, $epochs epochs"
    "$PYTHON" main.py --auto_reload --model "$model" --model-kwargs "$@" "${recipe[@]}" --output_dir "$logs/$label"
    compared+=(--model "$model" --resume "$logs/$label/checkpoint.pth" --label "$label")
}
add DeiT deit_small_12 "${vit[@]}"
add CaiT cait_S24_224 "${vit[@]}" init_values=0.1
add EVA-02 eva02_tiny_patch14_224 "${vit[@]}"
add DINOv3 vit_small_patch16_dinov3 "${vit[@]}" init_values=1.0
add Swin swin_tiny_patch4_window7_224 embed_dim=32 'depths=(2,2,6,2)' 'num_heads=(1,2,4,8)' patch_size=2 window_size=4

echo "== analysis on the held-out digits"
"$PYTHON" scripts/analyze.py --data-set FOLDER --data-path "$data" --num-images 0 --batch-size 40 "${compared[@]}" \
    --output_dir "$logs/analysis"
if [ -n "$figure" ]; then
    cp "$logs/analysis/overview.png" "$figure"
fi
echo "report: $logs/analysis/report.html"
