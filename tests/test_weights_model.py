"""Models by name, from checkpoints and from published folders: what a file may decide, and what it may not."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import models  # noqa: F401  (registers the zoo with timm)
import oversmoothing
from oversmoothing.weights import (
    CheckpointError,
    ModelError,
    create_model,
    model_from_checkpoint,
    published_model,
    trained_with,
)

SIZE = dict(patch_size=8, embed_dim=24, depth=2, num_heads=2)
REMEDIES = {"gfsa": {"K": 3, "layers": "1:"}, "attnscale": {}}


def remedied(**kwargs: Any) -> torch.nn.Module:
    model = create_model(
        "vit_tiny_patch16_224", num_classes=5, input_size=32, model_kwargs=SIZE, remedies=REMEDIES, **kwargs
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def checkpoint_of(model: torch.nn.Module, **args: Any) -> dict[str, Any]:
    trained = {"model": "vit_tiny_patch16_224", "model_kwargs": SIZE, "input_size": 32}
    return {"model": model.state_dict(), "args": trained | {"remedy": oversmoothing.remedies_of(model)} | args}


def test_a_checkpoint_rebuilds_its_model_with_its_remedies() -> None:
    model, images = remedied(), torch.randn(2, 3, 32, 32)
    saved = json.loads(json.dumps(checkpoint_of(model)["args"]))  # as a checkpoint keeps it
    again = model_from_checkpoint({"model": model.state_dict(), "args": saved}, source="x.pth").eval()
    assert oversmoothing.remedies_of(again) == oversmoothing.remedies_of(model)
    assert list(again.state_dict()) == list(model.state_dict())
    assert torch.equal(again(images), model(images))


def test_arguments_win_over_what_the_file_says() -> None:
    plain = create_model("vit_tiny_patch16_224", num_classes=5, input_size=32, model_kwargs=SIZE)
    model = model_from_checkpoint(checkpoint_of(plain), source="x.pth", remedies={})
    assert oversmoothing.remedies_of(model) == {}
    with pytest.raises(CheckpointError, match="missing.*gfsa_beta"):
        model_from_checkpoint(checkpoint_of(plain), source="x.pth", remedies=REMEDIES)


def test_a_file_decides_by_plain_values_alone() -> None:
    args = {
        "model": 5,
        "input_size": "32",
        "model_kwargs": {
            **{"depth": 3, "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x"}, "checkpoint_path": "/etc/passwd"},
            **{"cache_dir": "/tmp", "pretrained": True, "features_only": True, "norm_layer": torch.nn.Identity, 3: 4},
        },
        "remedy": {"attnscale": {"lamb": 0.0, "layers": "1:", "bad": torch.zeros(1)}, "gfsa": "x"},
    }
    assert trained_with({"args": args}) == {
        "model_kwargs": {"depth": 3},
        "remedy": {"attnscale": {"lamb": 0.0, "layers": "1:"}},
    }
    for other in (None, [], "x", {"model_kwargs": [1], "remedy": 3}):
        assert trained_with({"args": other}) == {}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(name="vit_tinny"), "--model vit_tinny: no such model; near: "),
        (dict(input_size=0), "--input-size 0: give a whole number"),
        (dict(num_classes=0), "--num-classes 0: give 1 or more"),
        (dict(model_kwargs={"nonsense": 1}), "cannot be built from .*nonsense"),
        (dict(remedies={"attnscale": {"x": 1}}), "--remedy attnscale: attnscale has no option x"),
        (dict(remedies={"nonsense": {}}), "there is no remedy 'nonsense'"),
        (dict(name="xcit_nano_12_p16_224", remedies={"attnscale": {}}), "maps are between channels"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model(**{"name": "vit_tiny_patch16_224"} | kwargs)


@pytest.mark.parametrize(
    "kwargs", [{"embed_dim": 9984}, {"depth": 50}, {"mlp_ratio": 1e6}, {"depth": 10**9}, {"embed_dim": -24}]
)
def test_a_file_cannot_describe_a_model_larger_than_its_weights(kwargs: dict[str, Any]) -> None:
    """A full ViT of width 9984 would take 57 GB before its weights were compared."""
    model = create_model("vit_tiny_patch16_224", num_classes=5, input_size=32, model_kwargs=SIZE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((CheckpointError, ModelError)):
        model_from_checkpoint(checkpoint_of(model, model_kwargs=SIZE | kwargs), source="x.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_a_published_folder_gives_the_model_again(tmp_path: Path) -> None:
    model = remedied()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": SIZE | {"img_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"remedies": oversmoothing.remedies_of(model)}))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(published_model(str(tmp_path)).eval()(images), model(images))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="no readable config.json"):
        published_model(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        ([], {}, {}),
        (["gfsa"], {"K": 3, "layers": "6:"}, {"gfsa": {"K": 3, "layers": "6:"}}),
        (
            ["gfsa", "twicing"],
            {"gfsa.K": 3, "layers": "6:"},
            dict(gfsa=dict(K=3, layers="6:"), twicing=dict(layers="6:")),
        ),
    ],
)
def test_flags_become_options_of_each_remedy(names: list[str], options: dict, expected: dict) -> None:
    assert oversmoothing.remedy_options(names, options) == expected


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["gfsa", "gfsa"], {}, "named twice"),
        (["gfsa", "attnscale"], {"K": 3}, "K=3: of which remedy .* write gfsa.K=3"),
        ([], {"K": 3}, "none is named.* name a remedy"),
        (["gfsa"], {"attnscale.lamb": 3}, "of which remedy"),
    ],
)
def test_options_of_no_remedy_are_refused(names: list[str], options: dict, message: str) -> None:
    with pytest.raises(oversmoothing.RemedyError, match=message):
        oversmoothing.remedy_options(names, options)


def test_the_timm_model_is_what_it_is_without_remedies() -> None:
    torch.manual_seed(0)
    ours = create_model("deit_tiny_12", num_classes=3, input_size=32, model_kwargs=SIZE)
    torch.manual_seed(0)
    theirs = timm.create_model("deit_tiny_12", num_classes=3, img_size=32, **SIZE)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
