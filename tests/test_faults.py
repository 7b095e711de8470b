"""What a run does when something breaks: it ends on all ranks, with an exit code and a sentence, and loses nothing."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Ranks
from runs import Run, children, command, environment, expect, start_main, tiny_tree

import checkpoints
import entry
import reporting
from oversmoothing.weights import read_checkpoint

RECIPE = (
    *("--model", "attnscale_small_12", "--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8"),
    *("--input-size", 32, "--data-set", "FOLDER", "--batch-size", 8, "--device", "cpu", "--warmup-epochs", 0),
    *("--print-freq", 2, "--auto_reload"),
)
FOREVER = ("--epochs", 100000)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("data"), train=64, val=14)


@pytest.fixture
def recipe(tree: Path, tmp_path: Path) -> tuple:
    """Flags of a small run that writes to ``out/``, which is there already."""
    (tmp_path / "out").mkdir()
    return (*RECIPE, "--data-path", tree, "--output_dir", tmp_path / "out", "--num_workers", 1)


def is_finite(path: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in read_checkpoint(str(path))["model"].values())


def assert_no_traceback(output: str) -> None:
    assert "Traceback" not in output, output


def gone(pids: list[int], timeout: float = 20) -> bool:
    """Whether all these processes have ended after at most ``timeout`` s; zombies count as ended."""
    deadline = time.monotonic() + timeout
    while any(_lives(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> list[int]:
    found = children(pid)
    for child in found:  # grows while it is walked
        found += children(child)
    return found


# ---- numbers ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_diverging_loss_stops_all_ranks_and_keeps_the_last_good_checkpoint(recipe: tuple, tmp_path: Path) -> None:
    """Epoch 0 runs at --warmup-lr and is saved; the rate of epoch 2 is absurd."""
    flags = (*recipe, "--epochs", 5, "--warmup-epochs", 1, "--lr", 1e38)
    with Ranks(*flags, folder=tmp_path) as run:
        output = run.expect(entry.EXIT_NON_FINITE, timeout=90)
    assert "is not finite since epoch 2, step" in output or "are not finite after epoch 2, step" in output
    assert output.count("error: the ") == 2 and "continue with --auto_reload" in output
    assert_no_traceback(output)
    saved = read_checkpoint(str(tmp_path / "out" / checkpoints.CURRENT))
    assert saved["epoch"] == 1 and is_finite(tmp_path / "out" / checkpoints.CURRENT)


@pytest.mark.slow
def test_bad_loss_on_one_rank_stops_all_within_print_freq_steps(recipe: tuple, tmp_path: Path) -> None:
    """Rank 1 alone takes an absurd first step, so its loss overflows in the second one, before that of rank 0."""
    flags = (*recipe, "--epochs", 1, "--print-freq", 3)
    with Ranks(*flags, folder=tmp_path, rank_flags={1: ["--lr", "1e38"]}) as run:
        output = run.expect(entry.EXIT_NON_FINITE, timeout=60)
    assert output.count("error: the loss is not finite since epoch 0, step 1: training stops") == 2, output
    assert "[0/4]" in run.output(0) and "[3/4]" not in run.output(0)
    assert_no_traceback(output)


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(recipe: tuple, tmp_path: Path) -> None:
    """Here nobody looks at the loss, as between two checks of a real run; the save looks at the weights."""
    flags = (*recipe, "--epochs", 3, "--opt", "sgd", "--lr", 1e38, "--print-freq", 1000, "--checkpoint-steps", 1)
    with Ranks(*flags, "--warmup-epochs", 1, folder=tmp_path) as run:
        output = run.expect(entry.EXIT_NON_FINITE, timeout=90)
    assert len(re.findall("error: the weights are not finite after epoch 2, step [12]", output)) == 2, output
    for name in (checkpoints.CURRENT, checkpoints.PREVIOUS, checkpoints.BEST):
        assert is_finite(tmp_path / "out" / name)


# ---- ranks -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("number", "timeout"), [(signal.SIGKILL, 600), (signal.SIGSTOP, 8)])
def test_dead_or_silent_rank_ends_the_others_with_a_sentence(
    number: signal.Signals, timeout: int, recipe: tuple, tmp_path: Path
) -> None:
    """A dead one is noticed at once, by its closed connection; a silent one after --dist-timeout."""
    with Ranks(*recipe, *FOREVER, "--dist-timeout", timeout, folder=tmp_path) as run:
        run.wait_for("Epoch: [1]")
        if number == signal.SIGKILL:
            run.kill([1])
        else:
            run.signal(number, rank=1)
        run.processes[0].join(60)
        assert run.processes[0].exitcode == entry.EXIT_LOST_PEER, run.output()
        assert "[rank 0] lost another process of this run" in run.output(0)
        assert_no_traceback(run.output())


@pytest.mark.slow
def test_torchrun_ends_with_an_error_when_a_rank_dies(recipe: tuple) -> None:
    with start_main(*recipe, *FOREVER, processes=2) as run:
        run.wait_for("Epoch: [1]")
        everything = descendants(run.process.pid)
        os.kill(run.workers()[1], signal.SIGKILL)
        expect(run, timeout=60, code=1)
        assert gone(everything)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["plain", "torchrun"])
def test_ctrl_c_leaves_no_process_behind(launcher: str, recipe: tuple) -> None:
    """A terminal sends SIGINT to the foreground process group; under torchrun each rank has a group of its own."""
    with start_main(*recipe, *FOREVER, "--num_workers", 2, processes=1 + (launcher == "torchrun")) as run:
        run.wait_for("Epoch: [1]")
        everything = descendants(run.process.pid)
        assert len(everything) >= (2 if launcher == "plain" else 6)
        os.killpg(run.process.pid, signal.SIGINT)
        done = expect(run, timeout=60, code=None)
        assert gone(everything)
    assert "[rank 0] interrupted" in done.stdout
    if launcher == "plain":
        assert done.returncode == entry.EXIT_INTERRUPTED
        assert_no_traceback(done.stdout)
    else:
        assert done.returncode == 1


@pytest.mark.slow
def test_port_in_use_is_named(recipe: tuple, tmp_path: Path) -> None:
    """Without torchrun, which opens the port itself: srun, or the variables set by hand.

    Rank 0 cannot listen; rank 1 is let in by whoever has the port, and never gets an answer.
    """
    with socket.socket() as occupied:
        occupied.bind(("", 0))
        occupied.listen()
        port = occupied.getsockname()[1]
        flags = (*recipe, "--epochs", 1, "--dist-timeout", 3)
        with Ranks(*flags, folder=tmp_path, variables={"MASTER_PORT": str(port)}) as run:
            run.expect(entry.EXIT_BAD_INPUT, timeout=60)
            outputs = run.output(0), run.output(1)
    for output, reason in zip(
        outputs, ("the port is taken", "what listens there does not answer as rank 0 does"), strict=True
    ):
        assert f"at 127.0.0.1:{port} (--dist_url env://): {reason}" in output
        assert "--master_port" in output and "MASTER_PORT" in output
        assert_no_traceback(output)


# ---- images and loader processes -------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_stops_with_its_path_or_is_skipped_and_counted(
    workers: int, recipe: tuple, tree: Path, tmp_path: Path
) -> None:
    broken_tree = shutil.copytree(tree, tmp_path / "tree")
    broken = sorted(broken_tree.glob("train/*/*.jpeg"))[5]
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    flags = (*recipe, "--data-path", broken_tree, "--epochs", 1, "--no-repeated-aug", "--num_workers", workers)
    with Ranks(*flags, folder=tmp_path) as run:
        codes = run.finish(timeout=60)
    output = run.output()
    assert sorted(codes) in ([entry.EXIT_BAD_INPUT, entry.EXIT_LOST_PEER], [entry.EXIT_BAD_INPUT] * 2), output
    assert f"error: cannot read image {broken} (" in output and "--skip-bad-images N" in output
    assert_no_traceback(output)
    with Ranks(*flags, "--skip-bad-images", 1, folder=tmp_path) as run:
        output = run.expect(0)
    assert output.count(f"skipped bad image 1 of at most 1: {broken}") == 1, output


@pytest.mark.slow
def test_killed_loader_process_ends_the_run_with_a_sentence(recipe: tuple, tmp_path: Path) -> None:
    with Ranks(*recipe, *FOREVER, "--num_workers", 2, folder=tmp_path) as run:
        run.wait_for("Epoch: [1]")
        os.kill(children(run.processes[1].pid)[0], signal.SIGKILL)
        codes = run.finish(timeout=60)
    assert codes[1] == entry.EXIT_BAD_INPUT and codes[0] == entry.EXIT_LOST_PEER, run.output()
    assert "a worker process was killed" in run.output(1) and "--num_workers" in run.output(1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_small_shared_memory_ends_the_run_with_a_sentence(recipe: tuple) -> None:
    """Containers often give 64 MB; the default loader needs none of it (``test_slots.py``)."""
    flags = (*FOREVER, "--num_workers", 2, "--input-size", 224, "--no-fast-loader")
    words = [*command("plain"), *map(str, (*recipe, *flags))]
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no right to mount a small /dev/shm")
    with Run(["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *words], environment()) as run:
        done = expect(run, timeout=120, code=entry.EXIT_BAD_INPUT)
    assert "shared memory (/dev/shm) is full" in done.stdout and "--shm-size" in done.stdout
    assert "error: loading images failed" in done.stdout


# ---- output_dir ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_full_disk_ends_all_ranks_with_a_sentence(recipe: tuple, small_disk: Path, tmp_path: Path) -> None:
    """After a good save the disk fills up; the checkpoint that is there stays good and the run can go on from it."""
    folder = small_disk / "out"
    folder.mkdir()
    flags = (*recipe, "--output_dir", folder)
    with Ranks(*flags, *FOREVER, folder=tmp_path) as run:
        run.wait_for("Epoch: [2]")
        ballast = small_disk / "ballast"
        try:
            ballast.write_bytes(bytes(8 << 20))
        except OSError:
            pass
        output = run.expect(entry.EXIT_BAD_INPUT, timeout=60)
    assert "No space left on device" in output and "free some space" in output
    path, saved = checkpoints.latest(str(folder))
    assert saved["epoch"] >= 0 and is_finite(path)
    ballast.unlink()
    with Ranks(*flags, "--epochs", saved["epoch"] + 2, folder=tmp_path) as run:
        assert "auto-reload: continuing from" in run.expect(0)
    epochs = [line["epoch"] for line in reporting.EpochLog.read(folder / "log.txt")]
    assert epochs == list(range(saved["epoch"] + 2))


@pytest.mark.slow
def test_output_dir_that_cannot_be_written_ends_all_ranks_before_training(
    recipe: tuple, small_disk: Path, tmp_path: Path
) -> None:
    """A read-only file system: root may write into a folder without write permission."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for bad in (small_disk / "out", tmp_path / "file" / "out"):
        (tmp_path / "file").write_text("")
        with Ranks(*recipe, "--output_dir", bad, "--epochs", 1, folder=tmp_path) as run:
            output = run.expect(entry.EXIT_BAD_INPUT, timeout=60)
        assert output.count(f"error: --output_dir {bad}: nothing can be written there") == 2, output
        assert "Epoch: [0]" not in output


@pytest.mark.slow
def test_ranks_that_find_different_checkpoints_stop(recipe: tuple, tmp_path: Path) -> None:
    """--output_dir on a disk of each node's own: rank 1 would begin anew while rank 0 goes on."""
    with Ranks(*recipe, "--epochs", 1, folder=tmp_path) as run:
        run.expect(0)
    (tmp_path / "other").mkdir()
    other = {1: ["--output_dir", str(tmp_path / "other")]}
    with Ranks(*recipe, "--epochs", 2, folder=tmp_path, rank_flags=other) as run:
        output = run.expect(entry.EXIT_BAD_INPUT, timeout=60)
    assert "the checkpoint found (file, epoch, step) differs between the processes" in output
    assert_no_traceback(output)
