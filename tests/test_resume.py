"""A run that was stopped, at any point and in any way, and started again ends with the bits of one left alone."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from runs import Run, command, expect, tiny_tree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoints
import entry
import reporting
from oversmoothing.weights import read_checkpoint

EPOCHS, STEPS = 5, 4  # steps of an epoch, for two processes
RECIPE = (  # everything random is on: RandAugment, erasing, mixup, cutmix, dropout, drop-path
    *("--model", "attnscale_small_12", "--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8"),
    *("--input-size", 32, "--data-set", "FOLDER", "--batch-size", 8, "--epochs", EPOCHS, "--device", "cpu"),
    *("--drop", 0.1, "--drop-path", 0.2, "--clip-grad", 1, "--lr", 0.05, "--warmup-epochs", 0, "--eval-ema"),
    *("--model-ema-decay", 0.9, "--print-freq", 1, "--keep-checkpoints", 2, "--auto_reload"),
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training images: four steps of 2 x 8 images an epoch."""
    return tiny_tree(tmp_path_factory.mktemp("data"), train=64, val=14)


@pytest.fixture(scope="module")
def recipe(tree: Path) -> tuple:
    return (*RECIPE, "--data-path", tree)


@pytest.fixture(scope="module")
def uninterrupted(recipe: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-process run that was left alone, without loader processes and without extra checkpoints."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with Ranks(*recipe, "--num_workers", 0, "--output_dir", folder, folder=folder) as run:
        run.expect(0)
    return folder


def assert_same_results(folder: Path, other: Path, epochs: int = EPOCHS) -> None:
    """Compares log.txt and all checkpoints of two finished runs bit for bit."""
    assert (folder / "log.txt").read_text() == (other / "log.txt").read_text()
    assert [line["epoch"] for line in reporting.EpochLog.read(folder / "log.txt")] == list(range(epochs))
    names = sorted(path.name for path in other.glob("*checkpoint*.pth") if path.name != checkpoints.PREVIOUS)
    assert checkpoints.CURRENT in names and checkpoints.BEST in names
    assert sorted(p.name for p in folder.glob("*checkpoint*.pth") if p.name != checkpoints.PREVIOUS) == names
    for name in names:
        ours, theirs = read_checkpoint(str(folder / name)), read_checkpoint(str(other / name))
        for key in ("model", "model_ema", "optimizer", "epoch", "step", "meters", "max_accuracy"):
            assert_same(ours[key], theirs[key], f"{name}: {key}")


def assert_same(ours: object, theirs: object, where: str) -> None:
    """Equality of nested dicts and lists down to the bits of their tensors."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, yours, f"{where}[{number}]")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_events_are_complete(folder: Path) -> None:
    """TensorBoard shows each epoch and the samples once; what a killed attempt had written is purged."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    lines = reporting.EpochLog.read(folder / "log.txt")
    shown = [(event.step, event.value) for event in events.Scalars("accuracy/test_acc1")]
    assert shown == [(line["epoch"], pytest.approx(line["test_acc1"])) for line in lines]
    assert [event.step for event in events.Images("training_samples")] == [0]
    assert [event.step for event in events.Tensors("run/text_summary")] == [0]


# ---- SIGKILL ---------------------------------------------------------------------------------------------------------
KILLS = 32
MOMENTS = ("start", "step", "step", "save", "save", "log")


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit(recipe: tuple, uninterrupted: Path, tmp_path: Path) -> None:
    rng = random.Random(20220425)
    kills = dict.fromkeys(MOMENTS, 0)
    runs = 0
    while sum(kills.values()) < KILLS:  # a run that finishes before it has been killed often enough is repeated
        folder = tmp_path / f"run-{runs}"
        folder.mkdir()
        # A rank whose rank 0 was killed before they met can only wait for it; a launcher would end it.
        flags = (*recipe, "--num_workers", 1, "--checkpoint-steps", 3, "--output_dir", folder, "--dist-timeout", 30)
        while not _killed_run_has_finished(flags, folder, rng, kills):
            pass
        assert_same_results(folder, uninterrupted)
        assert_events_are_complete(folder)
        assert not list(folder.glob("*.tmp"))
        runs += 1
    print(f"{sum(kills.values())} kills {kills} over {runs} run(s)")


def _killed_run_has_finished(flags: tuple, folder: Path, rng: random.Random, kills: dict[str, int]) -> bool:
    """Starts the run, kills it at a random moment, and returns whether it had finished before."""
    moment = rng.choice(MOMENTS) if sum(kills.values()) < KILLS else "never"
    log_size = _size(folder / "log.txt")
    count = rng.randint(1, 3)
    saves = _Saves(folder)
    conditions = {
        "start": lambda: "arguments" in run.output(0),
        "step": lambda: run.output(0).count("Epoch: [") >= count,
        "save": lambda: saves.seen() >= count,
        "log": lambda: _size(folder / "log.txt") > log_size > -1,  # before or after the checkpoint that follows
        "never": lambda: False,
    }
    with Ranks(*flags, folder=folder) as run:
        if not run.wait_until(conditions[moment], timeout=120):
            run.expect(0)
            return True
        time.sleep({"start": 0.5, "step": 0.05, "save": 0.003, "log": 0.003}[moment] * rng.random())
        if rng.random() < 0.3:  # only one rank dies; the other notices and leaves by itself
            victim = rng.randrange(2)
            run.kill([victim])
            codes = run.finish(timeout=60)
            if codes == [0, 0]:
                return True
            assert codes[1 - victim] in (entry.EXIT_LOST_PEER, entry.EXIT_BAD_INPUT, 0), run.output()
        else:
            run.kill()
        kills[moment] += 1
    return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


class _Saves:
    """Counts the temporary files of saves that have appeared in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = set(self._now())

    def _now(self) -> Iterator[str]:
        return (name for name in os.listdir(self.folder) if ".pth." in name and name.endswith(".tmp"))

    def seen(self) -> int:
        before = len(self.names)
        self.names |= set(self._now())
        self.count = getattr(self, "count", 0) + len(self.names) - before
        return self.count


# ---- number of processes ---------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_number_of_loader_processes_changes_no_bit(
    workers: int, recipe: tuple, uninterrupted: Path, tmp_path: Path
) -> None:
    with Ranks(*recipe, "--num_workers", workers, "--output_dir", tmp_path, folder=tmp_path) as run:
        run.expect(0)
    assert_same_results(tmp_path, uninterrupted)


@pytest.mark.slow
def test_three_processes_resume_exactly(recipe: tuple, tmp_path: Path) -> None:
    """From three processes on, the sum of the ranks' gradients depends on how DDP groups them."""
    flags = (*recipe, "--num_workers", 0, "--epochs", 3, "--batch-size", 4)
    folders = tmp_path / "whole", tmp_path / "stopped"
    for folder in folders:
        folder.mkdir()
        with Ranks(*flags, "--output_dir", folder, folder=folder, processes=3) as run:
            if folder == folders[1]:
                run.wait_for("Epoch: [1]  [1/")
                run.signal(signal.SIGTERM, rank=2)
                run.expect(entry.EXIT_PREEMPTED)
            else:
                run.expect(0)
    with Ranks(*flags, "--output_dir", folders[1], folder=folders[1], processes=3) as run:
        run.expect(0)
    assert_same_results(*folders, epochs=3)


@pytest.mark.slow
def test_accumulated_gradients_resume_exactly_in_one_process(recipe: tuple, tmp_path: Path) -> None:
    flags = (*recipe, "--num_workers", 1, "--epochs", 2, "--grad-accum", 3, "--checkpoint-steps", 1)
    for folder in (whole := tmp_path / "whole", killed := tmp_path / "killed"):
        folder.mkdir()
    with Ranks(*flags, "--output_dir", whole, folder=whole, processes=1) as run:
        run.expect(0)
    with Ranks(*flags, "--output_dir", killed, folder=killed, processes=1) as run:
        run.wait_for("Epoch: [0]  [4/8]")  # batches 0 to 2 are saved, 3 to 5 are a step that is not finished
        run.kill()
    with Ranks(*flags, "--output_dir", killed, folder=killed, processes=1) as run:
        run.expect(0)
    assert_same_results(killed, whole, epochs=2)


# ---- SIGTERM, SIGUSR1 ------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("number", "rank", "text"), [
    (signal.SIGTERM, 0, "Epoch: [2]  [1/4]"),
    (signal.SIGUSR1, 1, "Epoch: [3]  [3/4]"),
])  # fmt: skip
def test_signal_to_one_rank_saves_and_ends_all(
    number: signal.Signals, rank: int, text: str, recipe: tuple, uninterrupted: Path, tmp_path: Path
) -> None:
    flags = (*recipe, "--num_workers", 1, "--output_dir", tmp_path)
    with Ranks(*flags, folder=tmp_path) as run:
        run.wait_for(text)
        run.signal(number, rank)
        output = run.expect(entry.EXIT_PREEMPTED, timeout=30)
    assert output.count("stopped by a signal after epoch") == 2 and "Traceback" not in output
    with Ranks(*flags, folder=tmp_path) as run:
        assert "auto-reload: continuing from" in run.expect(0)
    assert_same_results(tmp_path, uninterrupted)
    assert_events_are_complete(tmp_path)


@pytest.mark.slow
def test_signal_during_the_evaluation_saves_the_trained_epoch(recipe: tuple, tmp_path: Path) -> None:
    """A resumed run goes on with the evaluation, without training the epoch again."""
    flags = (*recipe, "--data-path", tiny_tree(tmp_path / "data", train=64, val=400), "--epochs", 2, "--num_workers", 1)
    for folder in (whole := tmp_path / "whole", stopped := tmp_path / "stopped"):
        folder.mkdir()
    with Ranks(*flags, "--output_dir", whole, folder=whole) as run:
        run.expect(0)
    with Ranks(*flags, "--output_dir", stopped, folder=stopped) as run:
        run.wait_for("Test:  [ 1/")
        run.signal(signal.SIGTERM, rank=1)
        assert "stopped by a signal after epoch 0, step 3" in run.expect(entry.EXIT_PREEMPTED, timeout=30)
    saved = read_checkpoint(str(stopped / checkpoints.CURRENT))
    assert (saved["epoch"], saved["step"]) == (-1, STEPS)
    with Ranks(*flags, "--output_dir", stopped, folder=stopped) as run:
        assert "Epoch: [0]" not in run.expect(0)
    assert_same_results(stopped, whole, epochs=2)


# ---- other optimizers ------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [
    ("nadamuon", "--opt-kwargs", "ns_steps=3", "fallback_list=['head.*']"), ("lookahead_lamb",)
], ids=lambda words: words[0])  # fmt: skip
def test_other_optimizers_resume_exactly(optimizer: tuple[str, ...], recipe: tuple, tmp_path: Path) -> None:
    """Lookahead's copies of the weights begin with step 6, Lamb counts its steps in its groups."""
    flags = (*recipe, "--num_workers", 0, "--epochs", 2, "--opt", *optimizer)
    for folder in (whole := tmp_path / "whole", stopped := tmp_path / "stopped"):
        folder.mkdir()
    with Ranks(*flags, "--output_dir", whole, folder=whole) as run:
        run.expect(0)
    with Ranks(*flags, "--output_dir", stopped, folder=stopped) as run:
        run.wait_for("Epoch: [0]  [1/4]")
        run.signal(signal.SIGTERM, rank=1)
        run.expect(entry.EXIT_PREEMPTED)
    with Ranks(*flags, "--output_dir", stopped, folder=stopped) as run:
        run.expect(0)
    assert_same_results(stopped, whole, epochs=2)


