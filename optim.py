"""The optimizer's parameter groups and the learning rate of every step."""

import argparse
import inspect
import math
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from timm.optim import Muon, create_optimizer_v2, get_optimizer_class, get_optimizer_info, optimizer_kwargs
from timm.optim.kron import Kron
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

# One kernel for many parameters. Under a loss scaler it also skips a step with infinite gradients on the device. With
# other optimizers the host has to wait for the device at every step to decide.
HAVE_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)

# Optimizer arguments that have their own flag, and the flag.
FLAGS = {
    "lr": "--lr",
    "weight_decay": "--weight-decay",
    "betas": "--opt-betas",
    "eps": "--opt-eps",
    "momentum": "--momentum",
    "layer_decay": "--layer-decay",
}
# Arguments of no use here: for CUDA graphs, gradients of the step, maximising; and for draws, see seed_draws.
NOT_HERE = ("capturable", "differentiable", "maximize", "deterministic")
MAX_OWN, MAX_NS_STEPS = 10**9, 100  # a mistyped number of iterations would take years
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def scaled(rate: float, args: argparse.Namespace, world_size: int) -> float:
    """A rate given for 512 images a step, scaled linearly to the images of this run's steps."""
    return rate * args.batch_size * args.grad_accum * world_size / 512.0


def scaled_lr(args: argparse.Namespace, world_size: int) -> float:
    """``--lr`` scaled from 512 images a step to this run's; with ``--unscale-lr`` unchanged."""
    return args.lr if args.unscale_lr else scaled(args.lr, args, world_size)


def plain_name(opt: str) -> str:
    """timm's name of an optimizer without ``lookahead_``."""
    return opt.lower().removeprefix("lookahead_")


def optimizer_class(opt: str) -> type[torch.optim.Optimizer]:
    """The class of a timm optimizer; with ``lookahead_`` that of the wrapped one.

    Raises:
        Exception: Of several kinds, if timm does not know it, or the package or device it needs is missing.
    """
    return get_optimizer_class(plain_name(opt), bind_defaults=False)


class Argument(NamedTuple):
    """An argument of an optimizer: the type that its signature declares, its default, and its largest value.

    The optimizers themselves refuse few values. An argument may be negative only if its default is.
    """

    hint: Any
    default: Any
    high: float = MAX_OWN

    def takes(self, value: Any) -> bool:
        """Whether ``value``, from the command line, is of the type and in the range."""
        return _is_of(value, self.hint) and (type(value) not in (int, float) or self._low() <= value <= self.high)

    def _low(self) -> float:
        return -self.high if type(self.default) in (int, float) and self.default < 0 else 0

    def wants(self) -> str:
        """Type and range in words: ``a whole number from 0 to 100``."""
        words = _in_words(self.hint)
        if self._low() < 0 or "number" not in words:
            return words
        return words.replace(
            "number", "number of 0 or more" if self.high == MAX_OWN else f"number from 0 to {self.high}"
        )


def own_arguments(opt: str) -> dict[str, Argument]:
    """What ``--opt-kwargs`` may hold for an optimizer: its constructor's arguments without those of :data:`FLAGS`.

    Muon also takes timm's two arguments that choose the parameters for its AdamW.
    """
    cls = optimizer_class(opt)
    hints, defaults = get_type_hints(cls.__init__), get_optimizer_info(plain_name(opt)).defaults or {}
    found = {}
    for name, parameter in list(inspect.signature(cls).parameters.items())[1:]:
        if name not in (*FLAGS, *NOT_HERE):
            kind = type(parameter.default)  # where nothing is declared; 0 may stand for any number
            hint = hints.get(name, float if kind is int else kind)
            high = MAX_NS_STEPS if name == "ns_steps" else MAX_OWN
            found[name] = Argument(hint, defaults.get(name, parameter.default), high)
    if cls is Muon:
        found["fallback_list"] = Argument(Sequence[str], ())
        found["fallback_no_weight_decay"] = Argument(bool, False)
    return found


def _is_of(value: Any, hint: Any) -> bool:
    kinds = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(value, kind) for kind in kinds)
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and len(value) == len(kinds) and all(map(_is_of, value, kinds))
    if get_origin(hint) in (list, Sequence):
        return isinstance(value, list | tuple) and all(_is_of(entry, kinds[0]) for entry in value)
    if hint is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return value in DTYPES if hint is torch.dtype and isinstance(value, str) else type(value) is hint


