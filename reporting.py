"""What a run writes for people: the description of its model, ``log.txt``, and what ``writers.py`` shows of it."""

import argparse
import logging
import math
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

import checkpoints
import options
import oversmoothing
import utils
from epochlog import OTHER_LINES, EpochLog
from oversmoothing.analysis import probe
from oversmoothing.analysis.cost import count_macs
from oversmoothing.analysis.results import json_ready
from utils import SetupError
from writers import ID_FILE, Description, TensorBoardWriter, Writer

_logger = logging.getLogger(__name__)


def count_parameters(model: nn.Module) -> int:
    """Parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def describe_model(name: str, model: nn.Module, input_size: int, device: torch.device) -> str:
    """One line: name, parameters, cost, and how many of the parameters are the remedy's."""
    gmacs = count_macs(model, torch.zeros(1, 3, input_size, input_size, device=device)) / 1e9
    added = sum(p.numel() for n, p in model.named_parameters() if oversmoothing.is_remedy_parameter(n))
    return (
        f"model: {name}, {count_parameters(model):,} parameters ({added:,} of them the remedy's), "
        f"{gmacs:.2f} GFLOPs (multiply-adds) at {input_size} px, {model.num_classes} classes"
    )


SPECTRUM_IMAGES = 32
# Each is a group of curves in TensorBoard, one curve a layer. The lambdas get theirs in every epoch.
SPECTRUM_CURVES = (
    "spectrum_hc_dc_attention",
    "spectrum_hc_dc_residual",
    "spectrum_hc_dc_mlp",
    "spectrum_token_similarity",
    "spectrum_effective_rank",
)


@dataclass(frozen=True)
class SpectrumWatch:
    """``--spectrum-every``: how smooth the features are, layer by layer, on the same few images each time.

    A report is one forward pass of 32 images, in float32, on rank 0. An epoch of ImageNet costs as much as the forward
    passes of 3.9 million images (1.28 million forward and backward, 50,000 to evaluate). So 32 are under 1 % of one
    rank's share, even if each costs ten times as much as in training and 64 ranks share the epoch. A report draws
    nothing at random and restores every module's mode.

    Attributes:
        images: Shape (B, 3, H, W), in host memory.
        every: Epochs between reports.
    """

    images: Tensor
    every: int

    def report(self, model: nn.Module, epoch: int) -> dict[str, list[float | None]]:
        """``spectrum_<quantity>`` -> one number a layer (see :func:`probe.layer_report`); empty if not due.

        An infinite ratio, where a mean token is zero, is None: JSON has no number for it.
        """
        if (epoch + 1) % self.every:
            return {}
        device = next(model.parameters()).device
        quantities = probe.layer_report(model, self.images.to(device))
        return json_ready({f"spectrum_{name}": values for name, values in quantities.items()})


