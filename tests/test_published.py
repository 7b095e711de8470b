"""pretrained=True: the published weights of a model, or another source of one's own, through timm's mechanics."""

import argparse
import hashlib
import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import LocalHub, serving, use
from huggingface_hub import constants
from runs import ROOT, environment
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import models
from models import published
from oversmoothing.weights import CheckpointError

# A small geometry under the published models' names; heads must divide the width of each.
SIZE = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
ATTNSCALE = "attnscale_small_12"


def trained(name: str, **kwargs: Any) -> nn.Module:
    """A model whose every parameter has moved, the remedy's too."""
    torch.manual_seed(1)
    model = timm.create_model(name, **{**SIZE, **kwargs})
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def deit_style(module: nn.Module, **changes: Any) -> bytes:
    """The bytes of a checkpoint as DeiT's main.py saves it; its EMA differs from its weights."""
    average = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}
    content = {
        "model": module.state_dict(), "optimizer": torch.optim.AdamW(module.parameters()).state_dict(), "epoch": 299,
        "lr_scheduler": {"base_values": [5e-4]}, "model_ema": average, "scaler": {},
        "args": argparse.Namespace(model="x", lr=5e-4),
    }  # fmt: skip
    with io.BytesIO() as file:
        torch.save(content | changes, file)
        return file.getvalue()


def logits(model: nn.Module, channels: int = 3, pixels: int = 32) -> Tensor:
    images = torch.randn(2, channels, pixels, pixels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The authors' repository with each of its four files."""
    with serving(LocalHub()) as instance:
        use(instance, tmp_path, monkeypatch)
        for name, file in published.FILES.items():
            instance.add(published.REPOSITORY, file, deit_style(trained(name)))
        yield instance


@pytest.mark.parametrize("name", published.FILES)
def test_the_published_weights_are_loaded_and_come_from_the_cache_offline(
    name: str, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    expected = logits(trained(name))
    model = timm.create_model(name, pretrained=True, **SIZE)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)  # and not the EMA
    assert f"hf-hub:{published.REPOSITORY}/{published.FILES[name]}" in caplog.text
    assert "state_dict" not in model.pretrained_cfg and model.pretrained_cfg["hf_hub_id"] == published.REPOSITORY
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(logits(timm.create_model(name, pretrained=True, **SIZE)), expected, rtol=0, atol=0)


def test_timm_lists_exactly_the_published_models_as_pretrained() -> None:
    ours = set(models.list_models())
    assert ours & set(timm.list_models(pretrained=True)) == set(published.FILES) <= ours


@pytest.mark.parametrize("name", [ATTNSCALE, "featscale_cait_XXS24_224"])
def test_timms_adaptations_work(name: str, hub: LocalHub) -> None:
    source = trained(name)
    body = {n: t for n, t in source.state_dict().items() if not n.startswith("head.")}

    def is_body(model: nn.Module) -> bool:
        state = model.state_dict()
        return all(torch.equal(state[n], t) for n, t in body.items() if n != "patch_embed.proj.weight")

    ten = timm.create_model(name, pretrained=True, num_classes=10, **SIZE)
    assert is_body(ten) and ten.head.weight.shape == (10, 24) and torch.equal(ten.head.bias, torch.zeros(10))
    assert is_body(timm.create_model(name, pretrained=True, num_classes=0, **SIZE))
    grey = timm.create_model(name, pretrained=True, in_chans=1, **SIZE)
    assert is_body(grey)
    summed = source.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.patch_embed.proj.weight, summed)
    features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0, 1), **SIZE)
    assert [f.shape for f in features(torch.randn(1, 3, 32, 32))] == [(1, 24, 4, 4)] * 2
    assert not any("state_dict" in getattr(m, "pretrained_cfg", {}) for m in features.modules())


@pytest.mark.parametrize("shape", [(10, 24), (1000, 12), (24,), ()])
def test_another_head_is_tolerated_for_another_number_of_classes_only(shape: tuple, tmp_path: Path) -> None:
    """The model has the 1,000 classes that the weights are said to have, so nothing of them may differ."""
    state = trained(ATTNSCALE).state_dict() | {"head.weight": torch.zeros(shape)}
    torch.save(state, tmp_path / "other.pth")
    source = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "other.pth")), **SIZE)
    with pytest.raises(CheckpointError, match=r"1 of another shape: head\.weight .* in the file, \(1000, 24\)"):
        timm.create_model(ATTNSCALE, **source)
    assert timm.create_model(ATTNSCALE, num_classes=10, **source).head.weight.shape == (10, 24)


@pytest.mark.parametrize("entry", ["patch_embed.proj.weight", "pos_embed", "head.weight", "blocks.0.attn.qkv.weight"])
@pytest.mark.parametrize(
    "value", [torch.zeros(()), torch.zeros(7), torch.zeros(1, 2, 3, 4, 5)], ids=["0-d", "1-d", "5-d"]
)
def test_weights_of_impossible_shapes_are_explained(entry: str, value: Tensor, tmp_path: Path) -> None:
    torch.save(trained(ATTNSCALE).state_dict() | {entry: value}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="pretrained weights do not fit attnscale_small_12"):
        timm.create_model(
            ATTNSCALE, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "other.pth")), **SIZE
        )


