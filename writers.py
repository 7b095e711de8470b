"""Where the curves of a run go, beside ``log.txt``: TensorBoard always, Weights & Biases with ``--log-wandb``."""

import atexit
import importlib.util
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from utils import SetupError

_logger = logging.getLogger(__name__)


class Writer(ABC):
    """One place that shows a run; rank 0 alone has it."""

    @abstractmethod
    def describe(
        self,
        page: str,
        charts: dict,
        hyper_parameters: dict[str, float | str],
        metrics: Sequence[str],
        samples: np.ndarray,
    ) -> None:
        """Writes what stays the same, once a run.

        Args:
            page: Markdown on the run.
            charts: Layout of TensorBoard's page of custom scalars.
            hyper_parameters: Of the run, by name.
            metrics: The scalars that a table of runs shows beside them.
            samples: Picture of shape (H, W, 3), uint8.
        """

    @abstractmethod
    def write(self, epoch: int, scalars: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        """Writes an epoch: numbers, and tensors on the CPU, by ``group/name``."""

    @abstractmethod
    def finish(self) -> None:
        """Marks the run as finished; harmless where it goes on after all."""


class TensorBoardWriter(Writer):
    """Event files.

    Args:
        folder: Where they go.
        start_epoch: What an earlier attempt has written from this epoch on is not shown.
    """

    def __init__(self, folder: Path, start_epoch: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=start_epoch)

    def describe(
        self,
        page: str,
        charts: dict,
        hyper_parameters: dict[str, float | str],
        metrics: Sequence[str],
        samples: np.ndarray,
    ) -> None:
        """Text, charts, samples and the run's row of hyper-parameters.

        Not ``SummaryWriter.add_hparams``, which makes a second run of it, in a folder of its own: here the row belongs
        to the run itself, is there from the first epoch on, and its accuracies are the last values of those curves.
        """
        self.writer.add_text("run", page, 0)
        self.writer.add_custom_scalars(charts)
        self.writer.add_image("training_samples", samples, 0, dataformats="HWC")
        for summary in hparams(hyper_parameters, dict.fromkeys(metrics))[:2]:  # the third says that the run has ended
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()

    def write(self, epoch: int, scalars: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, epoch)
        for name, values in histograms.items():
            self.writer.add_histogram(name, values, epoch)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.file_writer.add_summary(hparams({}, {})[2])
        self.writer.close()


# ---- Weights & Biases ------------------------------------------------------------------------------------------------
ID_FILE = "wandb-id.txt"
FLUSH_S = 1.0  # between writes of its file: what a kill may cost


def check_wandb() -> None:
    """Finds the package without importing it: no process may be forked after it has started its threads.

    Raises:
        SetupError: If it is not installed.
    """
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder "wandb", as its runs leave one behind, can be imported too
        raise SetupError("--log-wandb needs the package wandb: pip install wandb")


class WandbWriter(Writer):
    """A run of Weights & Biases. What goes wrong with it after its start costs the rest of its curves, not the run.

    An epoch that is trained again after a kill is logged again: with the same numbers, over ``epoch`` as the x-axis of
    every curve, so the page does not change. Files go to ``folder/wandb``.

    Args:
        folder: Of the run; its name is the name of the run there. Keeps the id, by which a later attempt goes on.
        project: Name of the project; None: that of wandb's settings.
        tags: Of the run.
        resume_id: Of the run to go on in; empty: the one in ``folder``, else a new one.
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
        # However the process ends without finish(): not as a success. It comes before wandb's own hook.
        atexit.register(self._end, 1)

    def _offline(self, known: dict[str, Any], reason: Exception) -> Any:
        """The run as its files alone, where the server cannot be reached; None where that is not possible either."""
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

    def describe(
        self,
        page: str,
        charts: dict,
        hyper_parameters: dict[str, float | str],
        metrics: Sequence[str],
        samples: np.ndarray,
    ) -> None:
        """Notes and samples; W&B arranges its charts by their groups, and has the configuration already."""

        def send() -> None:
            self.run.notes = page
            self.run.log({"training_samples": self.wandb.Image(samples), "epoch": 0})

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
    """The id of the run: the given one, or that in ``file``, or a new one; in ``file`` from now on."""
    kept = file.read_text().strip() if file.exists() else ""
    chosen = given or kept or secrets.token_hex(4)
    if chosen != kept:
        temporary = file.with_suffix(".tmp")
        temporary.write_text(chosen + "\n")
        os.replace(temporary, file)  # before the run begins: whenever it is killed, the next attempt knows it
    return chosen


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
