"""Builds what a run is made of from the parsed arguments: its starting point, model, data loaders and trainer."""

import argparse
import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import Mixup, resolve_data_config
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import checkpoints
import datasets
import engine
import fastload
import losses
import models  # noqa: F401  (registers the zoo with timm)
import optim
import oversmoothing
import samplers
import utils
from datasets import DataOptions
from options import ArgumentError, mixup_active
from oversmoothing.weights import (
    CheckpointError,
    check_model_name,
    create_model,
    load_weights,
    number_of_classes,
    read_checkpoint,
    trained_with,
)
from oversmoothing.weights.model import BUILDER_ARGUMENTS
from readers.loader import build_loader, start_workers
from readers.real_labels import CLASSES as REAL_CLASSES
from utils import World

_logger = logging.getLogger(__name__)

MAX_EVAL_BATCH = 256  # images


# Flags that decide the order of the images and their augmentation, besides the number of processes.
ORDER_FLAGS = (
    *("batch_size", "grad_accum", "seed", "fast_loader", "val_split", "val_split_seed"),
    *("repeated_aug", "repeated_aug_local"),
)


@dataclass(frozen=True)
class Start:
    """Where a run begins: fresh, from pretrained weights, or resumed."""

    source: str = ""
    checkpoint: dict | None = None
    full: bool = False  # the checkpoint is a whole training state, not only weights
    epoch: int = 0
    step: int = 0  # batches done in that epoch
    meters: dict | None = None  # running sums of those batches on this rank
    max_accuracy: dict = field(default_factory=dict)


def find_start(args: argparse.Namespace) -> Start:
    """The file that the run begins with, read and checked; ``--output_dir``'s own checkpoint wins over ``--resume``."""
    if args.auto_reload and args.output_dir and Path(args.output_dir).is_dir():
        found = checkpoints.latest(args.output_dir)
        if found is not None:
            path, checkpoint = found
            ignored = f" (--resume {args.resume} is ignored)" if args.resume else ""
            _logger.info(f"auto-reload: continuing from {path}{ignored}")
            return Start(str(path), checkpoint)
    source = args.resume or args.finetune
    return Start(source, read_checkpoint(source)) if source else Start()


def num_classes(args: argparse.Namespace, start: Start) -> int:
    """Classes of the head: ``--num-classes``, else counted from the data set.

    A tree with only some of a named data set's classes (ImageNet's 1,000, say) gets a head for those. A resumed
    checkpoint with the data set's full head keeps it.
    """
    if args.num_classes is not None and args.throughput:
        return args.num_classes
    resumed = start.checkpoint is not None and not args.finetune
    of_head = number_of_classes(start.checkpoint["model"]) if resumed else None
    if args.throughput:
        return of_head or 1000
    counted = datasets.count_classes(DataOptions.from_args(args), is_train=not args.eval)
    if args.num_classes is not None:
        if args.num_classes < counted:
            raise ArgumentError(
                f"--num-classes {args.num_classes}: --data-path {args.data_path} holds {counted} classes; give "
                f"{counted} or more, or leave it out"
            )
        return args.num_classes
    nominal = datasets.NOMINAL_CLASSES.get(args.data_set)
    if nominal in (None, counted):
        return counted
    if of_head == nominal:
        _logger.warning(
            f"--data-path {args.data_path} holds {counted} of {args.data_set}'s {nominal} classes; the model keeps "
            f"the {nominal} of {start.source}. Accuracy means something only if these folders are its first classes"
        )
        return nominal
    _logger.warning(
        f"--data-path {args.data_path} holds {counted} classes, {args.data_set} {nominal}: a head for {counted}"
    )
    return counted


def check_model_names(args: argparse.Namespace) -> None:
    """Refuses unknown models before anything is read.

    Raises:
        ModelError: With similar names.
    """
    check_model_name(args.model)
    if args.distillation_type != "none":
        check_model_name(args.teacher_model, "--teacher-model")


def remedies(args: argparse.Namespace, start: Start) -> dict[str, dict[str, Any]]:
    """Names and options of ``--remedy``; without it, those of the checkpoint the run starts from.

    Raises:
        ArgumentError: If an option belongs to none of them.
    """
    try:
        chosen = oversmoothing.remedy_options(args.remedy, args.remedy_kwargs)
    except oversmoothing.RemedyError as error:
        raise ArgumentError(f"--remedy {' '.join(args.remedy)} --remedy-kwargs: {error}") from error
    trained = trained_with(start.checkpoint) if start.checkpoint else {}
    if chosen or trained.get("model") != args.model or not trained.get("remedy"):
        return chosen
    _logger.info(f"--remedy {' '.join(trained['remedy'])}, as {start.source} was trained with it")
    return trained["remedy"]


