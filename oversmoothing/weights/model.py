"""Models by name and from checkpoints: how they are built, and what a checkpoint may decide about its model."""

import inspect
import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from ..convert import add_remedy
from ..remedies import RemedyError
from . import fetch
from .load import load_weights, number_of_classes, problems
from .read import CheckpointError, read_checkpoint

# Arguments of timm's builders, not of models: addresses to download from, files to open, wrappers around the model.
BUILDER_ARGUMENTS = {
    name
    for builder in (timm.create_model, build_model_with_cfg)
    for name, parameter in inspect.signature(builder).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
} | {"features_only", "pretrained_custom_load", "feature_cls", "out_indices"}


MAX_NUMBER = 10_000  # largest number in a file's arguments: layers, channels, pixels


class ModelError(ValueError):
    """A model that cannot be built; the message names the model, the argument and the way out."""


def check_model_name(name: str, flag: str = "--model") -> None:
    """Refuses a model that timm does not know, before anything is read.

    Raises:
        ModelError: With the most similar names.
    """
    if not timm.is_model(name):
        raise ModelError(f"{flag} {name}: no such model; near: {near_models(name)} (see --list-models)")


def near_models(name: str) -> str:
    """The names that are most like one that timm does not know, for a message."""
    return ", ".join(get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)) or "none"


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    input_size: int | None = None,
    pretrained: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    remedies: Mapping[str, Mapping[str, Any]] | None = None,
) -> nn.Module:
    """timm's ``create_model``, with the image size given only to models that are built for one, and with remedies.

    Args:
        name: Of this zoo or of timm.
        num_classes: Classes of the head; None: the model's own.
        input_size: Side of the images in pixels; None: the model's own.
        pretrained: Whether to load the published weights.
        model_kwargs: Constructor arguments; they win over the arguments above.
        remedies: Names and options for ``add_remedy``; empty or None: the model as it is.

    Raises:
        ModelError: If there is no such model, or it cannot be built from these arguments.
    """
    check_model_name(name)
    if input_size is not None and input_size < 1:
        raise ModelError(f"--input-size {input_size}: give a whole number of 1 or more")
    if num_classes is not None and num_classes < 1:
        raise ModelError(f"--num-classes {num_classes}: give 1 or more")
    kwargs = dict(model_kwargs or {})
    if num_classes is not None:
        kwargs.setdefault("num_classes", num_classes)
    config = timm.get_pretrained_cfg(name)  # None for timm's former names
    if input_size is not None and config is not None and config.fixed_input_size:
        kwargs.setdefault("img_size", input_size)
    try:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # a constructor's complaint can be of any kind
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ModelError(
            f"--model {name} cannot be built from {kwargs} (--model-kwargs, --drop, --drop-path, --input-size): "
            f"{type(error).__name__}: {reason}"
        ) from error
    try:
        return add_remedy(model, remedies) if remedies else model
    except RemedyError as error:
        raise ModelError(f"--model {name} --remedy {' '.join(remedies)}: {error}") from error


