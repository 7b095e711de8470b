"""The optimizer's parameter groups and the learning rate of every step."""

import argparse

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

# One kernel for many parameters. Under a loss scaler it also skips a step with infinite gradients on the device; the
# other kinds let the host wait for the device at every step to know.
HAVE_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def scaled(rate: float, args: argparse.Namespace, world_size: int) -> float:
    """A rate given for 512 images a step, for the images that a step really has: it grows linearly with them."""
    return rate * args.batch_size * args.grad_accum * world_size / 512.0


def scaled_lr(args: argparse.Namespace, world_size: int) -> float:
    """``--lr``, which is for 512 images a step; with ``--unscale-lr`` for as many as there are."""
    return args.lr if args.unscale_lr else scaled(args.lr, args, world_size)


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer over two groups: no decay (1-D parameters, biases, tokens, position embeddings), then decay.

    With ``--layer-decay``: two such groups for each layer of the model's ``group_matcher``, with its ``lr_scale``.
    """
    kwargs = optimizer_kwargs(args) | {"lr": lr}
    plain_name = args.opt.lower().removeprefix("lookahead_")
    if issubclass(get_optimizer_class(plain_name, bind_defaults=False), HAVE_FUSED):
        kwargs["fused"] = True
    return create_optimizer_v2(model, **kwargs)


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
    """Puts ``lr`` into force for every group (times the group's ``lr_scale``, where layer-wise decay gave it one)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def describe_layer_decay(optimizer: torch.optim.Optimizer) -> str:
    """One line for the run's head: which parts of the plan's rate the layers get, from the stem to the head."""
    scales = sorted({group.get("lr_scale", 1.0) for group in optimizer.param_groups})
    return f"LR by layer, stem to head, in parts of the plan: {'  '.join(f'{scale:.3g}' for scale in scales)}"


def describe_plan(args: argparse.Namespace, plan: LRPlan, world_size: int) -> str:
    """Two lines for the run's head: how the base rate comes about, and the rate at the turning points of the plan."""
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
