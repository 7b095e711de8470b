"""What a run writes for people: the description of its model, ``log.txt`` and the TensorBoard pages."""

import logging
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

import models
import probe
import utils

_logger = logging.getLogger(__name__)


def count_parameters(model: nn.Module) -> int:
    """Parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_gmacs(model: nn.Module, input_size: int, device: torch.device) -> float:
    """Multiply-adds of one image's forward pass, in 1e9 (what the papers of this field call GFLOPs)."""
    training = model.training
    model.eval()
    # With gradients: without them the counter's hooks fail on a view of a parameter, such as CaiT's class token.
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        model(torch.zeros(1, 3, input_size, input_size, device=device))
    model.train(training)
    return counter.get_total_flops() / 2e9


def describe_model(name: str, model: nn.Module, input_size: int, device: torch.device) -> str:
    """One line: name, parameters, cost, and how many of the parameters are the remedy's."""
    added = sum(p.numel() for n, p in model.named_parameters() if models.is_remedy_parameter(n))
    return (
        f"model: {name}, {count_parameters(model):,} parameters ({added:,} of them the remedy's), "
        f"{count_gmacs(model, input_size, device):.2f} GFLOPs (multiply-adds) "
        f"at {input_size} px, {model.num_classes} classes"
    )


SPECTRUM_IMAGES = 32
# In TensorBoard a group of curves each, one curve a layer. The lambdas have theirs in every epoch.
SPECTRUM_CURVES = (
    "spectrum_hc_dc_attention",
    "spectrum_hc_dc_residual",
    "spectrum_hc_dc_mlp",
    "spectrum_token_similarity",
)


@dataclass(frozen=True)
class SpectrumWatch:
    """``--spectrum-every``: how smooth the features are, layer by layer, on the same few images each time.

    A report is one forward pass of 32 images, in float32, on rank 0. An epoch of ImageNet costs as much as 3.9 million
    (1.28 million forward and backward, 50,000 to evaluate): 32 are under 1 % of one rank's share even if each costs ten
    times as much as in training and 64 ranks share the epoch. Nothing is drawn at random, every mode is put back.

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
        return {
            f"spectrum_{name}": [value if math.isfinite(value) else None for value in values]
            for name, values in quantities.items()
        }


def watch_spectrum(model: nn.Module, name: str, dataset: Dataset, every: int) -> SpectrumWatch | None:
    """What ``--spectrum-every`` asks for; None if it is off, or, with a warning, if the model cannot be looked into.

    Args:
        model: Without wrappers.
        name: Of the model, for the warning.
        dataset: Evaluation images, of which 32 are taken at even distances: trees of folders are ordered by class.
        every: Epochs between reports; 0: none.
    """
    if not every:
        return None
    try:
        probe.find_layers(model)
    except probe.UnsupportedModelError as error:
        _logger.warning(f"--spectrum-every {every} has no effect, --model {name} cannot be looked into: {error}")
        return None
    count = min(SPECTRUM_IMAGES, len(dataset))
    # Not through a DataLoader, which would draw a seed from torch's generator.
    images = torch.stack([dataset[index * len(dataset) // count][0] for index in range(count)])
    return SpectrumWatch(images, every)


class Recorder:
    """``log.txt`` and TensorBoard of one run, written by rank 0 at the end of each epoch.

    Args:
        output_dir: Folder of the run; made if needed.
        start_epoch: Lines and events from this epoch on belong to an attempt that was cut off; they are replaced.
        fresh: The run starts anew; files of an earlier run in the same folder are moved into ``earlier-<n>/``.
        watch: What ``--spectrum-every`` adds to the epochs.

    Raises:
        SetupError: If a file cannot be written, here and in ``epoch``.
    """

    FILES = ["log.txt", "tensorboard"]

    def __init__(self, output_dir: str, start_epoch: int, fresh: bool, watch: SpectrumWatch | None = None) -> None:
        self.folder = Path(output_dir)
        self.watch = watch
        utils.make_folder(self.folder)
        with utils.explain_write_errors(self.folder):
            if fresh:
                self._set_earlier_run_aside()
            self.log = utils.EpochLog(self.folder / "log.txt", start_epoch)
            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start_epoch)

    def _set_earlier_run_aside(self) -> None:
        log = self.folder / "log.txt"
        checkpoints = [path.name for path in self.folder.glob("*checkpoint*.pth")]
        if not checkpoints and not (log.exists() and log.stat().st_size):
            return  # an attempt that ended before it had anything to keep
        # The checkpoints first: a kill in between must not leave one without its log.
        moved = utils.set_aside(self.folder, checkpoints + self.FILES)
        _logger.warning(
            f"--output_dir {self.folder} held an earlier run: moved to {moved} (--auto_reload would continue it)"
        )

    def epoch(self, line: dict, model: nn.Module, images_per_second: float) -> None:
        """Writes an epoch: ``line`` into ``log.txt``; its curves, the rate and every layer's lambda to TensorBoard."""
        if self.watch is not None:
            line = line | self.watch.report(model, line["epoch"])
        with utils.explain_write_errors(self.folder):
            self.log.append(line)
            self._write_events(line, model, images_per_second)

    def _write_events(self, line: dict, model: nn.Module, images_per_second: float) -> None:
        epoch = line["epoch"]
        for name, value in line.items():
            if name.startswith(("train_", "test_")):
                kind, quantity = name.split("_", 1)
                group = "lr" if quantity == "lr" else "loss" if "loss" in quantity else "accuracy"
                self.writer.add_scalar(f"{group}/{kind}_{quantity}" if group != "lr" else "lr", value, epoch)
            elif name in SPECTRUM_CURVES:
                for layer, at_layer in enumerate(value):
                    if at_layer is not None:
                        self.writer.add_scalar(f"{name}/layer_{layer:02d}", at_layer, epoch)
        self.writer.add_scalar("throughput/train_images_per_s", images_per_second, epoch)
        for name, parameter in model.named_parameters():
            if models.is_remedy_parameter(name):
                values = parameter.detach().float().cpu()
                self.writer.add_scalar(f"lambda_mean/{name}", statistics.fmean(values.tolist()), epoch)
                self.writer.add_histogram(f"lambda/{name}", values, epoch)
        self.writer.flush()
