"""Shared by the tests of the analysis: small models, real image files, and what is measured on them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from oversmoothing.analysis import results as analysis_results
from oversmoothing.analysis.subject import Subject, build_subject
from scripts import analyze

KWARGS = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3)
SMALL = ["--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
NUM_IMAGES = 5


def write_photos(folder: Path) -> Path:
    """Images as users have them: sub-folders, sizes, formats and things that are no images; returns ``folder``."""
    generator = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        path = folder / ("holidays" if index % 2 else ".") / f"{index}.{'jpg' if index % 2 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        pixels = generator.integers(0, 255, (40 + 7 * index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if index == 2 else "RGB").save(path)
    (folder / "notes.txt").write_text("no image")
    return folder


def subject_of(name: str, **kwargs: object) -> Subject:
    """A small model, built as the command builds it."""
    args = analyze.get_parser().parse_args(["--model", name, *SMALL])
    args.models[0].kwargs |= kwargs
    return build_subject(args.models[0], name, device=torch.device("cpu"))


def measured(*argv: object) -> list[analysis_results.Result]:
    """The numbers alone, without figures."""
    args = analyze.get_parser().parse_args([str(value) for value in argv])
    analyze.check_args(args)
    device = torch.device("cpu")
    return analyze.measure_images(args, analyze.build_subjects(args, device), device)


def assert_equal_results(first: analysis_results.Result, second: analysis_results.Result) -> None:
    """Every quantity of every layer, up to float32's rounding."""
    for layer, other in zip(first.layers, second.layers, strict=True):
        assert layer.keys() == other.keys()
        for name, values in layer.items():
            torch.testing.assert_close(values.mean, other[name].mean, rtol=1e-4, atol=1e-6, msg=name)


def dense_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the model itself computes when it does not use fused attention."""
    maps = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda drop, args, output: maps.append(output))
    with torch.no_grad():
        model(images)
    return maps