def watch_spectrum(
    model: nn.Module,
    name: str,
    dataset: Dataset,
    every: int,
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> SpectrumWatch | None:
    """The watch of ``--spectrum-every``; None if it is off or, with a warning, if the model is not supported.

    Args:
        model: Without wrappers.
        name: Of the model, for the warning.
        dataset: Evaluation images; 32 evenly spaced ones are taken, because folder trees are ordered by class.
        every: Epochs between reports; 0: none.
        prepare: The device's part of the transform (see ``engine.Trainer``), or None.
        device: Where ``prepare`` works.
    """
    if not every:
        return None
    try:
        probe.find_layers(model)
    except probe.UnsupportedModelError as error:
        _logger.warning(f"--spectrum-every {every} has no effect, --model {name} is not supported: {error}")
        return None
    count = min(SPECTRUM_IMAGES, len(dataset))
    # Not through a DataLoader, which would draw a seed from torch's generator.
    images = torch.stack([dataset[index * len(dataset) // count][0] for index in range(count)])
    return SpectrumWatch(images if prepare is None else prepare(images.to(device)).cpu(), every)


SAMPLES = 12  # of the first epoch: four images, each augmented three times, in one process of the paper's recipe
SAMPLES_A_ROW = 6
CAPTION_PX = 14


def sample_sheet(
    loader: DataLoader,
    prepare: Callable[[Tensor], Tensor] | None,
    data_config: dict[str, Any],
    device: torch.device,
    seed: int,
) -> np.ndarray:
    """The first training samples of rank 0 as the model gets them, except for mixing, above their class names.

    They are drawn as in training, addressed by the seed, so the picture changes no draw of the run. An iterator of
    ``loader`` is not used: it would draw a seed from torch's generator.

    Args:
        loader: Of the training images, at the start of epoch 0.
        prepare: The device's part of the transform (see ``engine.Trainer``), or None.
        data_config: ``timm.data.resolve_data_config({}, model=model)``: ``mean`` and ``std`` of the normalisation.
        device: Where ``prepare`` works.
        seed: Of the run.

    Returns:
        Picture of shape (H, W, 3), uint8.
    """
    items = [loader.dataset[key] for key in islice(loader.sampler, SAMPLES)]
    images = default_collate([image for image, _ in items])
    if prepare is not None:
        utils.seed_everything(seed, 0, 0, 0)  # erases what the first step of epoch 0 erases
        images = prepare(images.to(device)).cpu()
    mean, std = (torch.tensor(data_config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    levels = (images * std + mean).clamp(0, 1) * 255
    pixels = levels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    names = class_names(loader.dataset)
    return _contact_sheet(pixels, [names[label] if names else str(label) for _, label in items])


def class_names(dataset: Dataset) -> list[str] | None:
    """The names of the labels, from the first of the nested data sets that has them."""
    while not hasattr(dataset, "classes"):
        dataset = getattr(dataset, "dataset", None)
        if dataset is None:
            return None
    return dataset.classes


def _contact_sheet(pixels: np.ndarray, captions: list[str]) -> np.ndarray:
    """Pictures (N, H, W, 3) in rows, a caption below each; small ones are enlarged to 96 pixels, for the letters."""
    zoom = max(1, math.ceil(96 / pixels.shape[2]))
    pixels = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = pixels.shape[1] + CAPTION_PX, pixels.shape[2] + 2
    rows = math.ceil(len(pixels) / SAMPLES_A_ROW)
    sheet = Image.new("RGB", (width * min(len(pixels), SAMPLES_A_ROW), height * rows), "white")
    for number, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        tile = Image.new("RGB", (width, height), "white")  # cuts off a caption that is too long
        tile.paste(Image.fromarray(picture), (1, 0))
        ImageDraw.Draw(tile).text((2, pixels.shape[1] + 1), str(caption), fill="black")
        sheet.paste(tile, (number % SAMPLES_A_ROW * width, number // SAMPLES_A_ROW * height))
    return np.asarray(sheet)


# Where and how a run computes, not what: these get no column on the page that compares runs.
_NO_HPARAMS = frozenset({
    *("output_dir", "data_path", "num_workers", "pin_mem", "device", "print_freq", "spectrum_every", "download"),
    *("log_wandb", "wandb_project", "wandb_tags", "wandb_resume_id", "profile"),
    *("auto_reload", "start_epoch", "keep_checkpoints", "checkpoint_steps", "list_models", "throughput"),
    *("eval", "real_labels", "dist_eval", "shard_eval", "world_size", "dist_url", "dist_timeout", "local_rank"),
})  # fmt: skip


def hyper_parameters(args: argparse.Namespace, effective_batch: int) -> dict[str, float | str]:
    """The flags that define a run, for TensorBoard's page of hyper-parameters: numbers, and text for all else.

    A flag always gets the same type, since TensorBoard applies the types of one run to all.
    """
    default = options.get_args_parser().get_default
    table: dict[str, float | str] = {"effective_batch": effective_batch}
    for name, value in vars(args).items():
        if name not in _NO_HPARAMS:
            table[name] = value if type(default(name)) in (int, float) else "" if value is None else str(value)
    return table


def run_page(args: argparse.Namespace, about: list[str]) -> str:
    """Markdown that describes the run: its command, the lines ``about`` it, and the flags not at their default."""
    default = options.get_args_parser().get_default
    changed = {name: value for name, value in vars(args).items() if value != default(name)}
    rows = [f"| `--{name.replace('_', '-')}` | `{value}` |" for name, value in changed.items()]
    return "\n\n".join([f"    {shlex.join(sys.argv)}", *about, "\n".join(["| flag | value |", "| --- | --- |", *rows])])


def charts(model: nn.Module, watched: bool) -> dict[str, dict]:
    """TensorBoard's page "custom scalars": the curves of each chart, as patterns of their tags.

    Args:
        model: Its remedies' parameters get a chart each, with a curve for every layer.
        watched: Whether ``--spectrum-every`` adds its curves.
    """

    def lines(*patterns: str) -> list:
        return ["Multiline", list(patterns)]

    page = {
        "run": {
            "accuracy, %": lines("accuracy/.*acc1$"),
            "loss": lines("loss/"),
            "learning rate": lines("optimization/lr$"),
        }
    }
    found = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters() if oversmoothing.is_remedy_parameter(name)}
    if found:
        page["mean lambda by layer"] = {name: lines(rf"remedy_mean/.*\.{name}$") for name in sorted(found)}
    if watched:
        page["over-smoothing by layer"] = {name: lines(f"{name}/") for name in SPECTRUM_CURVES}
    return page


class Recorder:
    """``log.txt`` and the writers of one run (TensorBoard, W&B), for rank 0 at the end of each epoch.

    Args:
        output_dir: Folder of the run; made if needed.
        start_epoch: Lines and events from this epoch on belong to an attempt that was cut off; they are replaced.
        fresh: The run starts anew; files of an earlier run in the same folder are moved into ``earlier-<n>/``.
        watch: What ``--spectrum-every`` adds to the epochs.
        chosen_by: The accuracy that makes an epoch the best so far, as ``log.txt`` calls it.
        open_wandb: Makes the writer of ``--log-wandb``, given the folder; None: TensorBoard alone.

    Attributes:
        begins: Whether no epoch is recorded yet. Then ``describe`` must be called, once a run.

    Raises:
        SetupError: If a file cannot be written, here and in every method.
    """

    FILES = ["log.txt", OTHER_LINES, "tensorboard", "wandb", ID_FILE, "profile"]

    def __init__(
        self,
        output_dir: str,
        start_epoch: int,
        fresh: bool,
        watch: SpectrumWatch | None = None,
        chosen_by: str = "test_acc1",
        open_wandb: Callable[[Path], Writer] | None = None,
    ) -> None:
        self.folder = Path(output_dir)
        self.watch, self.chosen_by = watch, chosen_by
        utils.make_folder(self.folder)
        with checkpoints.explain_write_errors(self.folder):
            if fresh:
                self._set_earlier_run_aside()
            log = self.folder / "log.txt"
            if log.exists() and not log.is_file():
                raise SetupError(f"--output_dir {self.folder}: its log.txt is no file: move it away")
            self.log = EpochLog(log, start_epoch)
            lines = EpochLog.read(self.log.path)
            done = [line.get(chosen_by) for line in lines]
            self.best_acc1 = max(
                (value for value in done if type(value) in (int, float) and math.isfinite(value)), default=-math.inf
            )
            self.begins = fresh or start_epoch == 0
            if self.begins:  # TensorBoard would show the text of an attempt that recorded no epoch beside the new one
                for file in (self.folder / "tensorboard").glob("events.out.tfevents.*"):
                    file.unlink()
            self.writers: list[Writer] = [TensorBoardWriter(self.folder / "tensorboard", start_epoch)]
            if open_wandb is not None:
                self.writers.append(open_wandb(self.folder))
                for line in lines[-1:]:  # again: a kill may have lost it from W&B's memory
                    self.writers[-1].write(line["epoch"], curves(line), {})

    def _set_earlier_run_aside(self) -> None:
        log = self.folder / "log.txt"
        saved = [path.name for path in self.folder.glob("*checkpoint*.pth")]
        if not saved and not (log.exists() and log.stat().st_size):
            return  # an attempt that ended before it had anything to keep
        # The checkpoints first: a kill in between must not leave one without its log.
        moved = checkpoints.set_aside(self.folder, saved + self.FILES)
        _logger.warning(
            f"--output_dir {self.folder} held an earlier run: moved to {moved} (--auto_reload would continue it)"
        )

    def describe(self, page: str, charts: dict, hyper_parameters: dict[str, float | str], samples: np.ndarray) -> None:
        """Writes what stays the same: text, charts, samples and hyper-parameters.

        Args:
            page: From :func:`run_page`.
            charts: From :func:`charts`.
            hyper_parameters: From :func:`hyper_parameters`.
            samples: From :func:`sample_sheet`.
        """
        metrics = (f"accuracy/best_{self.chosen_by}", "accuracy/test_acc1", "loss/test_loss")
        description = Description(page, charts, hyper_parameters, metrics, samples)
        with checkpoints.explain_write_errors(self.folder):
            for writer in self.writers:
                writer.describe(description)

    def finish(self) -> None:
        """Marks the run as finished in the writers; the run may still be continued later."""
        with checkpoints.explain_write_errors(self.folder):
            for writer in self.writers:
                writer.finish()

    def epoch(self, line: dict, model: nn.Module, speed: dict[str, float]) -> None:
        """Writes an epoch: ``line`` into ``log.txt``; its curves, ``speed`` and every layer's lambda to the writers.

        ``speed`` depends on clock and machine. It is not in ``log.txt``, which has the same bits for interrupted and
        uninterrupted runs.
        """
        if self.watch is not None:
            line = line | self.watch.report(model, line["epoch"])
        with checkpoints.explain_write_errors(self.folder):
            self.log.append(line)
            self.best_acc1 = max(self.best_acc1, line[self.chosen_by])
            remedies = {
                name: parameter.detach().float().cpu()
                for name, parameter in model.named_parameters()
                if oversmoothing.is_remedy_parameter(name)
            }
            scalars = {f"accuracy/best_{self.chosen_by}": self.best_acc1} | curves(line) | speed
            scalars |= {f"remedy_mean/{name}": statistics.fmean(values.tolist()) for name, values in remedies.items()}
            histograms = {f"remedy_values/{name}": values for name, values in remedies.items()}
            for writer in self.writers:
                writer.write(line["epoch"], scalars, histograms)


def curves(line: dict) -> dict[str, float]:
    """The numbers of a line of ``log.txt`` that are drawn, by ``group/name``."""
    found = {}
    for name, value in line.items():
        if name == "train_lr":
            found["optimization/lr"] = value
        elif name.startswith(("train_", "val_", "test_")):
            found[f"{'loss' if 'loss' in name else 'accuracy'}/{name}"] = value
        elif name in SPECTRUM_CURVES:
            found |= {f"{name}/layer_{layer:02d}": number for layer, number in enumerate(value) if number is not None}
    return found