# ---- torchrun --------------------------------------------------------------------------------------------------------
def _torchrun(*words: object) -> list[str]:
    """The command of a two-process run: flags of torchrun, "main.py" and its flags."""
    return [*command("torchrun", 2)[:-1], *map(str, words)]


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_ranks_are_killed(recipe: tuple, uninterrupted: Path, tmp_path: Path) -> None:
    flags = (*recipe, "--num_workers", 1, "--checkpoint-steps", 3, "--output_dir", tmp_path)
    with Run(_torchrun("--max-restarts=3", "main.py", *flags)) as run:
        for rank, text in ((1, "Epoch: [1]  [1/4]"), (0, "Epoch: [3]  [1/4]")):
            run.wait_for(text)
            os.kill(run.workers()[rank], signal.SIGKILL)
        output = expect(run, timeout=180).stdout
    assert output.count("auto-reload: continuing from") == 2
    assert_same_results(tmp_path, uninterrupted)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_ends_all(recipe: tuple, uninterrupted: Path, tmp_path: Path) -> None:
    """torchrun passes the signal on to the whole process group of each rank, loader processes included."""
    flags = (*recipe, "--num_workers", 2, "--output_dir", tmp_path)
    with Run(_torchrun("main.py", *flags)) as run:
        run.wait_for("Epoch: [1]  [1/4]")
        run.process.send_signal(signal.SIGTERM)
        output = expect(run, timeout=60, code=1).stdout
    assert output.count("stopped by a signal after epoch") == 2, output
    with Ranks(*flags, folder=tmp_path) as again:
        assert "auto-reload: continuing from" in again.expect(0)
    assert_same_results(tmp_path, uninterrupted)


