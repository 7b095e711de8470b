"""Builds everything that the flags describe, small and without data, before a run touches anything.

Whatever a constructor of torch, torchvision or timm complains about becomes one sentence with the flags at fault. So a
mistyped value ends a run in its first second, not after its data set was listed or its first epoch was trained.
"""

import argparse
import difflib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from itertools import chain

import torch
from PIL import Image
from timm.data import resolve_data_config
from timm.optim import get_optimizer_info, kron, param_groups_layer_decay
from torch import nn
from torchvision import transforms

import build
import datasets
import fastload
import losses
import optim
import utils
from datasets import DataError, DataOptions
from options import ArgumentError, get_args_parser, mixup_active, spell
from oversmoothing.weights import ModelError
from writers import check_wandb

ANY_CLASSES = 3  # stands in before the data set's classes are counted
OWN_ERRORS = (ArgumentError, DataError, ModelError, utils.SetupError)  # they name the flag already
MODEL_FLAGS = (
    *("model", "model_kwargs", "remedy", "remedy_kwargs", "input_size", "drop", "drop_path", "grad_checkpointing"),
    "num_classes",
)
OPTIMIZER_FLAGS = ("opt", "opt_kwargs", "opt_eps", "opt_betas", "momentum", "weight_decay", "lr")
SCHEDULE_FLAGS = (
    *("sched", "lr", "epochs", "warmup_epochs", "warmup_lr", "min_lr", "decay_epochs", "decay_rate"),
    *("lr_noise", "lr_noise_pct", "lr_noise_std", "batch_size", "grad_accum", "sched_on_updates", "scale_min_lr"),
    "unscale_lr",
)
AUGMENTATION_FLAGS = (
    *("aa", "three_augment", "src", "color_jitter", "hflip", "train_interpolation", "reprob", "remode", "recount"),
    "input_size",
)
MIXING_FLAGS = (
    *("mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode", "smoothing", "bce_loss"),
)


def check_flags(args: argparse.Namespace, world_size: int = 1) -> nn.Module:
    """Builds everything ``args`` describe on a small scale and uses it once; call it after ``check_args``.

    Args:
        args: The parsed arguments.
        world_size: Processes of the run; the learning rate grows with them.

    Returns:
        The model of ``--model`` on the meta device, for its data configuration.

    Raises:
        ArgumentError: If a flag's value is not usable; with that value.
        ModelError: If the model does not exist or cannot be built.
        SetupError: If ``--log-wandb`` asks for a package that is not installed.
    """
    if args.log_wandb and not (args.eval or args.throughput):
        check_wandb()
    with blame(args, *MODEL_FLAGS):
        model = build_on_meta(args)
    check_recipe(args, model, world_size)
    return model


def check_recipe(args: argparse.Namespace, model: nn.Module, world_size: int = 1) -> None:
    """The part of :func:`check_flags` that follows the model: transforms, mixing, rates and optimizer."""
    data_config = resolve_data_config({}, model=model)
    options = DataOptions.from_args(args)
    with blame(args, "eval_crop_ratio", "input_size"):
        datasets.build_transform(False, options, data_config)
    if args.eval or args.throughput:
        return
    with blame(args, *AUGMENTATION_FLAGS):
        augment_once(args, options, data_config)
    with blame(args, *MIXING_FLAGS):
        mix_once(args)
    lr = optim.scaled_lr(args, world_size)
    with blame(args, *SCHEDULE_FLAGS):
        plan = optim.LRPlan(args, world_size)
        if not all(math.isfinite(rate) and rate >= 0 for rate in (lr, *map(plan, range(args.epochs)))):
            raise ValueError("a learning rate is negative or not finite")
    with blame(args, *OPTIMIZER_FLAGS):
        check_optimizer(args, model)
        step_once(args)
    if args.layer_decay is not None:
        with blame(args, "layer_decay", "model"):
            param_groups_layer_decay(model, layer_decay=args.layer_decay)


@contextmanager
def blame(args: argparse.Namespace, *names: str) -> Iterator[None]:
    """Turns any exception within into a sentence with the given flags among ``names``, or else the first of them.

    Raises:
        ArgumentError: In its place; errors that already name a flag pass unchanged.
    """
    try:
        yield
    except OWN_ERRORS:
        raise
    except Exception as error:  # a constructor's complaint can be of any kind
        defaults = get_args_parser().parse_args([])
        given = [name for name in names if getattr(args, name) != getattr(defaults, name)] or names[:1]
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ArgumentError(
            f"{spell(args, *given)}: not possible ({type(error).__name__}: {reason}); change one of these values, or "
            "leave it out for the default"
        ) from error


def build_on_meta(args: argparse.Namespace) -> nn.Module:
    """The model and its teacher, without memory for weights, each after a forward pass that gives logits."""
    classes = args.num_classes or ANY_CLASSES
    model = _on_meta(partial(build.build_model, args, classes))
    given = [name for name in ("model_kwargs", "remedy", "remedy_kwargs") if getattr(args, name)]
    _check_logits(spell(args, "model", *given), model, args.input_size, classes)
    if args.distillation_type != "none" and not args.eval:
        teacher = _on_meta(partial(build.create_teacher, args, classes))
        _check_logits(spell(args, "teacher_model"), teacher, args.input_size, classes)
    return model


