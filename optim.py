"""The optimizer's parameter groups and the learning rate of every epoch."""

import argparse

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

# One kernel for many parameters. Under a loss scaler it also skips a step with infinite gradients on the device; the
# other kinds let the host wait for the device at every step to know.
HAVE_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def scaled_lr(args: argparse.Namespace, world_size: int) -> float:
    """``--lr`` is for 512 images a step; the rate grows linearly with the images that a step really has."""
    return args.lr * args.batch_size * args.grad_accum * world_size / 512.0


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer over two groups: no decay (1-D parameters, biases, tokens, position embeddings), then decay.

    With ``--layer-decay``: two such groups for each layer of the model's ``group_matcher``, with its ``lr_scale``.
    """
    kwargs = optimizer_kwargs(args) | {"lr": lr}
    plain_name = args.opt.lower().removeprefix("lookahead_")
    if issubclass(get_optimizer_class(plain_name, bind_defaults=False), HAVE_FUSED):
        kwargs["fused"] = True
    return create_optimizer_v2(model, **kwargs)


def lr_plan(args: argparse.Namespace, lr: float) -> list[float]:
    """The learning rate of each epoch, a function of the flags alone.

    The paper's code steps its schedule with ``step(epoch)`` after epoch ``epoch``: epoch 0 runs at the schedule's
    starting value and epoch e > 0 at its value for e - 1, so the first two epochs both run at ``--warmup-lr``.

    Args:
        args: The flags of the group "learning rate", ``epochs`` and ``seed``.
        lr: The scaled base rate.

    Returns:
        ``args.epochs`` rates.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    plan = []
    for epoch in range(args.epochs):
        plan.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    return plan


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Puts ``lr`` into force for every group (times the group's ``lr_scale``, where layer-wise decay gave it one)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def describe_layer_decay(optimizer: torch.optim.Optimizer) -> str:
    """One line for the run's head: which parts of the plan's rate the layers get, from the stem to the head."""
    scales = sorted({group.get("lr_scale", 1.0) for group in optimizer.param_groups})
    return f"LR by layer, stem to head, in parts of the plan: {'  '.join(f'{scale:.3g}' for scale in scales)}"


def describe_plan(args: argparse.Namespace, lr: float, plan: list[float], world_size: int) -> str:
    """Two lines for the run's head: how the base rate comes about, and the rate at the turning points of the plan."""
    turns = sorted(
        {0, 1, 2, args.warmup_epochs + 1, args.epochs // 4, args.epochs // 2, 3 * args.epochs // 4, args.epochs - 1}
    )
    return (
        f"LR plan: base {lr:.4g} = {args.lr:g} x {args.batch_size} images x {args.grad_accum} accumulated x "
        f"{world_size} process(es) / 512; {args.sched}, {args.warmup_epochs} epochs of warm-up\n"
        "LR by epoch: " + "  ".join(f"{epoch}: {plan[epoch]:.4g}" for epoch in turns if epoch < args.epochs)
    )
