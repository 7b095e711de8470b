"""What several test files need: the golden numbers, small models, a fixed seed."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> None:
    """The golden numbers were computed under this default."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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