def test_a_source_of_ones_own_takes_the_place_of_the_published_one(hub: LocalHub, tmp_path: Path) -> None:
    other = trained(ATTNSCALE, num_classes=5)
    (tmp_path / "own.pth").write_bytes(deit_style(other))
    hub.add("ann/own", "checkpoint.pth", deit_style(other))
    for name in (ATTNSCALE, "attnscale_base_12"):  # one with published weights, one without
        for source in (
            {"file": str(tmp_path / "own.pth")},
            {"hf_hub_id": "ann/own", "hf_hub_filename": None},
            {"url": f"{hub.address}/large/{sha256(hub, 'ann/own', 'checkpoint.pth')}", "hf_hub_id": None},
        ):
            overlay = {"num_classes": 5, **source}
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SIZE)
            torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=0)


def sha256(hub: LocalHub, repository: str, name: str) -> str:
    return hashlib.sha256(hub.repositories[repository][name]).hexdigest()


@pytest.mark.parametrize(
    ("variant", "plain"),
    [
        ("attnfeatscale_base_12", "deit_small_patch16_224"),
        ("featscale_base_12", "deit_small_12"),
        ("attnscale_cait_S24", "cait_s24_224"),
    ],
)
def test_plain_weights_give_a_variant_that_computes_the_same(
    variant: str, plain: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    baseline = trained(plain)
    (tmp_path / "plain.pth").write_bytes(deit_style(baseline))
    overlay = {"file": str(tmp_path / "plain.pth")}
    model = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, **SIZE)
    torch.testing.assert_close(logits(model), logits(baseline))
    assert "plain weights: the remedy's" in caplog.text


def test_a_model_without_published_weights_says_which_have_some(hub: LocalHub) -> None:
    with pytest.raises(CheckpointError) as caught:
        timm.create_model("featscale_base_24", pretrained=True)
    assert all(name in str(caught.value) for name in ("featscale_base_24", *published.FILES, "--finetune"))
    assert not hub.requests


def test_a_file_that_is_not_there_is_answered_with_those_that_are(hub: LocalHub) -> None:
    files = hub.repositories[published.REPOSITORY]
    files["renamed.pth"] = files.pop(published.FILES[ATTNSCALE])
    with pytest.raises(CheckpointError, match=r"no attnscale_small_12\.pth in that .* its weights: .*renamed\.pth"):
        timm.create_model(ATTNSCALE, pretrained=True, **SIZE)
    overlay = {"hf_hub_filename": "renamed.pth"}
    model = timm.create_model(ATTNSCALE, pretrained=True, pretrained_cfg_overlay=overlay, **SIZE)
    torch.testing.assert_close(logits(model), logits(trained(ATTNSCALE)), rtol=0, atol=0)


@pytest.mark.parametrize("num_classes", [1000, 10])
def test_names_and_shapes_are_strict_whatever_the_number_of_classes(num_classes: int, hub: LocalHub) -> None:
    weights = trained(ATTNSCALE).state_dict()
    for changed, message in (
        ({n: t for n, t in weights.items() if n != "norm.bias"}, r"1 missing: norm\.bias"),
        (weights | {"extra": torch.ones(1)}, "1 unexpected: extra"),
        (weights | {"norm.bias": torch.ones(7)}, r"1 of another shape: norm\.bias \(7,\) in the file, \(24,\)"),
        ({n: t for n, t in weights.items() if "lamb" not in n}, r"2 missing: blocks\.0\.attn\.lamb"),
    ):
        hub.add(published.REPOSITORY, published.FILES[ATTNSCALE], deit_style(trained(ATTNSCALE), model=changed))
        with pytest.raises(CheckpointError, match=f"do not fit attnscale_small_12; {message}.*another model"):
            timm.create_model(ATTNSCALE, pretrained=True, num_classes=num_classes, **SIZE)


def test_the_average_of_a_run_is_not_taken_silently(tmp_path: Path) -> None:
    """timm's own reader prefers the EMA of a training checkpoint."""
    model = trained(ATTNSCALE)
    average = ModelEmaV3(model).module
    average.head.bias.data.fill_(9)
    (tmp_path / "x.pth").write_bytes(deit_style(model, model_ema=average.state_dict()))
    overlay = {"file": str(tmp_path / "x.pth")}
    loaded = timm.create_model(ATTNSCALE, pretrained=True, pretrained_cfg_overlay=overlay, **SIZE)
    assert torch.equal(loaded.head.bias, model.head.bias)


IN_A_NEW_PROCESS = """
import sys, torch
model = torch.hub.load(sys.argv[1], "attnscale_small_12", source="local", pretrained=True, img_size=32, patch_size=8,
                       embed_dim=24, depth=2, num_heads=2)
print(repr(model.head.bias[:2].tolist()))
"""


@pytest.mark.slow
def test_a_new_process_finds_the_weights_offline_through_torch_hub(hub: LocalHub, tmp_path: Path) -> None:
    expected = timm.create_model(ATTNSCALE, pretrained=True, **SIZE).head.bias[:2].tolist()
    hub.requests.clear()
    variables = environment(HF_HUB_OFFLINE="1", **hub.environment(tmp_path))
    words = [sys.executable, "-c", IN_A_NEW_PROCESS, str(ROOT)]
    done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == repr(expected), done.stderr
    assert not hub.requests
