"""The loop over epochs: train, evaluate, log, save; and what a signal or ``--checkpoint-steps`` adds."""

import argparse
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

import checkpoints
import datasets
import efficiency
import engine
import optim
import reporting
import tracing
import utils
import writers
from build import Loaders, Start
from oversmoothing import remedies_of
from utils import WatchedLoader, World

_logger = logging.getLogger(__name__)


def fit(
    args: argparse.Namespace,
    start: Start,
    trainer: engine.Trainer,
    loaders: Loaders,
    world: World,
    about: list[str] | None = None,
) -> None:
    """Trains from ``start`` to ``--epochs``: train one epoch at the plan's learning rates, evaluate, log, save.

    ``about`` are lines on the run, its environment and its model, for TensorBoard's text page.
    """
    loader_train, loader_val = loaders.train, loaders.val
    plan = optim.LRPlan(args, world.world_size, math.ceil(len(loader_train) / args.grad_accum))
    effective = loader_train.batch_size * args.grad_accum * world.world_size
    _logger.info(f"effective batch: {effective} images; {len(loader_train)} batches an epoch on each process")
    _logger.info(optim.describe_plan(args, plan, world.world_size))
    if args.layer_decay is not None:
        _logger.info(optim.describe_layer_decay(trainer.optimizer))
    if args.output_dir and world.is_main:
        checkpoints.discard_abandoned(Path(args.output_dir))  # a run killed within its last save saves nothing more
    if start.epoch >= args.epochs:
        _logger.info(
            f"nothing left to train: {start.source} has finished epoch {start.epoch - 1} of --epochs {args.epochs}"
        )
        return
    start, data = check_images(start, loader_train, world)
    recorder = None
    if args.output_dir:
        recorder = utils.on_rank_zero(
            world, lambda: open_recorder(args, start, trainer, loaders, effective, about or [])
        )
    saver = Saver(args, trainer, world, start.max_accuracy, data)
    stop = utils.StopSignal(world, args.dist_timeout)
    use = efficiency.Efficiency(trainer.bare_model, args.input_size, trainer.device, trainer.amp_dtype)
    to_trace = args.profile if world.is_main else 0
    began = time.time()

    for epoch in range(start.epoch, args.epochs):
        first_step, sums = (start.step, start.meters) if epoch == start.epoch else (0, None)
        meters = utils.Meters(world.device, sums)
        loader_train.sampler.set_epoch(epoch, start=first_step * loader_train.batch_size)
        steps = first_step + len(loader_train)
        if first_step:  # an epoch that was stopped after its last batch is saved with that batch's rate
            begin_step(trainer, plan, args.seed, epoch, (first_step - 1) // args.grad_accum)
        after_step = partial(save_or_stop, args, saver, stop, epoch, meters)
        tracer = None
        if to_trace and len(loader_train):
            tracer = open_tracer(args, trainer, epoch, first_step, math.ceil(len(loader_train) / args.grad_accum))
            after_step, to_trace = tracer.before(after_step), 0
        watched = WatchedLoader(loader_train)
        epoch_began = time.time()
        with tracer or nullcontext():
            train_stats = engine.train_one_epoch(
                trainer,
                watched,
                epoch,
                meters=meters,
                start_step=first_step,
                print_freq=args.print_freq,
                seed_step=partial(utils.seed_everything, args.seed, world.rank, epoch),
                begin_step=partial(begin_step, trainer, plan, args.seed, epoch),
                after_step=after_step,
            )
        seconds = time.time() - epoch_began
        images = len(loader_train) * loader_train.batch_size
        speed = {"time/train_images_per_s": images * world.world_size / seconds}
        if images:  # not after a resume behind the last batch
            speed |= (used := use.epoch(images, seconds, watched.waited))
            _logger.info(efficiency.describe(used))
        ema = trainer.ema if args.eval_ema else None
        leave_if_asked = partial(stop_if_asked, args, saver, stop, epoch, meters, steps)
        evaluate = partial(
            evaluate_with_ema,
            args,
            trainer.bare_model,
            ema,
            world=world,
            amp_dtype=trainer.amp_dtype,
            prepare=loaders.prepare_eval,
        )
        val_stats = {}
        if loaders.held_out is not None:
            val_stats = evaluate(loader=loaders.held_out, after_step=leave_if_asked, images="held-out")
        test_stats = evaluate(loader=loader_val, after_step=leave_if_asked)

        best = saver.note(val_stats or test_stats)
        _logger.info(f"Max accuracy: {saver.max_accuracy['acc1']:.2f}%" + " of the held-out images" * bool(val_stats))
        line = {f"train_{name}": value for name, value in train_stats.items()}
        line |= {f"val_{name}": value for name, value in val_stats.items()}
        line |= {f"test_{name}": value for name, value in test_stats.items()}
        line |= {"epoch": epoch, "n_parameters": reporting.count_parameters(trainer.bare_model)}
        if args.output_dir:
            record(recorder, world, line, trainer.bare_model, speed)
        saver.save(epoch, is_best=best)
    if args.output_dir:
        utils.on_rank_zero(world, lambda: recorder.finish())
    _logger.info(f"Training time {timedelta(seconds=int(time.time() - began))}")


def check_images(start: Start, loader_train: DataLoader, world: World) -> tuple[Start, dict[str, Any]]:
    """Compares the training images with the checkpoint's; an epoch can only be continued on the same images.

    Returns:
        The start (at the beginning of its epoch if they differ), and ``datasets.fingerprint`` of the images.

    Raises:
        SetupError: On all ranks, if the ranks do not have the same images.
    """
    data = datasets.fingerprint(loader_train.dataset)
    utils.check_agreement(world, "the list of training images", data, "--data-path")
    then = (start.checkpoint or {}).get("data") if start.full else None
    if then not in (None, data):
        _logger.warning(
            f"{start.source} was trained on {then['images']} images, --data-path has {data['images']} or others: from "
            f"epoch {start.epoch} on, the run differs from the uninterrupted one"
        )
    if start.step and (then not in (None, data) or start.step > len(loader_train)):
        _logger.warning(f"epoch {start.epoch} begins again: its first {start.step} batches were of other images")
        start = replace(start, step=0, meters=None)
    return start, data


def begin_step(trainer: engine.Trainer, plan: optim.LRPlan, seed: int, epoch: int, step: int) -> None:
    """Sets the plan's rate for optimizer step ``step`` of ``epoch``, and the seed of the optimizer's draws."""
    optim.set_lr(trainer.optimizer, plan(epoch, step))
    optim.seed_draws(trainer.optimizer, seed, epoch, step)


def open_recorder(
    args: argparse.Namespace,
    start: Start,
    trainer: engine.Trainer,
    loaders: Loaders,
    effective_batch: int,
    about: list[str],
) -> reporting.Recorder:
    """Rank 0's recorder, with what ``--spectrum-every`` and ``--log-wandb`` ask for; describes a run that begins."""
    model = trainer.bare_model
    watch = reporting.watch_spectrum(
        model, args.model, loaders.val.dataset, args.spectrum_every, prepare=loaders.prepare_eval, device=trainer.device
    )
    open_wandb = partial(
        writers.WandbWriter,
        project=args.wandb_project,
        tags=args.wandb_tags,
        resume_id=args.wandb_resume_id,
        config=vars(args) | {"effective_batch": effective_batch},
        wait_s=min(60, args.dist_timeout / 2),
    )
    recorder = reporting.Recorder(
        args.output_dir,
        start.epoch,
        fresh=not start.full,
        watch=watch,
        chosen_by="test_acc1" if loaders.held_out is None else "val_acc1",
        open_wandb=open_wandb if args.log_wandb else None,
    )
    if recorder.begins:
        data_config = resolve_data_config({}, model=model)
        recorder.describe(
            reporting.run_page(args, about),
            reporting.charts(model, watched=watch is not None),
            reporting.hyper_parameters(args, effective_batch),
            reporting.sample_sheet(loaders.train, loaders.prepare, data_config, trainer.device, args.seed),
        )
    return recorder


def open_tracer(
    args: argparse.Namespace, trainer: engine.Trainer, epoch: int, first_step: int, steps: int
) -> tracing.Tracer:
    """The tracer of ``--profile``, for an epoch with ``steps`` optimizer steps left."""
    file = Path(args.output_dir) / "profile" / f"epoch-{epoch}-from-step-{first_step}.json.gz"
    return tracing.Tracer(file, args.profile, steps, trainer.device)


def record(
    recorder: reporting.Recorder | None, world: World, line: dict, model: nn.Module, speed: dict[str, float]
) -> None:
    """Lets rank 0, which has the recorder, write an epoch. This comes before its checkpoint: see ``EpochLog``."""
    utils.on_rank_zero(world, lambda: recorder.epoch(line, model, speed))


def save_or_stop(
    args: argparse.Namespace, saver: "Saver", stop: utils.StopSignal, epoch: int, meters: utils.Meters, done: int
) -> None:
    """After ``done`` batches of ``epoch``: save and leave if a signal came, save if ``--checkpoint-steps`` says so.

    Raises:
        Preempted: On all ranks together, after the save.
    """
    stop_if_asked(args, saver, stop, epoch, meters, done)
    every = args.checkpoint_steps * args.grad_accum
    if every and done % every == 0:
        saver.save(epoch - 1, step=done, meters=meters)


def stop_if_asked(
    args: argparse.Namespace, saver: "Saver", stop: utils.StopSignal, epoch: int, meters: utils.Meters, done: int
) -> None:
    """Saves and leaves if a signal came; if all batches are done, a resumed run goes on with the evaluation.

    Raises:
        Preempted: On all ranks together, after the save.
    """
    if stop.agreed():
        saver.save(epoch - 1, step=done, meters=meters)
        way_on = "; the same command with --auto_reload continues from there" if args.output_dir else ""
        raise utils.Preempted(f"stopped by a signal after epoch {epoch}, step {done - 1}{way_on}")


class Saver:
    """Assembles and writes the run's checkpoints; knows its best accuracies."""

    def __init__(
        self, args: argparse.Namespace, trainer: engine.Trainer, world: World, max_accuracy: dict, data: dict
    ) -> None:
        # The model's remedies, whether from flags or from a checkpoint: they are needed to rebuild it.
        remedies = {"remedy": remedies_of(trainer.bare_model), "remedy_kwargs": {}}
        self.args = argparse.Namespace(**(vars(args) | {"world_size": world.world_size} | remedies))
        self.trainer, self.world, self.max_accuracy, self.data = trainer, world, max_accuracy, data

    def note(self, stats: dict[str, float]) -> bool:
        """Updates the best accuracies; returns whether this ``acc1`` is the best so far."""
        best = stats["acc1"] > self.max_accuracy.get("acc1", -math.inf)
        for name in ("acc1", "ema_acc1"):
            if name in stats:
                self.max_accuracy[name] = max(stats[name], self.max_accuracy.get(name, -math.inf))
        return best

    def save(self, epoch: int, *, step: int = 0, meters: utils.Meters | None = None, is_best: bool = False) -> None:
        """Writes the state after ``epoch`` and ``step`` further batches. A collective: it gathers the ranks' meters.

        Raises:
            NonFiniteLossError: On all ranks, if a weight is not finite; the checkpoint on disk stays as it is.
            CheckpointError: On all ranks, if the file cannot be written; likewise.
        """
        if not self.args.output_dir:
            return
        engine.check_weights_are_finite(self.trainer.bare_model, epoch + (step > 0), step)
        sums = [meters.state() if meters is not None else {}] * self.world.world_size
        if self.world.distributed:
            dist.all_gather_object(sums, sums[0])

        def write() -> None:
            ema = self.trainer.ema
            checkpoint = checkpoints.assemble(
                model=self.trainer.bare_model,
                model_ema=ema.module if ema is not None else None,
                optimizer=self.trainer.optimizer,
                scaler=self.trainer.scaler if self.trainer.scaler.is_enabled() else None,
                epoch=epoch,
                step=step,
                meters={str(rank): state for rank, state in enumerate(sums)},
                max_accuracy=self.max_accuracy,
                args=self.args,
                data=self.data,
            )
            checkpoints.save(checkpoint, self.args.output_dir, is_best=is_best, keep=self.args.keep_checkpoints)

        utils.on_rank_zero(self.world, write)


def evaluate_with_ema(
    args: argparse.Namespace,
    model: nn.Module,
    ema: engine.Ema | None,
    loader: DataLoader,
    world: World,
    amp_dtype: torch.dtype,
    prepare: Callable[[Tensor], Tensor] | None = None,
    after_step: Callable[[], None] = lambda: None,
    images: str = "test",
) -> dict[str, float]:
    """Accuracy of the model and, if there is one, of its EMA: what ``engine.evaluate`` returns, and ``ema_*``.

    ``prepare`` is the device's part of the transform. ``after_step`` is called after each batch, equally often on every
    rank, and may raise. ``images`` is what the log calls the images.
    """
    stats = {}
    for prefix, network in (("", model), ("ema_", ema.module if ema is not None else None)):
        if network is None:
            continue
        home = next(network.parameters()).device  # host memory with --model-ema-force-cpu
        try:
            result = engine.evaluate(
                network.to(world.device),
                loader,
                world.device,
                prepare=prepare,
                amp_dtype=amp_dtype,
                print_freq=args.print_freq,
                shared=args.shard_eval,
                after_step=after_step,
            )
        finally:
            network.to(home)
            if prefix:
                ema.forget_tensors()  # a move replaces buffers
        of = "EMA" if prefix else "network"
        _logger.info(f"Accuracy of the {of} on the {len(loader.dataset)} {images} images: {result['acc1']:.3f}%")
        if not math.isfinite(result["loss"]):
            _logger.warning(
                f"the {of}'s loss on these images is not finite: its weights are infinite or NaN, or its activations "
                "are in this precision (--amp-dtype)"
            )
        if "real_acc1" in result:
            count, accuracy = result["real_images"], result["real_acc1"]
            _logger.info(f"ReaL accuracy of the {of} on the {count} of them with ReaL labels: {accuracy:.3f}%")
        stats |= {prefix + name: value for name, value in result.items()}
    return stats
