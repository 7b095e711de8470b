"""What a run writes for people: the description of its model, ``log.txt`` and the TensorBoard pages."""

import logging
import statistics
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

import models
import utils

_logger = logging.getLogger(__name__)


def count_parameters(model: nn.Module) -> int:
    """Parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def count_gmacs(model: nn.Module, input_size: int, device: torch.device) -> float:
    """Multiply-adds of one image's forward pass, in 1e9 (what the papers of this field call GFLOPs)."""
    training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter:
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


class Recorder:
    """``log.txt`` and TensorBoard of one run, written by rank 0 at the end of each epoch.

    Args:
        output_dir: Folder of the run; made if needed.
        start_epoch: Lines and events from this epoch on belong to an attempt that was cut off; they are replaced.
        fresh: The run starts anew; files of an earlier run in the same folder are moved into ``earlier-<n>/``.

    Raises:
        SetupError: If a file cannot be written, here and in ``epoch``.
    """

    FILES = ["log.txt", "tensorboard"]

    def __init__(self, output_dir: str, start_epoch: int, fresh: bool) -> None:
        self.folder = Path(output_dir)
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
        self.writer.add_scalar("throughput/train_images_per_s", images_per_second, epoch)
        for name, parameter in model.named_parameters():
            if models.is_remedy_parameter(name):
                values = parameter.detach().float().cpu()
                self.writer.add_scalar(f"lambda_mean/{name}", statistics.fmean(values.tolist()), epoch)
                self.writer.add_histogram(f"lambda/{name}", values, epoch)
        self.writer.flush()
