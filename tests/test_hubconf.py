"""hubconf.py: torch.hub finds, explains and builds every model of the zoo."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT

import models

GITHUB = "owner/repository:main"


@pytest.fixture(autouse=True)
def _as_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This repository where torch.hub puts one that it has downloaded."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "owner_repository_main").symlink_to(ROOT)


def test_every_model_and_nothing_else_is_listed_and_explained() -> None:
    assert sorted(torch.hub.list(GITHUB, trust_repo=True)) == sorted(models.list_models())
    for name in ("deit_tiny_12", "attnscale_small_12", "featscale_cait_M48"):
        text = torch.hub.help(GITHUB, name, trust_repo=True)
        assert text.startswith(f"{name}: timm's ``") and "pretrained: " in text


@pytest.mark.parametrize("name", ["deit_tiny_12", "attnfeatscale_small_24", "featscale_cait_XXS24_224"])
@pytest.mark.parametrize(
    "where", [{"repo_or_dir": GITHUB, "trust_repo": True}, {"repo_or_dir": str(ROOT), "source": "local"}]
)
def test_a_model_is_built_with_arguments_of_ones_own(name: str, where: dict[str, Any]) -> None:
    model = torch.hub.load(**where, model=name, img_size=32, patch_size=8, depth=2, num_classes=7)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_without_published_weights_pretrained_says_so() -> None:
    with pytest.raises(ValueError, match="no weights are published for deit_tiny_12"):
        torch.hub.load(str(ROOT), "deit_tiny_12", source="local", pretrained=True)


def imported_by(file: Path) -> Iterator[tuple[Path, str]]:
    """(Folder, dotted name) of what a file imports when it is imported, and of what may be a module inside it."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from ((ROOT, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = file.parents[node.level - 1] if node.level else ROOT
            yield from ((folder, ".".join(filter(None, [node.module, alias.name]))) for alias in node.names)


def test_dependencies_are_the_packages_that_are_imported() -> None:
    """torch.hub looks for these before it imports anything; one left out is an ImportError deep inside."""
    imported, seen, files = set(), set(), [ROOT / "hubconf.py"]
    while files:
        file = files.pop()
        seen.add(file)
        for folder, name in imported_by(file):
            parts = name.split(".")
            paths = [folder.joinpath(*parts[:length]) for length in range(1, len(parts) + 1)]
            found = [f for path in paths for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()]
            files += [path for path in found if path not in seen]
            if not found and folder == ROOT and parts[0] not in sys.stdlib_module_names:
                imported.add(parts[0])
    tree = ast.parse(Path(ROOT / "hubconf.py").read_text())
    [listed] = [ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)]
    assert sorted(listed) == sorted(imported)
