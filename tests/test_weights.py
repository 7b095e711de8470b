"""Weights into models: the account of every name, fine-tuning to other shapes, and what a run is resumed from."""

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from states import small_vit, training_state

import checkpoints
from oversmoothing.weights import CheckpointError, load_weights, number_of_classes


@pytest.fixture
def state() -> dict[str, Any]:
    return training_state()


def is_lamb(name: str) -> bool:
    return name.rpartition(".")[2] in ("lamb", "lamb1", "lamb2")


class Scaled(torch.nn.Module):
    """A block with a remedy's parameter beside it."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.attn, self.norm1, self.norm2, self.mlp = block.attn, block.norm1, block.norm2, block.mlp
        self.lamb = torch.nn.Parameter(torch.zeros(2))


def vit_with_lamb() -> torch.nn.Module:
    model = small_vit()
    model.blocks = torch.nn.Sequential(*[Scaled(block) for block in model.blocks])
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2),
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=2),
        lambda: timm.create_model("cait_xxs24_224", img_size=32, patch_size=8, depth=2),
    ],
    ids=["vit", "distilled", "cait"],
)
def test_a_models_own_weights_load_strictly(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source, model = build(), build()
    assert load_weights(model, source.state_dict(), source="x.pth") == []
    torch.testing.assert_close(dict(model.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    count = len(source.state_dict())
    assert caplog.messages == [f"loaded {count} of {count} tensors from x.pth"]


def test_only_the_names_the_caller_allows_may_be_missing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plain, variant = small_vit().state_dict(), vit_with_lamb()
    missing = load_weights(variant, plain, source="x.pth", may_be_missing=is_lamb)
    assert missing == ["blocks.0.lamb", "blocks.1.lamb"]
    assert caplog.messages[0].endswith("from x.pth; left at initial value: blocks.*.lamb (2)")
    with pytest.raises(CheckpointError, match=r"2 missing: blocks\.0\.lamb, blocks\.1\.lamb: is it .* another --model"):
        load_weights(variant, plain, source="x.pth")
    with pytest.raises(CheckpointError, match=r"2 unexpected: blocks\.0\.lamb"):
        load_weights(small_vit(), variant.state_dict(), source="x.pth", may_be_missing=is_lamb)
    del plain["norm.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: norm\.bias"):
        load_weights(variant, plain, source="x.pth", may_be_missing=is_lamb, finetune=True)


def test_a_refused_file_changes_nothing_and_lists_ten_names_of_many() -> None:
    model = small_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {**small_vit(depth=4).state_dict(), "norm.weight": torch.ones(5)}
    with pytest.raises(CheckpointError, match=r"24 unexpected: (\S+, ){10}\.\.\.; 1 of another shape: norm\.weight"):
        load_weights(model, other, source="x.pth")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "cait_xxs24_224"])
def test_finetune_leaves_out_a_classifier_of_other_classes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model, source = small_vit(name), small_vit(name, num_classes=7)
    before = model.head.weight.clone()
    with pytest.raises(CheckpointError, match=r"of another shape: head\.weight \(7, 32\) in the file.*with --finetune"):
        load_weights(model, source.state_dict(), source="x.pth")
    missing = load_weights(model, source.state_dict(), source="x.pth", finetune=True)
    heads = ["head", "head_dist"] if "distilled" in name else ["head"]
    assert missing == [f"{head}.{end}" for head in heads for end in ("weight", "bias")]
    assert torch.equal(model.head.weight, before) and torch.equal(model.pos_embed, source.pos_embed)
    assert "dropped head (7 classes in the file, 10 in the model)" in caplog.text
    same_classes = small_vit(name, num_classes=7)
    assert load_weights(same_classes, source.state_dict(), source="x.pth", finetune=True) == []


@pytest.mark.parametrize(
    ("name", "prefix"), [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2), ("cait_xxs24_224", 0)]
)
@pytest.mark.parametrize("new_size", [48, 24, (32, 64)], ids=str)
def test_finetune_interpolates_position_embeddings_as_deit_does(
    name: str, prefix: int, new_size: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model, source = small_vit(name, img_size=new_size), small_vit(name)
    with pytest.raises(CheckpointError, match=r"of another shape: pos_embed.*with --finetune"):
        load_weights(model, source.state_dict(), source="x.pth")
    assert load_weights(model, source.state_dict(), source="x.pth", finetune=True) == []
    grid = model.patch_embed.grid_size
    patches = source.pos_embed[:, prefix:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    expected = torch.cat([source.pos_embed[:, :prefix], patches.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(model.pos_embed, expected)
    assert f"interpolated pos_embed from 4x4 to {grid[0]}x{grid[1]}" in caplog.text


def test_finetune_takes_a_distilled_checkpoint_into_a_plain_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    distilled = small_vit("deit_tiny_distilled_patch16_224", num_classes=7)
    for img_size in (32, 48):
        model = small_vit("deit_tiny_patch16_224", img_size=img_size)
        assert load_weights(model, distilled.state_dict(), source="x", finetune=True) == ["head.weight", "head.bias"]
        assert torch.equal(model.pos_embed[:, 0], distilled.pos_embed[:, 0])
    assert "dropped dist_token and head_dist" in caplog.text
    model = small_vit("deit_tiny_patch16_224", num_classes=7)
    with pytest.raises(CheckpointError, match=r"3 unexpected: dist_token, .*with --finetune"):
        load_weights(model, distilled.state_dict(), source="x")
    load_weights(model, distilled.state_dict(), source="x", finetune=True)
    assert torch.equal(model.pos_embed[:, 1:], distilled.pos_embed[:, 2:])
    with pytest.raises(CheckpointError, match="missing: dist_token, head_dist"):  # the other way round is no fine-tune
        load_weights(distilled, model.state_dict(), source="x", finetune=True)


def test_finetune_does_not_excuse_another_model() -> None:
    for other in (small_vit(embed_dim=48), small_vit(patch_size=16), small_vit("cait_xxs24_224")):
        with pytest.raises(CheckpointError, match="another --model"):
            load_weights(small_vit(), other.state_dict(), source="x", finetune=True)


# ---- resuming ----


def test_a_full_state_is_resumed_and_anything_less_gives_weights_only(state: dict[str, Any]) -> None:
    assert checkpoints.can_resume(state, missing=[])
    assert not checkpoints.can_resume(state, missing=["blocks.0.attn.lamb"])
    assert not checkpoints.can_resume({"model": state["model"], "epoch": 3}, missing=[])
    assert not checkpoints.can_resume({"model": state["model"], "optimizer": state["optimizer"]}, missing=[])


def test_the_optimizer_takes_moments_from_the_file_and_settings_from_the_command_line(state: dict[str, Any]) -> None:
    model = small_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=7e-4, weight_decay=0.3, betas=(0.8, 0.9))
    checkpoints.load_optimizer(optimizer, state["optimizer"])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (7e-4, 0.3, (0.8, 0.9))
    for index, parameter in enumerate(model.parameters()):
        torch.testing.assert_close(optimizer.state[parameter], state["optimizer"]["state"][index])
    with pytest.raises(CheckpointError, match=r"groups of sizes \[\d+\], this run's has \[\d+, \d+\]"):
        two_groups = [{"params": list(model.parameters())[:3]}, {"params": list(model.parameters())[3:]}]
        checkpoints.load_optimizer(torch.optim.AdamW(two_groups), state["optimizer"])
    with pytest.raises(
        CheckpointError, match="does not fit --opt .SGD.: 'momentum_buffer' .* is missing, not a float32"
    ):
        checkpoints.load_optimizer(torch.optim.SGD(model.parameters(), momentum=0.9), state["optimizer"])


def test_a_resumed_optimizer_makes_the_step_an_uninterrupted_one_makes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = torch.randn(3, 2, 3, 32, 32)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()

    model = small_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for images in batches[:2]:
        step(model, optimizer, images)
    state = checkpoints.assemble(
        model=model, model_ema=None, optimizer=optimizer, scaler=None, epoch=-1, step=2, meters={}, max_accuracy={},
        args=argparse.Namespace(),
    )  # fmt: skip
    checkpoints.save(state, tmp_path)
    step(model, optimizer, batches[2])

    _, state = checkpoints.latest(tmp_path)
    resumed = small_vit()
    assert load_weights(resumed, state["model"], source="checkpoint.pth") == []
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    checkpoints.load_optimizer(resumed_optimizer, state["optimizer"])
    step(resumed, resumed_optimizer, batches[2])
    torch.testing.assert_close(dict(resumed.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_number_of_classes() -> None:
    assert number_of_classes(small_vit().state_dict()) == 10
    assert number_of_classes(small_vit(num_classes=0).state_dict()) is None
    assert number_of_classes({"head.fc.weight": torch.zeros(7, 4)}) == 7  # Swin's