@pytest.mark.slow
def test_ranks_save_and_leave_when_their_launcher_is_gone(recipe: tuple, uninterrupted: Path, tmp_path: Path) -> None:
    """SIGUSR1 ends torchrun itself, unless --signals-to-handle names it; SIGKILL always does."""
    flags = (*recipe, "--num_workers", 1, "--output_dir", tmp_path)
    with Run(_torchrun("main.py", *flags)) as run:
        run.wait_for("Epoch: [1]  [1/4]")
        ranks = run.workers()
        run.process.send_signal(signal.SIGUSR1)
        assert run.process.wait(30) == -signal.SIGUSR1
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < deadline, f"still there: {ranks}\n{run.output}"
            time.sleep(0.1)
        assert run.output.count("stopped by a signal after epoch") == 2, run.output
    with Ranks(*flags, folder=tmp_path) as again:
        again.expect(0)
    assert_same_results(tmp_path, uninterrupted)


# ---- what may change -------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("change", "processes"), [(("--batch-size", 8), 1), (("--batch-size", 4), 2)])
def test_other_world_or_batch_size_is_allowed_with_a_warning(
    change: tuple, processes: int, recipe: tuple, uninterrupted: Path, tmp_path: Path
) -> None:
    flags = (*recipe, "--num_workers", 0, "--epochs", 3, "--output_dir", tmp_path)
    with Ranks(*flags, folder=tmp_path) as run:
        run.wait_for("Epoch: [1]  [1/4]")
        run.signal(signal.SIGTERM, rank=0)
        run.expect(entry.EXIT_PREEMPTED)
    with Ranks(*flags, *change, folder=tmp_path, processes=processes) as run:
        output = run.expect(0)
    changed = "'world_size': '2 -> 1'" if processes == 1 else "'batch_size': '8 -> 4'"
    assert changed in output and "differ from the uninterrupted run" in output
    assert "epoch 1 starts again" in output and "Epoch: [1]  [0/8]" in output and "Epoch: [0]" not in output
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[0] == reporting.EpochLog.read(uninterrupted / "log.txt")[0]


@pytest.mark.slow
def test_two_runs_cannot_write_into_one_folder(recipe: tuple, tmp_path: Path) -> None:
    flags = (*recipe, "--num_workers", 0, "--output_dir", tmp_path)
    with Ranks(*flags, "--epochs", 100000, folder=tmp_path, processes=1) as first:
        first.wait_for("Epoch: [1]")
        with Ranks(*flags, "--dist-timeout", 10, folder=tmp_path) as second:
            output = second.expect(entry.EXIT_BAD_INPUT, timeout=120)
    assert output.count(f"--output_dir {tmp_path}: another run is writing there") == 2
