"""What several test files need: the golden numbers, small models, a fixed seed, the installed library."""

import ctypes
import gc
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import tqdm

tqdm.tqdm.monitor_interval = 0  # its thread holds a lock now and then, for which a forked process would wait for ever
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _give_memory_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a slow test. glibc keeps what it has freed, and the next large model comes on top of that."""
    yield
    if request.node.get_closest_marker("slow") and sys.platform == "linux":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def float64() -> None:
    """The golden numbers were computed under this default."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def little_garbage() -> Iterator[None]:
    """statsmodels collects garbage in each Holm correction, which takes 0.15 s with torch loaded: leave that out."""
    gc.freeze()
    yield
    gc.unfreeze()


def golden_json(name: str) -> dict | list:
    """A file of the reference's numbers; the test is skipped where the folder is absent."""
    path = GOLDEN / name
    if not path.is_file():
        pytest.skip(f"the reference's numbers are not here ({path}); they do not come with a clone")
    return json.loads(path.read_text())


def golden_rules() -> ModuleType:
    """``golden_rules.py``: the deterministic weights and images behind the numbers."""
    path = GOLDEN / "golden_rules.py"
    if not path.is_file():
        pytest.skip(f"the reference's numbers are not here ({path}); they do not come with a clone")
    spec = importlib.util.spec_from_file_location("golden_rules", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what ``pip install .`` installs and nothing else: on ``PYTHONPATH`` it is the library."""
    folder = tmp_path_factory.mktemp("library")
    source, library = folder / "source", folder / "installed"
    wanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "data", "docs", "logs", "tests")
    shutil.copytree(ROOT, source, ignore=wanted)  # setuptools writes into its source
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    for step in (
        ["wheel", str(source), "--no-build-isolation", "--wheel-dir", str(folder)],
        ["install", str(folder / "vit_anti_oversmoothing-1.0.0-py3-none-any.whl"), "--target", str(library)],
    ):
        done = subprocess.run([*pip, *step, *offline], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return library
