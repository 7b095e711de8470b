"""Use from Python: everything can be imported from another folder, and leaves what it finds there as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, environment, tiny_tree
from test_docs import python_script

# The state of a session that an import must not touch; what libraries do themselves (scikit-learn's OpenMP) is theirs.
LOOK = """
import json, logging, os, random, signal, sys, threading

fork_hooks, register = [], os.register_at_fork


def record(**hooks):
    file = sys._getframe(1).f_code.co_filename
    if "/lib/python" not in file:  # libraries have theirs
        fork_hooks.append(file)
    register(**hooks)


os.register_at_fork = record
import matplotlib, numpy, sklearn.datasets, timm, torch, torchvision, torch.utils.tensorboard


def state():
    root = logging.getLogger()
    return {
        "loggers": [root.level, len(root.handlers), root.disabled],
        "random": hash(random.getstate()),
        "numpy": numpy.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "threads": [torch.get_num_threads(), threading.active_count()],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)],
        "process group": torch.distributed.is_initialized(),
        "backend": matplotlib.get_backend(auto_select=False),
        "defaults": [str(torch.get_default_dtype()), torch.is_grad_enabled()],
        "environment": dict(os.environ),
        "folder": [os.getcwd(), sorted(os.listdir())],
        "fork hooks": list(fork_hooks),
    }


before = state()
"""
COMPARE = """
after = state()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess:
    """The script in an interpreter of its own, from standard input, started in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-"], input=script, cwd=folder, env=environment(), text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_imports_change_nothing(tmp_path: Path) -> None:
    modules = [file.stem for file in ROOT.glob("*.py")]
    for package in ("models", "oversmoothing", "readers", "scripts"):
        files = (file.relative_to(ROOT).with_suffix("") for file in (ROOT / package).rglob("*.py"))
        modules += [".".join(part for part in file.parts if part != "__init__") for file in files]
    assert {"main", "datasets", "models.deit", "oversmoothing.analysis.report", "readers.shards"} < set(modules)
    imports = f"sys.path.insert(0, {str(ROOT)!r})\n" + "".join(f"import {name}\n" for name in sorted(modules))
    done = run(LOOK + imports + COMPARE, tmp_path)
    assert json.loads(done.stdout) == [] and done.stderr == ""


@pytest.mark.slow
def test_the_cells_of_the_page_run_and_leave_no_trace(tmp_path: Path) -> None:
    """docs/notebook.md, as one session: a model is trained for an epoch, evaluated, and looked at."""
    tiny_tree(tmp_path / "data" / "digits")
    check = """
assert trained["loss"] > 0 and 0 <= tested["acc1"] <= 100, (trained, tested)
assert any(parameter.abs().max() > 0 for name, parameter in model.named_parameters() if name.endswith("lamb"))
assert len(report["token_similarity"]) == len(responses) == 12 and responses[0].shape == (17,)
assert len(plt.get_fignums()) == 2
print("checked")
"""
    left = {"backend", "random", "numpy", "torch", "folder"}  # figures were drawn, seeds set, analysis/ written
    done = run(LOOK + python_script(ROOT / "docs" / "notebook.md") + check + COMPARE, tmp_path)
    *_, checked, changed = done.stdout.splitlines()
    assert checked == "checked" and set(json.loads(changed)) <= left, changed
    assert sorted(os.listdir(tmp_path)) == ["analysis", "data"]
    assert (tmp_path / "analysis" / "report.html").stat().st_size > 100_000