def build_model(args: argparse.Namespace, classes: int, start: Start = Start()) -> nn.Module:
    """The model of ``--model`` with its remedies (see :func:`remedies`).

    As in the paper's code, ``--drop`` sets ``pos_drop_rate`` and ``proj_drop_rate``, not ``drop_rate`` (the head).
    """
    kwargs = {}
    if args.drop:
        kwargs |= {"pos_drop_rate": args.drop, "proj_drop_rate": args.drop}
    if args.drop_path:
        kwargs["drop_path_rate"] = args.drop_path
    if not_constructors := sorted(BUILDER_ARGUMENTS & args.model_kwargs.keys()):
        raise ArgumentError(
            f"--model-kwargs {not_constructors[0]}=...: not an argument of the model's constructor; weights come from "
            "--finetune or --resume, the input size from --input-size"
        )
    kwargs |= args.model_kwargs
    model = create_model(
        args.model, num_classes=classes, input_size=args.input_size, model_kwargs=kwargs, remedies=remedies(args, start)
    )
    if args.distillation_type != "none":
        if not hasattr(model, "set_distilled_training"):
            raise ArgumentError(
                f"--distillation-type {args.distillation_type}: --model {args.model} has no distillation token; take a "
                "deit_*_distilled_* student"
            )
        model.set_distilled_training(True)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def load_start(args: argparse.Namespace, start: Start, model: nn.Module, world: World) -> Start:
    """Loads the checkpoint's weights into ``model``; returns the start with its epoch and step."""
    saved = start.checkpoint or {}
    found = (start.source, saved.get("epoch"), saved.get("step"))
    utils.check_agreement(world, "the checkpoint found (file, epoch, step)", found)
    if start.checkpoint is None:
        if args.eval:
            raise ArgumentError(
                f"--eval --auto_reload: --output_dir {args.output_dir} holds no checkpoint to evaluate; give a run's "
                "folder, or --resume FILE"
            )
        return replace(start, epoch=args.start_epoch)
    finetune = bool(args.finetune) and start.source == args.finetune
    classes = number_of_classes(start.checkpoint["model"])
    if args.eval and finetune and classes not in (None, model.num_classes):
        raise ArgumentError(
            f"--eval --finetune {args.finetune}: the file's head has {classes} classes, the model {model.num_classes}: "
            "a new head has nothing to evaluate; train it first, or give --data-set and --num-classes of the file"
        )
    if args.real_labels and model.num_classes != REAL_CLASSES:
        raise ArgumentError(
            f"--real-labels {args.real_labels}: the model has {model.num_classes} classes; ReaL's labels are those of "
            f"ImageNet's {REAL_CLASSES:,}"
        )
    missing = load_weights(
        model,
        start.checkpoint["model"],
        source=start.source,
        finetune=finetune,
        may_be_missing=oversmoothing.is_remedy_parameter,
    )
    if finetune or not checkpoints.can_resume(start.checkpoint, missing):
        if not args.eval:
            _logger.info(f"{start.source}: weights only, training starts at epoch {args.start_epoch}")
        return replace(start, epoch=args.start_epoch)
    epoch, step, meters = saved["epoch"] + 1, saved.get("step", 0), None
    start = replace(start, full=True, epoch=epoch, max_accuracy=dict(saved.get("max_accuracy") or {}))
    if args.eval or args.throughput:  # no training follows, so nothing can differ
        return start
    then = {"repeated_aug_local": False} | (saved.get("args") or {})  # what had no such flag was dealt out as DeiT's
    now = {name: getattr(args, name) for name in ORDER_FLAGS} | {"world_size": world.world_size}
    changed = {name: f"{then[name]} -> {now[name]}" for name in now if then.get(name) not in (None, now[name])}
    if changed:
        _logger.warning(
            f"resuming {start.source} with {changed}: from epoch {epoch} on, the order of the images, their "
            "augmentation and the scaled learning rate differ from the uninterrupted run"
        )
    if step and changed.keys() - {"fast_loader"}:
        _logger.warning(f"epoch {epoch} starts again: its first {step} batches were drawn in another way")
        step = 0
    if step:
        meters = (saved.get("meters") or {}).get(str(world.rank))
        if meters is None:
            raise CheckpointError(
                f"{start.source}: was saved within epoch {epoch}, but has no sums of rank {world.rank}: take another "
                "checkpoint of that run"
            )
    return replace(start, step=step, meters=meters)


def amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """``--amp-dtype``, or the device's own: float16 on CUDA as the paper's runs, float32 on CPU."""
    return getattr(torch, args.amp_dtype or ("float16" if device.type == "cuda" else "float32"))


def build_ema(args: argparse.Namespace, start: Start, model: nn.Module) -> engine.Ema | None:
    """The EMA of the weights: when resuming or evaluating the checkpoint's, if it has one; else a copy of the model."""
    saved = start.checkpoint.get("model_ema") if start.checkpoint else None
    if args.eval and args.eval_ema and saved is None:
        raise ArgumentError(f"--eval-ema: {start.source} holds no EMA of the weights")
    if not (args.eval_ema if args.eval else args.model_ema):
        return None
    device = torch.device("cpu") if args.model_ema_force_cpu else None
    ema = engine.Ema(model, decay=args.model_ema_decay, device=device)
    if saved is not None and (start.full or args.eval):
        load_weights(ema.module, saved, source=f"{start.source} (EMA)")
    return ema


def release_weights(start: Start) -> None:
    """Drops the checkpoint's tensors, several times the model's size: model, EMA and optimizer have taken them over."""
    for name in ("model", "model_ema", "optimizer"):
        (start.checkpoint or {}).pop(name, None)


def build_trainer(
    args: argparse.Namespace,
    start: Start,
    model: nn.Module,
    ema: engine.Ema | None,
    world: World,
    amp_dtype: torch.dtype,
    prepare: nn.Module | None = None,
) -> engine.Trainer:
    """Optimizer, loss, mixing and wrappers around the loaded model; ``prepare`` is from :class:`Loaders`."""
    optimizer = optim.build_optimizer(args, model, optim.scaled_lr(args, world.world_size))
    scaler = torch.amp.GradScaler(world.device.type, enabled=amp_dtype == torch.float16)
    if start.full:
        checkpoints.load_optimizer(
            optimizer, start.checkpoint["optimizer"], start.checkpoint.get("optimizer_class"), start.source
        )
        if start.checkpoint.get("scaler"):
            scaler.load_state_dict(start.checkpoint["scaler"])
    mixup = build_mixup(args, model.num_classes)
    teacher = build_teacher(args, model.num_classes, world.device)
    criterion = losses.build_criterion(
        mixup_active=mixup is not None,
        smoothing=args.smoothing,
        bce=args.bce_loss,
        teacher=teacher,
        distillation_type=args.distillation_type,
        alpha=args.distillation_alpha,
        tau=args.distillation_tau,
    )
    if args.torchcompile:
        model.compile(mode=args.torchcompile)  # in place: names of parameters stay as they are
    wrapped = model
    if world.distributed:
        wrapped = DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,
            # After a process's first step DDP regroups the gradients. With three or more processes, gloo then adds the
            # ranks in another order, so a resumed run would differ in the last bits. This flag switches regrouping off.
            find_unused_parameters=world.device.type == "cpu" and world.world_size > 2,
        )
    return engine.Trainer(
        model=wrapped,
        bare_model=model,
        criterion=criterion,
        optimizer=optimizer,
        scaler=scaler,
        device=world.device,
        amp_dtype=amp_dtype,
        prepare=prepare,
        mixup=mixup,
        ema=ema,
        clip_grad=args.clip_grad,
        grad_accum=args.grad_accum,
    )


def build_mixup(args: argparse.Namespace, classes: int) -> Mixup | None:
    """timm's mixup and CutMix of a batch's images and targets; None if both are off."""
    if not mixup_active(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=classes,
    )


def create_teacher(args: argparse.Namespace, classes: int) -> nn.Module:
    """The teacher of ``--teacher-model``, without its weights."""
    return create_model(args.teacher_model, num_classes=classes)


def build_teacher(args: argparse.Namespace, classes: int, device: torch.device) -> nn.Module | None:
    """The frozen teacher of ``--distillation-type``, with the weights of ``--teacher-path``."""
    if args.distillation_type == "none":
        return None
    teacher = create_teacher(args, classes)
    load_weights(teacher, read_checkpoint(args.teacher_path)["model"], source=args.teacher_path)
    if device.type == "cuda":  # the recipe's teacher is a convolutional network, always fed the same shape
        torch.backends.cudnn.benchmark = True
        teacher = teacher.to(memory_format=torch.channels_last)
    return teacher.to(device).eval().requires_grad_(False)