def _on_meta(build_it: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build_it()
    except (ModelError, NotImplementedError, RuntimeError):  # some models of timm compute while they are built
        return build_it().to("meta")


def _check_logits(what: str, model: nn.Module, size: int, classes: int) -> None:
    images = torch.empty(2, 3, size, size, device="meta")
    try:
        with torch.inference_mode():
            logits = model.eval()(images)
    except NotImplementedError:  # an operator without a form for the meta device
        return
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ModelError(
            f"{what} takes no RGB images of {size} pixels ({type(error).__name__}: {reason}): change --input-size "
            "or one of these flags"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(f"{what} gives {found} for two images, not logits of {classes} classes: change --model-kwargs")


def augment_once(args: argparse.Namespace, options: DataOptions, data_config: dict) -> None:
    """The training transform, each operation of its policy, and what the device does, on one small picture."""
    build_transform = fastload.build_transform if args.fast_loader else partial(datasets.build_transform, True)
    transform = build_transform(options, data_config)
    side = args.input_size if args.input_size <= 32 else min(args.input_size, 64)
    picture = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    for step in transform.transforms:  # a policy of timm draws some of its operations for each image
        for operation in (*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))):
            operation.prob = 1.0
            operation(picture)
    result = picture
    for step in build_transform(options, data_config).transforms[1:]:  # the first one crops to --input-size
        if not isinstance(step, transforms.Resize | transforms.RandomCrop):  # --src: likewise
            result = step(result)
    if args.fast_loader:
        fastload.build_device_transform(options, data_config)(result[None])


def mix_once(args: argparse.Namespace) -> None:
    """Mixing and the criterion, on a batch of two one-channel pictures."""
    classes = args.num_classes or ANY_CLASSES
    mixup = build.build_mixup(args, classes)
    targets = torch.tensor([0, classes - 1])
    if mixup is not None:
        side = min(args.input_size, 256)
        _, targets = mixup(torch.zeros(2, 1, side, side), targets)
    criterion = losses.build_criterion(mixup_active=mixup_active(args), smoothing=args.smoothing, bce=args.bce_loss)
    criterion(None, torch.zeros(2, classes), targets)


def check_optimizer(args: argparse.Namespace, model: nn.Module) -> None:
    """``--opt``, and the names and types of ``--opt-kwargs``; their values are the business of :func:`step_once`.

    Raises:
        ArgumentError: With the optimizer's own arguments.
    """
    own = optim.own_arguments(args.opt)
    if get_optimizer_info(optim.plain_name(args.opt)).second_order:
        raise ArgumentError(
            f"--opt {args.opt}: it needs second derivatives, which this training does not compute; take another"
        )
    if optim.optimizer_class(args.opt) is kron.Kron and not kron.has_opt_einsum:
        raise ArgumentError(
            f"--opt {args.opt}: without the package opt_einsum its step takes the memory of many models; install that, "
            "or take another"
        )
    listed = ", ".join(f"{name}={argument.default}" for name, argument in own.items()) or "none"
    for name, value in args.opt_kwargs.items():
        given = f"--opt-kwargs {name}={value}"
        if name in optim.FLAGS:
            raise ArgumentError(f"{given}: use {optim.FLAGS[name]}")
        if name not in own:
            near = difflib.get_close_matches(name, own, 1)
            meant = f", but {near[0]}" if near else ""
            raise ArgumentError(f"{given}: --opt {args.opt} takes no {name}{meant}; its own arguments: {listed}")
        if not own[name].takes(value):
            raise ArgumentError(f"{given}: give {own[name].wants()}; the arguments of --opt {args.opt}: {listed}")
    for pattern in args.opt_kwargs.get("fallback_list", ()):
        if not any(fnmatch(name, pattern) for name, _ in model.named_parameters()):
            raise ArgumentError(
                f"--opt-kwargs fallback_list: no parameter of --model {args.model} is named {pattern!r}"
            )


def step_once(args: argparse.Namespace) -> None:
    """Runs the optimizer: some check their arguments only in a step, some give NaN for values they should refuse."""
    probe = nn.Linear(8, 8)  # Muon treats nothing smaller than 4 x 4 as a matrix
    own = {name: value for name, value in args.opt_kwargs.items() if name != "fallback_list"}
    reduced = argparse.Namespace(**(vars(args) | {"layer_decay": None, "opt_kwargs": own}))
    optimizer = optim.build_optimizer(reduced, probe, args.lr)
    with torch.compiler.set_stance("force_eager"):  # Kron compiles its step, which takes half a minute
        for _ in range(3 if own else 1):
            for parameter in probe.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    if own and not all(parameter.isfinite().all() for parameter in probe.parameters()):
        raise ValueError("three steps of the optimizer give infinite or undefined weights")
