#!/usr/bin/env bash
# Any vision transformer of timm through everything: add a remedy, fine-tune on 1,797 handwritten digits with two
# processes, analyse before and after, export.
#
#   bash scripts/reproduce/any_vit.sh                                          # random weights, a small DINOv3
#   PRETRAINED=1 MODEL_KWARGS= INPUT_SIZE=256 bash scripts/reproduce/any_vit.sh   # timm's weights, downloaded
#   MODEL=deit3_small_patch16_224 REMEDY="gfsa neutreno" bash scripts/reproduce/any_vit.sh
#
# MODEL         of timm                                               [vit_small_patch16_dinov3]
# MODEL_KWARGS  its constructor's arguments; none for timm's weights  [embed_dim=96 depth=6 num_heads=3 patch_size=8 init_values=1.0]
# INPUT_SIZE    side of the images in pixels                          [32]
# PRETRAINED    1: start from timm's weights instead of random ones   [0]
# REMEDY        one or several, see main.py --list-remedies           [attnscale]
# EPOCHS, NPROC, OUTPUT                                               [10, 2, logs/any_vit]
# About 2 minutes on two CPU cores as it is. Run it again and it finds everything done; stop it and it continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup_env.sh

data=data/digits
logs="${OUTPUT:-logs/any_vit}"
model="${MODEL:-vit_small_patch16_dinov3}"
read -r -a kwargs <<< "${MODEL_KWARGS-embed_dim=96 depth=6 num_heads=3 patch_size=8 init_values=1.0}"
read -r -a remedy <<< "${REMEDY:-attnscale}"
size="${INPUT_SIZE:-32}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "== data: handwritten digits"
"$PYTHON" scripts/prepare_digits.py --output "$data"

echo "== the plain model: $model"
mkdir -p "$logs"
"$PYTHON" - "$model" "$logs/plain.safetensors" "${PRETRAINED:-0}" "$size" "${kwargs[@]}" <<'PYTHON'
import argparse
import sys

import torch
from safetensors.torch import save_file
from timm.utils import ParseKwargs

import models  # noqa: F401  (registers the zoo with timm)
from oversmoothing.weights import create_model

name, file, pretrained, size, *words = sys.argv[1:]
parser = argparse.ArgumentParser()
parser.add_argument("--kwargs", nargs="*", action=ParseKwargs, default={})
torch.manual_seed(0)
kwargs = parser.parse_args(["--kwargs", *words]).kwargs
model = create_model(name, num_classes=10, input_size=int(size), pretrained=pretrained == "1", model_kwargs=kwargs)
save_file(model.state_dict(), file)
print(f"wrote {file}: {sum(p.numel() for p in model.parameters()):,} parameters")
PYTHON

echo "== fine-tuning with ${remedy[*]}, ${NPROC:-2} processes"
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC:-2}" main.py --auto_reload \
    --model "$model" --model-kwargs "${kwargs[@]}" --input-size "$size" --remedy "${remedy[@]}" \
    --finetune "$logs/plain.safetensors" --data-set FOLDER --data-path "$data" --batch-size 32 --num_workers 1 \
    --epochs "${EPOCHS:-10}" --lr 4e-3 --warmup-epochs 1 --drop-path 0 --no-repeated-aug --aa none --hflip 0 --reprob 0 \
    --mixup 0 --cutmix 0 --no-model-ema --print-freq 100 --output_dir "$logs"

echo "== analysis, before and after"
"$PYTHON" scripts/analyze.py --data-set FOLDER --data-path "$data" --num-images 64 --output_dir "$logs/analysis" \
    --input-size "$size" \
    --model "$model" --model-kwargs "${kwargs[@]}" --resume "$logs/plain.safetensors" --label before \
    --model "$model" --resume "$logs/checkpoint.pth" --label "after, ${remedy[*]}"

echo "== export"
"$PYTHON" scripts/export.py --checkpoint "$logs/checkpoint.pth" --output "$logs/model.onnx"