class Loaders(NamedTuple):
    """This rank's batches."""

    train: DataLoader | None  # None with --eval
    val: DataLoader
    prepare: nn.Module | None  # the device's part of the training transform, applied to a batch first
    prepare_eval: nn.Module | None  # the same for batches of val and held_out
    held_out: DataLoader | None = None  # training images that --val-split keeps from training


def build_loaders(args: argparse.Namespace, model: nn.Module, world: World) -> Loaders:
    """This rank's share of the training and evaluation images, transformed for ``model`` (which may be on any device).

    By default the loaders yield bytes, and the device normalises them (and, for training, erases rectangles); with
    ``--no-fast-loader`` the workers do it all. The workers are running when this returns.
    """
    options, data_config = DataOptions.from_args(args), resolve_data_config({}, model=model)
    dataset_train = prepare = prepare_eval = eval_transform = None
    if args.fast_loader:
        eval_transform = fastload.build_eval_transform(options, data_config)
        prepare_eval = fastload.build_device_transform(options, data_config, world.device, is_train=False)
    dataset_val, _ = datasets.build_dataset(False, options, data_config, transform=eval_transform)
    if not args.eval:
        build_dataset = fastload.build_dataset if args.fast_loader else partial(datasets.build_dataset, True)
        dataset_train, _ = build_dataset(options, data_config)
        prepare = fastload.build_device_transform(options, data_config, world.device) if args.fast_loader else None
    build_samplers = partial(
        samplers.build_samplers,
        world_size=world.world_size,
        rank=world.rank,
        repeated_aug=args.repeated_aug,
        repeats_on_one_rank=args.repeated_aug_local,
        seed=args.seed,
        shard_eval=args.shard_eval,
    )
    sampler_train, sampler_val = build_samplers(dataset_train, dataset_val)
    common = {"num_workers": loader_processes(args), "pin_memory": args.pin_mem and world.device.type == "cuda"}
    if args.fast_loader:
        common["image_bytes"] = 3 * args.input_size**2
    # Larger batches are no faster, and each worker keeps up to four of them in memory (readers/slots.py).
    evaluation = common | {"batch_size": min(max(1, 3 * args.batch_size // 2), MAX_EVAL_BATCH), "drop_last": False}
    loader_val = build_loader(dataset_val, sampler_val, **evaluation)
    loader_train = loader_held_out = None
    if not args.eval:
        batch_size = fit_batch_size(args, len(sampler_train))
        loader_train = build_loader(dataset_train, sampler_train, batch_size=batch_size, drop_last=True, **common)
        start_workers(loader_train)
    if args.val_split and not args.eval:
        held_out = datasets.build_held_out(options, data_config, transform=eval_transform)
        loader_held_out = build_loader(held_out, build_samplers(None, held_out)[1], **evaluation)
        start_workers(loader_held_out)
        _logger.info(f"--val-split {args.val_split}: {len(held_out)} training images held out")
    start_workers(loader_val)
    return Loaders(loader_train, loader_val, prepare, prepare_eval, loader_held_out)


def loader_processes(args: argparse.Namespace) -> int:
    """``--num_workers``, with -1 for all cores of this process; logs a hint if training would leave cores idle."""
    if args.num_workers == 0:
        return 0
    cores = utils.cores_of_process()
    if 0 < args.num_workers < cores and not args.eval:
        _logger.info(
            f"{cores} CPU cores for each process, {args.num_workers} of them load images (--num_workers "
            f"{args.num_workers}): if data: below is a large part of time:, give --num_workers -1 for all {cores}"
        )
    return utils.loader_processes(args.num_workers)


def fit_batch_size(args: argparse.Namespace, samples: int) -> int:
    """``--batch-size``, or fewer if a small data set has fewer samples for each process (even if batches are mixed)."""
    batch_size = min(args.batch_size, samples)
    if mixup_active(args):
        batch_size -= batch_size % 2
    if batch_size < 1:
        raise datasets.DataError(
            f"--data-path {args.data_path}: {samples} training sample(s) for each process and epoch are too few for a "
            "batch; use fewer processes, or --mixup 0 --cutmix 0"
        )
    if batch_size < args.batch_size:
        _logger.warning(
            f"each process has {samples} samples in an epoch: --batch-size {args.batch_size} -> {batch_size}"
        )
    return batch_size
