"""What two runs of the same seed share, measured rather than assumed."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor

import build
import options
import utils
from scripts.comparison.study import NO_EFFECT, Run

# Flags that decide which images a step gets, in which order, and what is done to them before the model sees them.
IMAGES = frozenset({
    *("data_set", "data_path", "inat_category", "input_size", "batch_size", "grad_accum", "epochs", "skip_bad_images"),
    *("val_split", "val_split_seed", "color_jitter", "hflip", "aa", "train_interpolation", "repeated_aug", "reprob"),
    *("repeated_aug_local", "three_augment", "src", "remode", "recount", "resplit", "mixup", "cutmix"),
    *("cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode", "fast_loader", "smoothing"),
})  # fmt: skip
TREATMENT = ("model", "remedy")  # what arms are meant to differ in; any other flag that differs is named


@dataclass(frozen=True)
class Pairing:
    """An arm's run beside the baseline's of the same seed.

    Attributes:
        equal: How many of the baseline's initial weights the arm has too, to the bit.
        of: How many initial weights the baseline has.
        own: How many of the arm's initial weights belong to parameters that the baseline lacks.
        same_images: Whether all flags that decide a step's images agree, and the normalisation too.
        differing: Flag -> (the arm's value, the baseline's), of all flags that matter except model and remedy.
    """

    equal: int
    of: int
    own: int
    same_images: bool
    differing: dict[str, tuple[Any, Any]]


def compare_starts(run: Run, baseline: Run, classes: int) -> Pairing:
    """Builds both models as ``main.py`` does and compares them.

    Args:
        run: An arm's run.
        baseline: The baseline's run at the same seed in the same setting.
        classes: Classes of the head.
    """
    ours, images = _start(run.args, run.seed, classes)
    theirs, images_of_baseline = _start(baseline.args, baseline.seed, classes)
    same = [name for name, tensor in theirs.items() if name in ours and torch.equal(ours[name], tensor)]
    differing = differing_flags(run, baseline)
    return Pairing(
        equal=sum(theirs[name].numel() for name in same),
        of=sum(tensor.numel() for tensor in theirs.values()),
        own=sum(tensor.numel() for name, tensor in ours.items() if name not in theirs),
        same_images=not IMAGES & differing.keys() and images == images_of_baseline,
        differing=differing,
    )


def _start(args: argparse.Namespace, seed: int, classes: int) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Initial weights of a run, and the data configuration of its model."""
    utils.seed_everything(seed)
    model = build.build_model(args, classes)
    return dict(model.named_parameters()), resolve_data_config({}, model=model)


def differing_flags(run: Run, baseline: Run) -> dict[str, tuple[Any, Any]]:
    """Flag -> (the arm's value, the baseline's), for every flag that differs, except model and remedy.

    Tables of values (``--model-kwargs``) are compared key by key.
    """
    ours, theirs = _flat(run), _flat(baseline)
    default = _flat_values(vars(options.get_args_parser().parse_args([])))
    names = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if ours.get(name, default.get(name)) != theirs.get(name, default.get(name))
    )
    return {name: (ours.get(name), theirs.get(name)) for name in names if name not in TREATMENT}


def _flat(run: Run) -> dict[str, Any]:
    values = {name: value for name, value in vars(run.args).items() if name not in NO_EFFECT}
    if run.after is not None:
        values[run.starts_from] = f"the run {run.after.arm}"
    return _flat_values(values)


def _flat_values(values: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= {f"{name} {key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat
