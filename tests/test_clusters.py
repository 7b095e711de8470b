"""Runs over several nodes: the batch files under an emulated Slurm (tests/slurm.py), and torchrun with a rendezvous."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Ranks
from runs import ROOT, Run, environment, expect, free_port, tiny_tree
from slurm import Nodes, NoNamespaces, Slurm
from test_resume import assert_same_results

EPOCHS = 8
RECIPE = (  # four steps an epoch for two processes
    *("--model", "attnscale_small_12", "--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8"),
    *("--input-size", "32", "--data-set", "FOLDER", "--batch-size", "8", "--epochs", str(EPOCHS), "--device", "cpu"),
    *("--lr", "0.05", "--warmup-epochs", "0", "--model-ema-decay", "0.9", "--print-freq", "1", "--num_workers", "1"),
)
MIDDLE = "Epoch: [1]  [1/4]"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (*RECIPE, "--data-path", str(tiny_tree(tmp_path_factory.mktemp("data"), train=64, val=14)))


@pytest.fixture(scope="module")
def undisturbed(recipe: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes on this machine that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Ranks(*recipe, "--output_dir", folder, folder=folder) as run:
        run.expect(0)
    return folder


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    try:
        made = Nodes(tmp_path)
    except (NoNamespaces, OSError) as error:
        pytest.skip(f"no right to make network namespaces, which stand for the nodes: {error}")
    with made:
        yield made


def wait_for(path: Path, text: str, slurm: Slurm, timeout: float = 90) -> None:
    """Waits until a log of the job holds ``text``; fails if the job ends before."""
    deadline = time.monotonic() + timeout
    while text not in (log := path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline and not slurm.ended(), f"{text!r} was not written to {path}:\n{log}"
        time.sleep(0.02)


def wait_for_either(runs: tuple[Run, ...], text: str, timeout: float = 90) -> None:
    """Waits until one of them has printed ``text``: rank 0 may be on any node."""
    deadline = time.monotonic() + timeout
    while not any(text in run.output for run in runs):
        assert time.monotonic() < deadline, "\n".join(run.output for run in runs)
        time.sleep(0.02)


def submit(slurm: Slurm, words: list[object], **variables: str) -> None:
    env = environment(**slurm.variables, PYTHON=sys.executable, **variables)
    with Run(["sbatch", *map(str, words)], env) as run:
        assert "Submitted batch job" in expect(run, timeout=20).stdout


@pytest.mark.slow
def test_srun_s_batch_file_saves_at_the_warning_and_comes_back(
    recipe: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    """Both nodes are this machine; the warning goes to the processes."""
    log, out = tmp_path / "log", tmp_path / "out"
    with Slurm(tmp_path / "slurm") as slurm:
        options = ["--ntasks-per-node=1", f"--output={log}"]
        submit(slurm, [*options, ROOT / "scripts/slurm/srun.sbatch", *recipe, "--output_dir", out])
        wait_for(log, MIDDLE, slurm)
        slurm.warn()
        code, events = slurm.finish()
    assert (code, events) == (0, ["started", "warned", "requeued", "started", "ended 0"]), log.read_text()
    assert log.read_text().count("stopped by a signal after epoch") == 2
    assert log.read_text().count("auto-reload: continuing from") == 1
    assert_same_results(out, undisturbed, epochs=EPOCHS)


@pytest.mark.slow
def test_torchrun_s_batch_file_meets_over_the_network_saves_at_the_warning_and_is_queued_again(
    recipe: tuple[str, ...], undisturbed: Path, nodes: Nodes, tmp_path: Path
) -> None:
    """Two nodes with addresses of their own; the warning goes to the batch script."""
    log, out = tmp_path / "log", tmp_path / "out"
    with Slurm(tmp_path / "slurm", nodes, restart=False) as slurm:
        submit(slurm, [f"--output={log}", ROOT / "scripts/slurm/torchrun.sbatch", *recipe, "--output_dir", out])
        wait_for(log, MIDDLE, slurm)
        slurm.warn()
        _, events = slurm.finish()
    assert events == ["started", "warned", "requeued"], log.read_text()
    assert log.read_text().count("stopped by a signal after epoch") == 2
    with Ranks(*recipe, "--auto_reload", "--output_dir", out, folder=tmp_path) as rest:
        assert "auto-reload: continuing from" in rest.expect(0)
    assert_same_results(out, undisturbed, epochs=EPOCHS)


@pytest.mark.slow
def test_a_node_whose_torchrun_was_killed_comes_back_and_the_run_goes_on(
    recipe: tuple[str, ...], undisturbed: Path, nodes: Nodes, tmp_path: Path
) -> None:
    """torchrun on two nodes, one process each; that on the second is killed and started again by the same command."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3"]
    words += ["--rdzv_backend=c10d", f"--rdzv_endpoint=node1:{free_port()}", "--rdzv_id=test", "main.py", *recipe]
    words += ["--auto_reload", "--output_dir", str(tmp_path / "out")]
    commands = [[*nodes.enter(number), *words] for number in (0, 1)]
    # Without it, a torchrun that joins later waits in vain for the address that those before it have kept.
    env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with Run(commands[0], env) as first, Run(commands[1], env) as second:
        wait_for_either((first, second), MIDDLE)
        os.kill(second.process.pid, signal.SIGKILL)
        with Run(commands[1], env) as again:
            outputs = [expect(run).stdout for run in (first, again)]
    assert "stopped by a signal after epoch" in second.output  # its process saw that it was left alone
    assert "".join(outputs).count("auto-reload: continuing from") == 1
    assert_same_results(tmp_path / "out", undisturbed, epochs=EPOCHS)