def model_from_checkpoint(
    checkpoint: Mapping[str, Any],
    *,
    source: str,
    name: str | None = None,
    weights: str = "model",
    num_classes: int | None = None,
    input_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    remedies: Mapping[str, Mapping[str, Any]] | None = None,
) -> nn.Module:
    """Builds the model of a checkpoint and loads its weights strictly; arguments win over what the file says.

    A file decides only by plain values: its model's name, image size, constructor arguments and remedies. None of them
    can make this function open, download or call anything.

    Args:
        checkpoint: From ``read_checkpoint``.
        source: Where it came from, for messages.
        name: The model's; None: as the file says.
        weights: ``model``, or ``model_ema`` for the weights' EMA.
        num_classes: None: counted from the head's weights.
        input_size: Side of the images in pixels; None: as the file says, else the model's own.
        model_kwargs: Constructor arguments in addition to the file's; they win.
        remedies: As in :func:`create_model`; None: as the file says.

    Raises:
        CheckpointError: If the file has no such weights or does not say its model, or the weights do not fit the model.
        ModelError: If the model cannot be built.
    """
    trained = trained_with(checkpoint)
    name = name or trained.get("model")
    if name is None or not timm.is_model(name):
        raise CheckpointError(f"{source}: is of model {name}, which is not known here: give --model (--model-kwargs)")
    state_dict = checkpoint.get(weights)
    if state_dict is None:
        raise CheckpointError(f"{source}: has no EMA weights: leave --ema out")
    build = partial(
        create_model,
        name,
        num_classes=number_of_classes(state_dict) if num_classes is None else num_classes,
        input_size=trained.get("input_size") if input_size is None else input_size,
        model_kwargs={**trained.get("model_kwargs", {}), **(model_kwargs or {})},
        remedies=trained.get("remedy") if remedies is None else remedies,
    )
    try:
        _check_sketch(build, state_dict, source)
        model = build()
        load_weights(model, state_dict, source=source)
    except CheckpointError as error:
        fault = str(error).rpartition(": ")[0]  # without the way out, which is for main.py
        flags = "--model, --model-kwargs, --num-classes and --input-size"
        raise CheckpointError(f"{fault}: {flags} must say what was trained; main.py --finetune adapts") from error
    return model


def _check_sketch(build: Callable[[], nn.Module], state_dict: Mapping[str, Tensor], source: str) -> None:
    """Compares weights with a model on the meta device: a file may describe a model larger than this machine's memory.

    Raises:
        CheckpointError: If they do not fit.
    """
    try:
        with torch.device("meta"):
            wanted = build().state_dict()
    except ModelError:  # some models of timm cannot be built on the meta device
        return
    if found := problems(wanted, state_dict):
        raise CheckpointError(f"{source}: does not fit the model; {'; '.join(found)}: is it of another model?")


def published_model(address: str) -> nn.Module:
    """A model with remedies that ``scripts/push_to_hub.py`` published; timm's ``create_model`` does not know remedies.

    Args:
        address: ``hf-hub:owner/name``, or a local folder with config.json and model.safetensors.

    Raises:
        CheckpointError: If a file is missing, or the weights do not fit the configuration.
        ModelError: If the model cannot be built.
    """
    try:
        config = json.loads(fetch.local_file(f"{address}/config.json").read_text())
        described = {"model": config["architecture"], "model_kwargs": config.get("model_args", {})}
        classes = config.get("num_classes")
        if type(classes) not in (int, type(None)):
            raise TypeError("num_classes is no number")
    except (fetch.FetchError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{address}: has no readable config.json ({error})") from error
    trained = described | {"remedy": config.get("remedies", {})}
    checkpoint = read_checkpoint(f"{address}/model.safetensors") | {"args": trained}
    return model_from_checkpoint(checkpoint, source=address, num_classes=classes)


def trained_with(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's ``args`` may decide about its model: plain values, and no arguments of timm's builders.

    Returns:
        ``model`` (a str), ``input_size`` (an int), ``model_kwargs`` (a dict) and ``remedy`` (names with their options,
        from ``remedies_of``), each only if the file has it.
    """
    args = checkpoint.get("args")
    args = args if isinstance(args, Mapping) else {}
    found: dict[str, Any] = {}
    if isinstance(args.get("model"), str):
        found["model"] = args["model"]
    if type(args.get("input_size")) is int:
        found["input_size"] = args["input_size"]
    if isinstance(args.get("model_kwargs"), Mapping):
        found["model_kwargs"] = {
            key: value
            for key, value in args["model_kwargs"].items()
            if isinstance(key, str) and key not in BUILDER_ARGUMENTS and _is_plain(value)
        }
    if isinstance(args.get("remedy"), Mapping):
        found["remedy"] = {
            str(name): {str(key): value for key, value in options.items() if _is_plain(value)}
            for name, options in args["remedy"].items()
            if isinstance(options, Mapping)
        }
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return (
        value is None or isinstance(value, bool | float | str) or (isinstance(value, int) and abs(value) <= MAX_NUMBER)
    )
