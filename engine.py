"""The loops over batches: one epoch of training, one evaluation, the forward pass's throughput."""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils import Meters, WatchedLoader

_logger = logging.getLogger(__name__)

_WAY_OUT = (
    "training stops, and the last checkpoint stays as it is, if there is one. Lower --lr, set --clip-grad 1 or use "
    "--amp-dtype bfloat16, and continue with --auto_reload"
)


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number, on any rank."""


class Ema(ModelEmaV3):
    """timm's EMA of the weights; it collects its tensors once, not from two state dicts at every step.

    The values are timm's. ``model`` must stay the same. After a move to another device, call ``forget_tensors``.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device | None = None) -> None:
        super().__init__(model, decay=decay, device=device)
        self._pairs: tuple[list[Tensor], ...] | None = None

    def forget_tensors(self) -> None:
        """Has the next update collect the tensors anew."""
        self._pairs = None

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """One step towards the weights of the unwrapped ``model``."""
        if self._pairs is None:
            ours, theirs = (m.state_dict(keep_vars=True).values() for m in (self.module, model))
            pairs = list(zip(ours, theirs, strict=True))
            self._pairs = tuple(
                [pair[i] for pair in pairs if pair[0].is_floating_point() == floating]
                for floating in (True, False)
                for i in (0, 1)
            )
        averages, values, counts, their_counts = self._pairs
        if self.device is not None:  # a copy in host memory: this waits for the device
            values = [value.to(self.device) for value in values]
        self._foreach_lerp_(averages, values, weight=1.0 - self.get_decay(step))
        for ours, theirs in zip(counts, their_counts, strict=True):
            ours.copy_(theirs)


@dataclass
class Trainer:
    """What one optimizer step consists of.

    Attributes:
        model: Maps images (B, 3, H, W) to logits; with its wrappers (DDP, compiled), ready to be called.
        bare_model: The same module unwrapped, for the EMA, the optimizer and the checkpoints.
        criterion: ``criterion(images, outputs, targets)`` -> scalar loss.
        optimizer: Holds the parameters of ``bare_model``.
        scaler: Loss scaling; a disabled one passes everything through.
        device: Where the step runs.
        amp_dtype: Precision of the forward pass; float32 switches autocast off.
        prepare: The device's part of the transform, from the loader's batch to images (B, 3, H, W); None: nothing.
        mixup: Mixes a batch of even size and turns its class indices into distributions, or None.
        ema: Moving average of the weights, or None.
        clip_grad: Largest global norm of the gradient; None or 0 clips nothing.
        grad_accum: Batches of an optimizer step.
    """

    model: nn.Module
    bare_model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    amp_dtype: torch.dtype = torch.float32
    prepare: Callable[[Tensor], Tensor] | None = None
    mixup: Mixup | None = None
    ema: Ema | None = None
    clip_grad: float | None = None
    grad_accum: int = 1


