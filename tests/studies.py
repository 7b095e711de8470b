"""Shared by the tests of the comparisons: small studies, and logs as their runs would write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from scripts.comparison.records import find_folder, write_record
from scripts.comparison.study import Run, Study
from scripts.comparison.study_file import make_study

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
FLAGS = {
    "data-set": "FOLDER", "data-path": "data", "input-size": 32, "batch-size": 4, "epochs": 2, "model-kwargs": SIZE,
    "repeated-aug": False, "mixup": 0, "cutmix": 0, "num_workers": 0, "device": "cpu", "warmup-epochs": 0,
}  # fmt: skip
ARMS = {"plain": {"model": "deit_small_12"}, "attnscale": {"model": "attnscale_small_12"}}


def study_of(**keys: Any) -> Study:
    """A study of two arms and two seeds; ``keys`` are those of its file."""
    return make_study({"flags": FLAGS, "arms": ARMS, "seeds": 2} | keys, "study.toml", default_title="study")


def write_run(folder: Path, run: Run, accuracy: float, epochs: int | None = None, finished: bool = True) -> Path:
    """What a run leaves behind: accuracy rises to ``accuracy``, and tokens grow alike with depth.

    Args:
        folder: Of all runs.
        run: Of a study.
        accuracy: Of the last epoch.
        epochs: That are in the log; None: all.
        finished: Whether the run has ended.
    """
    path = find_folder(folder, run)
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for epoch in range(run.epochs if epochs is None else epochs):
        done = (epoch + 1) / run.epochs
        line = {"train_loss": 2 - done, "test_loss": 3 - done - accuracy / 100, "test_acc1": accuracy * done}
        line |= {"test_acc5": 100.0, "epoch": epoch, "n_parameters": 1000}
        line |= {"spectrum_token_similarity": [0.1, 0.2 + accuracy / 1000, 0.9], "spectrum_hc_dc_mlp": [3.0, 2.0, None]}
        line |= {"spectrum_effective_rank": [9.0, 8.0, 7.0]}
        line |= {"spectrum_lamb": [0.1, 0.2, 0.3]} if "attnscale" in run.args.model else {}
        lines.append(json.dumps(line) + "\n")
    (path / "log.txt").write_text("".join(lines))
    write_record(
        path, {"revisions": ["abc1234"], "torch": "2", "seconds": 1.0} | ({"finished": True} if finished else {})
    )
    return path


def accuracies(mean: float, sd: float, seeds: int, seed: int, shared: np.ndarray | None = None) -> np.ndarray:
    """Accuracies of an arm's runs; ``shared`` is what the seeds have in common with the baseline's runs."""
    noise = np.random.default_rng(seed).normal(0, sd, seeds)
    return mean + noise + (0 if shared is None else shared)
