"""The two halves of the house: which part may import which, and the library as others install it."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, TINY, environment, tiny_tree

# Of the training repository; users have modules of these names.
NOT_INSTALLED = ("datasets", "utils", "build", "options", "models", "readers", "engine", "main", "scripts")


def test_the_arrows_point_down() -> None:
    """The contracts of pyproject.toml, by import-linter."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " 0 broken" in done.stdout, done.stdout + done.stderr


def run(script: str, library: Path, folder: Path) -> str:
    """Runs a user's script that lies in ``folder``, with the library installed and no checkout in reach."""
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, folder / "script.py"], cwd=folder, env=environment(PYTHONPATH=str(library)),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_library_alone(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert names == {"oversmoothing", "vit_anti_oversmoothing-1.0.0.dist-info"}
    in_checkout = {path.relative_to(ROOT / "oversmoothing") for path in (ROOT / "oversmoothing").rglob("*.py")}
    in_checkout |= {Path("zoo", path.name) for path in (ROOT / "models").glob("*.py")}
    assert {path.relative_to(installed / "oversmoothing") for path in installed.rglob("*.py")} == in_checkout


@pytest.mark.slow
def test_the_installed_library_works_beside_a_users_own_modules(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("MINE = 'utils'\n")
    (tmp_path / "datasets.py").write_text("MINE = 'datasets'\n")
    script = f"""
import importlib.util, sys
import oversmoothing
early = [name for name in ("matplotlib", "webdataset", "submitit") if name in sys.modules]
assert not early, early
sys.modules["matplotlib"] = None  # importing it raises ImportError
try:
    import oversmoothing.analysis.figures
except ImportError as error:
    assert str(error).endswith("pip install vit-anti-oversmoothing[analysis]"), error
else:
    raise AssertionError("figures were imported without matplotlib")
del sys.modules["matplotlib"]

import timm, torch
import oversmoothing.zoo
from oversmoothing.analysis import analyze
from oversmoothing.weights import read_checkpoint
from torch.utils.data import DataLoader, TensorDataset

import datasets, utils
assert (datasets.MINE, utils.MINE) == ("datasets", "utils")
others = set({NOT_INSTALLED!r}) - {{"datasets", "utils"}}
found = [name for name in sorted(others) if importlib.util.find_spec(name)]
assert not found, found
assert {str(ROOT)!r} not in sys.path and {str(installed)!r} in oversmoothing.__file__

size = dict(embed_dim=48, depth=3, num_heads=3, patch_size=8, img_size=32, num_classes=7)
model = timm.create_model("attnscale_small_12", **size)
torch.save({{"model": {{f"module.{{name}}": tensor for name, tensor in model.state_dict().items()}}}}, "saved.pth")
read = read_checkpoint("saved.pth")["model"]
assert list(read) == list(model.state_dict()) and all(torch.equal(read[n], t) for n, t in model.state_dict().items())

mine = timm.create_model("vit_tiny_patch16_224", **size)
loader = DataLoader(TensorDataset(torch.randn(6, 3, 32, 32), torch.zeros(6)), batch_size=4)
analysis = analyze({{"mine": mine, "with AttnScale": model}}, loader, "seen")
assert [result.label for result in analysis.results] == ["mine", "with AttnScale"]
assert [len(result.layers) for result in analysis.results] == [3, 3] and analysis.results[0].num_images == 6
print(analysis.report)
"""
    assert run(script, installed, tmp_path).strip() == "seen/report.html"
    page = (tmp_path / "seen" / "report.html").read_text()
    assert "with AttnScale" in page and page.count("data:image/png") >= 5
    assert {"analysis.csv", "analysis.json", "overview.png"} <= {path.name for path in (tmp_path / "seen").iterdir()}


@pytest.mark.slow
def test_training_on_a_folder_of_images_needs_no_extras(tmp_path: Path) -> None:
    """webdataset for shards, submitit for its launcher, matplotlib for figures, ONNX for the export, W&B."""
    flags = [*TINY, "--data-path", str(tiny_tree(tmp_path / "data", train=4, val=4))]
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in ("webdataset", "submitit", "matplotlib", "onnx", "wandb"):
    sys.modules[name] = None  # importing it raises ImportError
sys.argv = ["main.py", *{flags!r}]

import main
sys.exit(main.cli())
"""
    assert "Accuracy of the network on the 4 test images" in run(script, tmp_path, tmp_path)