def train_one_epoch(
    trainer: Trainer,
    loader: DataLoader,
    epoch: int,
    *,
    meters: Meters,
    start_step: int = 0,
    print_freq: int = 10,
    seed_step: Callable[[int], None] = lambda step: None,
    begin_step: Callable[[int], None] = lambda optimizer_step: None,
    after_step: Callable[[int], None] = lambda steps_done: None,
) -> dict[str, float]:
    """Trains over ``loader`` once.

    Args:
        trainer: The parts of a step.
        loader: Yields (images, class indices); begins at batch ``start_step`` of the epoch.
        epoch: Named in the log and in errors.
        meters: Running means of the epoch; they already include the batches before ``start_step``.
        start_step: Batches of this epoch that an earlier process has done.
        print_freq: Batches between console lines; only there does the host wait for the device.
        seed_step: Called with the batch's number before its random draws (erasing, mixup, dropout, drop-path).
        begin_step: Called before the first batch of an optimizer step, with the step's number; sets the learning rate
            and the seed of the optimizer's draws.
        after_step: Called after each optimizer step, with the number of batches done; may save or raise.

    Returns:
        Means of ``loss`` and ``lr`` over the epoch and over all ranks.

    Raises:
        NonFiniteLossError: On all ranks together, at most ``print_freq`` batches after the loss stopped being finite.
    """
    trainer.model.train()
    trainer.optimizer.zero_grad(set_to_none=True)
    watched = WatchedLoader(loader)
    console = _Console(f"Epoch: [{epoch}]", watched, print_freq, trainer.device, start_step)
    finite = _FiniteLossGuard(trainer.device)
    last = console.total - 1

    step = start_step
    for step, (images, targets) in enumerate(watched, start=start_step):
        seed_step(step)
        images = images.to(trainer.device, non_blocking=True)
        targets = targets.to(trainer.device, non_blocking=True)
        group_start = step - step % trainer.grad_accum  # the last group of an epoch may be smaller
        group_end = min(group_start + trainer.grad_accum - 1, last)
        if step == group_start:
            begin_step(step // trainer.grad_accum)
        loss = forward_backward(trainer, images, targets, sync=step == group_end, parts=group_end - group_start + 1)
        if step == group_end:
            optimizer_step(trainer)

        finite.watch(loss, step)
        rate = max(group["lr"] for group in trainer.optimizer.param_groups)  # the head's, where layers differ
        meters.update(len(images), loss=loss, lr=rate)
        console.count(len(images))
        if console.due(step) or step == last:
            finite.check(epoch)
            console.line(step, meters)
        if step == group_end:
            after_step(step + 1)
    finite.check(epoch)
    means = meters.means()
    _logger.info("Averaged stats: " + "  ".join(f"{name}: {value:.6g}" for name, value in means.items()))
    return means


def forward_backward(trainer: Trainer, images: Tensor, targets: Tensor, *, sync: bool = True, parts: int = 1) -> Tensor:
    """Adds a batch's gradient, divided by ``parts``; returns the loss. Ranks exchange gradients only with ``sync``."""
    if trainer.prepare is not None:
        images = trainer.prepare(images)
    if trainer.mixup is not None:
        images, targets = trainer.mixup(images, targets)
    skip_exchange = trainer.model.no_sync if not sync and hasattr(trainer.model, "no_sync") else nullcontext
    with skip_exchange():
        with torch.autocast(trainer.device.type, trainer.amp_dtype, enabled=trainer.amp_dtype != torch.float32):
            loss = trainer.criterion(images, trainer.model(images), targets)
        trainer.scaler.scale(loss / parts).backward()
    return loss.detach()


def optimizer_step(trainer: Trainer) -> None:
    """Clips the gradients, takes the step, clears the gradients and updates the EMA."""
    if trainer.clip_grad:
        trainer.scaler.unscale_(trainer.optimizer)
        nn.utils.clip_grad_norm_(trainer.bare_model.parameters(), trainer.clip_grad)
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.ema is not None:
        trainer.ema.update(trainer.bare_model)


class _Evaluator(ClassificationEvaluator):
    """timm's evaluator; it also counts accuracy on ReaL labels if targets have them (see ``readers.real_labels``)."""

    def reset(self) -> None:
        super().reset()
        self.real = torch.zeros(2, dtype=torch.int64, device=self.device)  # images with ReaL labels; correct ones

    def update(self, output: Tensor, target: Tensor) -> None:
        """Adds a batch: logits (B, classes); targets (B,) or, with ReaL labels after the plain one, (B, 1 + labels)."""
        if target.ndim == 1:
            super().update(output, target)
            return
        before = self.num_samples
        super().update(output, target[:, 0])
        kept = self.num_samples - before  # the rest is a sampler's padding
        real = target[:kept, 1:]
        predicted = output[:kept].float().topk(min(5, output.shape[1])).indices[:, :1]  # the same as timm's top-1
        self.real += torch.stack([(real >= 0).any(1).sum(), (real == predicted).any(1).sum()])

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """timm's numbers, and with ReaL labels ``real`` (percent) and ``real_images``."""
        total, real = super().compute(distributed), self.real.clone()
        if distributed:
            dist.all_reduce(real)
        images, correct = real.tolist()
        return total | {"real": 100 * correct / images, "real_images": images} if images else total


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    amp_dtype: torch.dtype = torch.float32,
    print_freq: int = 10,
    shared: bool = True,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Loss and accuracy over the whole data set, exact for any number of processes and any batch size.

    The ranks exchange sums, not means, once at the end. Images that a sampler repeats to give every rank equally many
    are not counted.

    Args:
        model: Unwrapped, so that ranks with fewer batches wait for nobody.
        loader: Yields (images, class indices), or the targets of ``readers.real_labels.WithRealLabels``.
        device: Where the forward pass runs.
        prepare: As in :class:`Trainer`.
        amp_dtype: Precision of the forward pass; float32 switches autocast off.
        print_freq: Batches between console lines.
        shared: Whether the ranks' loaders share one data set; otherwise each has all of it.
        after_step: Called after each batch; may raise.

    Returns:
        ``loss`` (cross entropy, nats), ``acc1`` and ``acc5`` (percent; with fewer than five classes all of them count).
        If targets have ReaL labels, also ``real_acc1`` (percent) over the ``real_images`` that have any.
    """
    model.eval()
    evaluator = _Evaluator(device, max_samples=evaluation_sample_limit(loader))
    watched = WatchedLoader(loader)
    console = _Console("Test:", watched, print_freq, device)
    for step, (images, targets) in enumerate(watched):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if prepare is not None:
            images = prepare(images)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            logits = model(images)
        evaluator.update(logits, targets)
        console.count(len(images))
        if console.due(step) or step == len(loader) - 1:
            console.line(step, None, "  ".join(f"{name}: {value:.4f}" for name, value in evaluator.summary().items()))
        after_step()
    total = evaluator.compute(distributed=shared and dist.is_initialized())
    real = {"real_acc1": total["real"], "real_images": total["real_images"]} if "real" in total else {}
    beside = f" ReaL@1 {real['real_acc1']:.3f}" if real else ""
    _logger.info(f"* Acc@1 {total['top1']:.3f} Acc@5 {total['top5']:.3f}{beside} loss {total['loss']:.3f}")
    return {"loss": total["loss"], "acc1": total["top1"], "acc5": total["top5"]} | real


@torch.inference_mode()
def throughput(
    model: nn.Module, images: Tensor, *, amp_dtype: torch.dtype = torch.float32, warmup: int = 10, steps: int = 30
) -> float:
    """Images per second of the forward pass over one batch that is on the device already.

    Args:
        model: Is put into evaluation mode.
        images: Shape (B, 3, H, W).
        amp_dtype: Precision; float32 switches autocast off.
        warmup: Passes before the clock starts.
        steps: Passes that are timed.
    """
    model.eval()
    device = images.device
    with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
        for _ in range(warmup):
            model(images)
        _wait_for(device)
        start = time.perf_counter()
        for _ in range(steps):
            model(images)
        _wait_for(device)
    return steps * len(images) / (time.perf_counter() - start)


def check_weights_are_finite(model: nn.Module, epoch: int, step: int) -> None:
    """Waits for the device and checks every parameter: even a finite loss can lead to weights that are not finite.

    Raises:
        NonFiniteLossError: If a parameter holds an infinity or a NaN.
    """
    parameters = list(model.parameters())
    if not torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all():
        raise NonFiniteLossError(f"the weights are not finite after epoch {epoch}, step {step}: {_WAY_OUT}")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _FiniteLossGuard:
    """Keeps on the device the first step whose loss was not finite; ``check`` reads it, on all ranks at once."""

    NEVER = 2**62

    def __init__(self, device: torch.device) -> None:
        self.first_bad = torch.full((), self.NEVER, dtype=torch.int64, device=device)

    def watch(self, loss: Tensor, step: int) -> None:
        self.first_bad = torch.where(torch.isfinite(loss), self.first_bad, self.first_bad.clamp(max=step))

    def check(self, epoch: int) -> None:
        if dist.is_initialized():
            dist.all_reduce(self.first_bad, op=dist.ReduceOp.MIN)
        step = int(self.first_bad)
        if step != self.NEVER:
            raise NonFiniteLossError(f"the loss is not finite since epoch {epoch}, step {step}: {_WAY_OUT}")


class _Console:
    """Progress lines in DeiT's form, with images/s over all ranks of the interval since the last line."""

    def __init__(
        self, header: str, loader: WatchedLoader, print_freq: int, device: torch.device, start_step: int = 0
    ) -> None:
        self.header, self.loader, self.print_freq, self.device = header, loader, print_freq, device
        self.total = start_step + len(loader)
        self.images = self.steps = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    def count(self, images: int) -> None:
        self.images += images
        self.steps += 1

    def due(self, step: int) -> bool:
        return step % self.print_freq == 0

    def line(self, step: int, meters: Meters | None, values: str = "") -> None:
        """Writes the line of ``step``. Reading the meters waits for the device."""
        if meters is not None:
            values = "  ".join(f"{name}: {now:.6f} ({mean:.6f})" for name, (now, mean) in meters.recent().items())
        elapsed = time.perf_counter() - self.since
        steps = max(self.steps, 1)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        eta = timedelta(seconds=int(elapsed / steps * (self.total - step - 1)))
        memory = ""
        if self.device.type == "cuda":
            memory = f"  max mem: {torch.cuda.max_memory_allocated(self.device) / 2**20:.0f} MB"
        _logger.info(
            f"{self.header}  [{step:>{len(str(self.total))}}/{self.total}]  eta: {eta}  {values}  "
            f"time: {elapsed / steps:.4f}  data: {(self.loader.waited - self.waited) / steps:.4f}  "
            f"images/s: {ranks * self.images / max(elapsed, 1e-9):.1f}{memory}"
        )
        self.images = self.steps = 0
        self.waited = self.loader.waited
        self.since = time.perf_counter()
