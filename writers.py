"""Where the curves of a run go, beside ``log.txt``: TensorBoard always, Weights & Biases with ``--log-wandb``."""

import atexit
import importlib.util
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from utils import SetupError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Description:
    """What stays the same during a run.

    Attributes:
        page: Markdown about the run.
        charts: Layout of TensorBoard's page of custom scalars.
        hyper_parameters: The run's hyper-parameters, by name.
        metrics: The scalars that a table of runs shows beside the hyper-parameters.
        samples: Picture of shape (H, W, 3), uint8.
    """

    page: str
    charts: dict
    hyper_parameters: dict[str, float | str]
    metrics: Sequence[str]
    samples: np.ndarray


class Writer(ABC):
    """One place that shows a run; rank 0 alone has it."""

    @abstractmethod
    def describe(self, about: Description) -> None:
        """Writes what stays the same, once a run."""

    @abstractmethod
    def write(self, epoch: int, scalars: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        """Writes an epoch: numbers, and tensors on the CPU, by ``group/name``."""

    @abstractmethod
    def finish(self) -> None:
        """Marks the run as finished; it may still be continued later."""


class TensorBoardWriter(Writer):
    """Event files.

    Args:
        folder: Where they go.
        start_epoch: Events of an earlier attempt from this epoch on are not shown.
    """

    def __init__(self, folder: Path, start_epoch: int) -> None:
        from torch.utils import tensorboard  # here, as only the rank that writes needs it

        self.hparams = tensorboard.summary.hparams
        self.writer = tensorboard.SummaryWriter(str(folder), purge_step=start_epoch)

    def describe(self, about: Description) -> None:
        """Text, charts, samples and the run's row of hyper-parameters.

        ``SummaryWriter.add_hparams`` would make a second run, in a folder of its own. Here the row belongs to the run
        itself and is there from the first epoch on; its accuracies are the last values of their curves.
        """
        self.writer.add_text("run", about.page, 0)
        self.writer.add_custom_scalars(about.charts)
        self.writer.add_image("training_samples", about.samples, 0, dataformats="HWC")
        summaries = self.hparams(about.hyper_parameters, dict.fromkeys(about.metrics))
        for summary in summaries[:2]:  # the third says that the run has ended
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()

    def write(self, epoch: int, scalars: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, epoch)
        for name, values in histograms.items():
            self.writer.add_histogram(name, values, epoch)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.file_writer.add_summary(self.hparams({}, {})[2])
        self.writer.close()


# ---- Weights & Biases ------------------------------------------------------------------------------------------------
ID_FILE = "wandb-id.txt"
FLUSH_S = 1.0  # seconds between writes of wandb's file: what a kill loses at most


def check_wandb() -> None:
    """Looks for wandb without importing it: no process may be forked once wandb has started its threads.

    Raises:
        SetupError: If it is not installed.
    """
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder "wandb", which runs leave behind, can be imported too
        raise SetupError("--log-wandb needs the package wandb: pip install wandb")


class WandbWriter(Writer):
    """A run of Weights & Biases. If it fails after its start, its later curves are lost, but training goes on.

    An epoch that is trained again after a kill is logged again: with the same numbers, over ``epoch`` as the x-axis of
    every curve, so the page does not change. Files go to ``folder/wandb``.

    Args:
        folder: The run's folder; its name is the run's name in W&B. It keeps the id that a later attempt continues.
        project: Name of the project; None: that of wandb's settings.
        tags: Tags of the run.
        resume_id: Id of the run to continue; empty: the one in ``folder``, else a new one.
        config: What W&B shows as the run's configuration.
        wait_s: Seconds to wait for a server that does not answer, at the start and at the end; other ranks wait too.

    Raises:
        SetupError: If wandb refuses the arguments, or is not logged in.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str | None,
        tags: Sequence[str],
        resume_id: str,
        config: Mapping[str, Any],
        wait_s: float = 60,
    ) -> None:
        import wandb  # not before this rank's loader processes have been forked

        self.wandb = wandb
        settings = {
            "console": "off",  # the standard streams are this process's own: see entry.Console
            "init_timeout": wait_s,
            "finish_timeout": wait_s,
            "x_transaction_log_flush_interval": FLUSH_S,
        }
        known = dict(
            project=project, name=folder.resolve().name, tags=list(tags), dir=str(folder), config=dict(config),
            id=_run_id(folder / ID_FILE, resume_id), allow_val_change=True, settings=settings,
        )  # fmt: skip
        try:
            self.run = wandb.init(**known, resume="must" if resume_id else "allow")
        except (wandb.errors.UsageError, ValueError, TypeError) as error:
            way_out = ": or set WANDB_API_KEY, or WANDB_MODE=offline" if "API key" in str(error) else ""
            raise SetupError(f"--log-wandb: {_first_line(error)}{way_out}") from error
        except wandb.errors.Error as error:
            self.run = self._offline(known, error)
        self._try(lambda: self.run.define_metric("*", step_metric="epoch"))
        # A process that ends without finish() was no success. This hook runs before wandb's own.
        atexit.register(self._end, 1)

    def _offline(self, known: dict[str, Any], reason: Exception) -> Any:
        """The run with files only, if the server cannot be reached; None if that fails too."""
        self.wandb.teardown()  # the attempt to connect holds the id
        known["settings"] |= {"finish_timeout": 0}  # nothing to wait for but the disk
        kept = f"kept in {known['dir']}/wandb, `wandb sync` uploads it"
        try:
            return self.wandb.init(**known, mode="offline")
        except self.wandb.errors.Error as error:
            kept = f"not recorded ({_first_line(error)})"
            return None
        finally:
            _logger.warning(f"--log-wandb: no connection to W&B ({_first_line(reason)}): this attempt is {kept}")

    def describe(self, about: Description) -> None:
        """Notes and samples; W&B arranges its charts by their groups, and has the configuration already."""

        def send() -> None:
            self.run.notes = about.page
            self.run.log({"training_samples": self.wandb.Image(about.samples), "epoch": 0})

        self._try(send)

    def write(self, epoch: int, scalars: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        def send() -> None:
            drawn = {name: self.wandb.Histogram(values.numpy()) for name, values in histograms.items()}
            self.run.log({**scalars, **drawn, "epoch": epoch})

        self._try(send)

    def finish(self) -> None:
        self._end(0)

    def _end(self, exit_code: int) -> None:
        atexit.unregister(self._end)
        self._try(lambda: self.run.finish(exit_code=exit_code))
        self.run = None

    def _try(self, send: Callable[[], None]) -> None:
        if self.run is None:
            return
        try:
            send()
        except Exception as error:  # its service may be gone, and its errors are of many kinds
            _logger.warning(f"--log-wandb: {type(error).__name__}: {_first_line(error)}; nothing more is sent to W&B")
            self.run = None


def _run_id(file: Path, given: str) -> str:
    """The id of the run: the given one, or that in ``file``, or a new one; it is then in ``file``."""
    kept = file.read_text().strip() if file.exists() else ""
    chosen = given or kept or secrets.token_hex(4)
    if chosen != kept:
        temporary = file.with_suffix(".tmp")
        temporary.write_text(chosen + "\n")
        os.replace(temporary, file)  # before the run begins: after any kill, the next attempt knows the id
    return chosen


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
