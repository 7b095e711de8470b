"""What each entry of a checkpoint has to be; checked once, after reading, so that later code may rely on it."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .unpickle import DTYPES

MAX_EPOCH, MAX_STEP, MAX_NAME = 10**6, 10**9, 500


def is_state_dict(value: Any) -> bool:
    """Names and tensors of common types, not empty."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(_is_name(name) and isinstance(tensor, Tensor) for name, tensor in value.items())
        and all(str(tensor.dtype) in DTYPES for tensor in value.values())
    )


def faults(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The invalid entries other than weights, as (name, what it should be).

    An entry that is absent or None is no fault.
    """
    for name, (is_good, wanted) in ENTRIES.items():
        value = checkpoint.get(name)
        if value is not None and not is_good(value):
            yield name, wanted


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_plain(value: Any) -> bool:
    """Whether the value is of JSON's types; so must be the entries of lists and dicts."""
    if isinstance(value, dict):
        return all(isinstance(name, str) for name in value) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


# Arguments of the run that later code uses for more than printing and comparing.
ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    "model": _is_name,
    "data_set": _is_name,
    "input_size": _is_whole(1, 2**16),
    "eval_crop_ratio": lambda value: value is None or (_is_number(value) and 0 < value <= 1),
    "model_kwargs": lambda value: isinstance(value, dict),
}


def _are_arguments(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_plain(value)
        and all(is_good(value[name]) for name, is_good in ARGUMENTS.items() if name in value)
    )


def _are_accuracies(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(name) and _is_number(entry) for name, entry in value.items())


def _are_meters(value: Any) -> bool:
    """For each rank, sum and number of samples by name."""

    def is_sum(entry: Any) -> bool:
        return isinstance(entry, list) and len(entry) == 2 and all(map(_is_number, entry)) and entry[1] >= 0

    return isinstance(value, dict) and all(
        isinstance(rank, str)
        and isinstance(sums, dict)
        and all(map(_is_name, sums))
        and all(map(is_sum, sums.values()))
        for rank, sums in value.items()
    )


def _is_scaler(value: Any) -> bool:
    """State of ``torch.amp.GradScaler``; empty if it was disabled."""
    ranges = {
        "scale": lambda v: _is_number(v) and 0 < v < 2**100,  # it is kept in float32
        "growth_factor": lambda v: _is_number(v) and 1 < v < 2**20,
        "backoff_factor": lambda v: _is_number(v) and 0 < v < 1,
        "growth_interval": _is_whole(1, 2**31 - 1),
        "_growth_tracker": _is_whole(0, 2**31 - 1),
    }
    return isinstance(value, dict) and (
        not value or all(name in value and is_good(value[name]) for name, is_good in ranges.items())
    )


def _is_optimizer(value: Any) -> bool:
    """State by parameter and groups of parameters; ``checkpoints.load_optimizer`` compares them with a run's own."""
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups, state = value.get("param_groups"), value["state"]
    if not isinstance(groups, list) or not groups:
        return False
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        return False
    numbers = [number for group in groups for number in group["params"]]
    return (
        all(type(number) is int for number in [*numbers, *state])
        and len(set(numbers)) == len(numbers)
        and set(state) <= set(numbers)
        and all(isinstance(entry, dict) and all(map(_is_name, entry)) for entry in state.values())
    )


def _is_data(value: Any) -> bool:
    return isinstance(value, dict) and _is_whole(0, 2**63)(value.get("images")) and _is_name(value.get("digest"))


# Entry -> the test of a valid one, and its description for messages.
ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (_is_whole(1, 2**31), "a whole number"),
    "epoch": (_is_whole(-1, MAX_EPOCH), f"a whole number from -1 to {MAX_EPOCH}"),
    "step": (_is_whole(0, MAX_STEP), f"a whole number from 0 to {MAX_STEP}"),
    "meters": (_are_meters, "sums by name for each rank"),
    "max_accuracy": (_are_accuracies, "accuracies by name"),
    "args": (_are_arguments, "arguments by name, of the types of JSON"),
    "scaler": (_is_scaler, "the state of a GradScaler"),
    "optimizer": (_is_optimizer, "the state of an optimizer"),
    "optimizer_class": (_is_name, "a name"),
    "data": (_is_data, "the number of images and the digest of their list"),
}
