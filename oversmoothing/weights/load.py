"""Loads state dicts into models: adapts them if asked, and checks every name of the file and of the model."""

import logging
import math
import re
from collections.abc import Callable, Collection, Mapping

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from .names import timm_names
from .read import CheckpointError

logger = logging.getLogger(__name__)

CLASSIFIERS = ("head", "head.fc", "fc", "classifier")  # timm's names of the classifier; Swin's is head.fc
TABLE = "relative_position_bias_table"  # of Swin and its descendants


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    source: str,
    may_be_missing: Callable[[str], bool] = lambda name: False,
    finetune: bool = False,
) -> list[str]:
    """Loads weights strictly, except for the cases named here, and logs in one line what was loaded.

    Tensors from Swin's own code are renamed to timm's names: see :func:`timm_names`.

    Args:
        model: The bare model; unchanged if this raises.
        state_dict: ``read_checkpoint(...)["model"]``.
        source: Where it came from, for messages.
        may_be_missing: Whether the parameter of this name may keep its initial value (the remedies' ``lamb*``).
        finetune: As DeiT's fine-tuning does, leave out a classifier with another number of classes, interpolate
            ``pos_embed`` to the model's grid and Swin's tables of relative positions to its windows, and leave out the
            distillation token and head if the model has none.

    Returns:
        Names that kept their initial values.

    Raises:
        CheckpointError: With the names that are missing, unexpected, of another shape or of another type.
    """
    wanted = model.state_dict()
    state_dict, renamed = timm_names(wanted, state_dict)
    given, fresh, notes = _adapt(model, wanted, state_dict) if finetune else (state_dict, set(), [])
    found = problems(wanted, given, fresh, may_be_missing)
    if found:
        way_out = "is it the checkpoint of another --model, or do --model-kwargs differ?"
        if not finetune:
            adapted, fresh, _ = _adapt(model, wanted, state_dict)
            if not problems(wanted, adapted, fresh, may_be_missing):
                way_out = "only the classifier, the image size or distillation differ: pass the file with --finetune"
        raise CheckpointError(f"{source}: does not fit the model; {'; '.join(found)}: {way_out}")
    missing = [name for name in wanted if name not in given]
    model.load_state_dict({**wanted, **given}, strict=True)
    if missing:
        notes.append(f"left at initial value: {_summary(missing)}")
    logger.info("%s", "; ".join([f"loaded {len(given)} of {len(wanted)} tensors from {source}", *renamed, *notes]))
    return missing


def problems(
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    fresh: Collection[str] = (),
    may_be_missing: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """Differences of the state dict ``given`` from ``wanted``: one phrase for each kind of fault."""

    def kind(tensor: Tensor) -> tuple[bool, bool]:
        return tensor.is_floating_point(), tensor.is_complex()

    found = {
        "missing": [n for n in wanted if n not in given and n not in fresh and not may_be_missing(n)],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} in the file, {tuple(tensor.shape)} in the model"
            for name, tensor in wanted.items()
            if name in given and given[name].shape != tensor.shape
        ],
        "of another type": [
            f"{name} {given[name].dtype} in the file, {tensor.dtype} in the model"
            for name, tensor in wanted.items()
            if name in given and kind(given[name]) != kind(tensor)
        ],
    }
    return [
        f"{len(names)} {kind}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        for kind, names in found.items()
        if names
    ]


def _adapt(
    model: nn.Module, wanted: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], set[str], list[str]]:
    """Adapts a state dict to a model with other classes, another grid, other windows or no distillation token.

    Returns:
        The new state dict, the classifier names that stay at their initial values, and a note on each change.
    """
    given, fresh, notes = dict(state_dict), set(), []
    # How many of pos_embed's entries belong to cls/dist tokens: 0 in CaiT, whose class token has none.
    prefix = wanted["pos_embed"].shape[1] - model.patch_embed.num_patches if "pos_embed" in wanted else 0
    if "dist_token" in given and "dist_token" not in wanted:
        given = {n: t for n, t in given.items() if n != "dist_token" and not n.startswith("head_dist.")}
        notes.append("dropped dist_token and head_dist (a distilled checkpoint, a plain model)")
        if (
            prefix and "pos_embed" in given and given["pos_embed"].dim() == 3
        ):  # the entry after the class token's is the distillation token's
            given["pos_embed"] = torch.cat([given["pos_embed"][:, :prefix], given["pos_embed"][:, prefix + 1 :]], dim=1)

    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    for head in [name for name, module in model.named_modules() if any(module is head for head in heads)]:
        weight = f"{head}.weight"
        in_model = len(wanted[weight]) if weight in wanted else 0
        if weight in given and given[weight].dim() and len(given[weight]) != in_model:
            notes.append(f"dropped {head} ({len(given[weight])} classes in the file, {in_model} in the model)")
            given = {name: tensor for name, tensor in given.items() if not name.startswith(f"{head}.")}
            fresh |= {name for name in wanted if name.startswith(f"{head}.")}

    if "pos_embed" in wanted and "pos_embed" in given and given["pos_embed"].dim() == 3:
        grid, tokens = tuple(model.patch_embed.grid_size), given["pos_embed"].shape[1] - prefix
        side = math.isqrt(max(tokens, 0))
        if tokens != grid[0] * grid[1] and tokens == side * side > 0:
            given["pos_embed"] = resample_abs_pos_embed(
                given["pos_embed"], list(grid), [side, side], prefix, interpolation="bicubic", antialias=False
            )  # DeiT's main.py; antialias is timm's default, not DeiT's
            notes.append(f"interpolated pos_embed from {side}x{side} to {grid[0]}x{grid[1]}")

    resized = _resized_tables(model, wanted, given)
    if resized:
        given |= resized
        notes.append(f"interpolated {len(resized)} of {TABLE} to other windows")
    return given, fresh, notes


def _resized_tables(model: nn.Module, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables of relative positions from square windows of another size, interpolated to the model's windows."""
    resized = {}
    for name in (name for name in wanted if name.endswith(TABLE) and name in given):
        old, new = given[name], wanted[name]
        window = getattr(model.get_submodule(name.removesuffix(f".{TABLE}")), "window_size", None)
        if old.shape != new.shape and old.shape[1:] == new.shape[1:] and window and window[0] == window[1]:
            if math.isqrt(len(old)) ** 2 == len(old) > 0 and old.is_floating_point():
                resized[name] = resize_rel_pos_bias_table(old, window, new.shape)
    return resized


def _summary(names: list[str]) -> str:
    """``blocks.*.attn.lamb (12)`` for twelve names that differ in their number only."""
    patterns = [re.sub(r"\.\d+\.", ".*.", name) for name in names]
    return ", ".join(f"{pattern} ({patterns.count(pattern)})" for pattern in dict.fromkeys(patterns))


def number_of_classes(state_dict: Mapping[str, Tensor]) -> int | None:
    """Number of classes of a state dict's classifier (rows of its weight); None without a classifier."""
    weights = (state_dict.get(f"{name}.weight") for name in CLASSIFIERS)
    return next((len(weight) for weight in weights if weight is not None and weight.dim()), None)