def _in_words(hint: Any) -> str:
    kinds = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(filter(None, map(_in_words, kinds)))
    if get_origin(hint) is tuple:
        return f"({', '.join(map(_in_words, kinds))})"
    if kinds:
        return f"a list, each {_in_words(kinds[0])}"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a word", NoneType: "None"}
    return words.get(hint, " or ".join(DTYPES) if hint is torch.dtype else "")


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer over two groups: no decay (1-D parameters, biases, tokens, position embeddings), then decay.

    With ``--layer-decay``: two such groups for each layer of the model's ``group_matcher``, with its ``lr_scale``.
    ``--opt-kwargs`` go to its constructor; names in :data:`DTYPES` become types for arguments that take a type.
    """
    kwargs = optimizer_kwargs(args) | {"lr": lr}
    cls, own = optimizer_class(args.opt), dict(args.opt_kwargs)
    if issubclass(cls, HAVE_FUSED) and not own.get("foreach"):
        kwargs["fused"] = True
    if cls is Kron:
        kwargs["deterministic"] = True  # it then draws from its own generator alone: see seed_draws
    if own:
        known = own_arguments(args.opt)
        for name, value in own.items():
            if isinstance(value, str) and torch.dtype in (known[name].hint, *get_args(known[name].hint)):
                own[name] = DTYPES.get(value, value)
    return create_optimizer_v2(model, **(kwargs | own))


def seed_draws(optimizer: torch.optim.Optimizer, *address: int) -> None:
    """Makes an optimizer's random draws of a step a function of ``address``, such as (seed, epoch, step).

    Kron is the only one that draws. Its draws must not depend on the rank, or the processes' weights would diverge.
    """
    plain = getattr(optimizer, "_base_optimizer", optimizer)
    if isinstance(plain, Kron):
        plain.rng.seed(int(np.random.SeedSequence(address, spawn_key=(2,)).generate_state(1)[0]))


class LRPlan:
    """The learning rate of each optimizer step, a function of the flags and of the step's place alone.

    The paper's code moves its schedule with ``step(epoch)`` after epoch ``epoch``: epoch 0 runs at the schedule's
    starting value and epoch e > 0 at its value for e - 1, so the first two epochs both run at ``--warmup-lr``. Its Swin
    code does the same with steps, counted from the start of the run (``--sched-on-updates``).

    Args:
        args: The flags of the group "learning rate", those that scale it, ``epochs`` and ``seed``.
        world_size: Processes of the run.
        steps_per_epoch: Optimizer steps of an epoch; used with ``--sched-on-updates`` only.
    """

    def __init__(self, args: argparse.Namespace, world_size: int, steps_per_epoch: int = 1) -> None:
        kwargs = scheduler_kwargs(args)
        if args.scale_min_lr:
            kwargs |= {name: scaled(getattr(args, name), args, world_size) for name in ("min_lr", "warmup_lr")}
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=scaled_lr(args, world_size))
        self._scheduler, _ = create_scheduler_v2(optimizer, updates_per_epoch=steps_per_epoch, **kwargs)
        self._group = optimizer.param_groups[0]
        self._start = self._group["lr"]
        self._steps_per_epoch = steps_per_epoch
        self.on_updates = args.sched_on_updates

    def __call__(self, epoch: int, step: int = 0) -> float:
        """The rate of optimizer step ``step`` of ``epoch``."""
        place = epoch * self._steps_per_epoch + step if self.on_updates else epoch
        if place == 0:
            return self._start
        move = self._scheduler.step_update if self.on_updates else self._scheduler.step
        move(place - 1)
        return self._group["lr"]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets ``lr`` for every group (times the group's ``lr_scale`` under layer-wise decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def describe_layer_decay(optimizer: torch.optim.Optimizer) -> str:
    """One line for the start of the log: the layers' fractions of the plan's rate, from the stem to the head."""
    scales = sorted({group.get("lr_scale", 1.0) for group in optimizer.param_groups})
    return f"LR by layer, stem to head, in parts of the plan: {'  '.join(f'{scale:.3g}' for scale in scales)}"


def describe_plan(args: argparse.Namespace, plan: LRPlan, world_size: int) -> str:
    """Two lines for the start of the log: how the base rate is computed, and the rate at turning points of the plan."""
    turns = sorted(
        {0, 1, 2, args.warmup_epochs + 1, args.epochs // 4, args.epochs // 2, 3 * args.epochs // 4, args.epochs - 1}
    )
    bounds = ", --min-lr and --warmup-lr scaled likewise" if args.scale_min_lr else ""
    when = "LR at the first step of epoch" if plan.on_updates else "LR by epoch"
    batch = f" x {args.batch_size} images x {args.grad_accum} accumulated x {world_size} process(es) / 512"
    if args.unscale_lr:
        batch = " whatever the batch (--unscale-lr)"
    return (
        f"LR plan: base {scaled_lr(args, world_size):.4g} = {args.lr:g}{batch}{bounds}; {args.sched}, "
        f"{args.warmup_epochs} epochs of warm-up\n"
        f"{when}: " + "  ".join(f"{epoch}: {plan(epoch):.4g}" for epoch in turns if epoch < args.epochs)
    )
