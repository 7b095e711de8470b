"""--model-kwargs attn_skip=s: the skip connection of the attention branch is weakened, and nothing else."""

import copy

import pytest
import timm
import torch
from conftest import TINY

import models
from oversmoothing.analysis import probe

NAMES = ("deit_small_12", "attnscale_small_12", "featscale_small_12", "attnfeatscale_small_12")


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """At their initial values the branches add next to nothing."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_s_times_its_input_plus_the_branch(name: str) -> None:
    assert name in models.list_models()
    model = random_weights(timm.create_model(name, attn_skip=0.7, **TINY))
    plain = timm.create_model(name, **TINY).eval()
    plain.load_state_dict(model.state_dict())  # it has no parameters of its own
    x = torch.randn(2, 17, TINY["embed_dim"])
    for block, reference in zip(model.blocks, plain.blocks, strict=True):
        branch = reference.drop_path1(reference.ls1(
            reference.attention_branch(reference.norm1(x)) if "feat" in name else reference.attn(reference.norm1(x))
        ))  # fmt: skip
        y = 0.7 * x + branch
        torch.testing.assert_close(block(x), y + reference.mlp(reference.norm2(y)), rtol=1e-4, atol=1e-4)


def test_logits_go_through_every_weakened_block_and_copies_keep_it() -> None:
    images = torch.randn(2, 3, 32, 32)
    model = random_weights(timm.create_model("featscale_small_12", attn_skip=0.7, **TINY))
    plain = timm.create_model("featscale_small_12", **TINY).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        x = plain.norm_pre(plain.patch_drop(plain._pos_embed(plain.patch_embed(images))))
        for block in plain.blocks:
            x = block(0.7 * x)
        expected = plain.forward_head(plain.norm(x))
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(copy.deepcopy(model)(images), model(images))  # as the EMA is made
        assert not torch.allclose(plain(images), expected, rtol=1e-2)


def test_tokens_grow_alike_sooner() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    similarity = {}
    for skip in (1.0, 0.5):
        torch.manual_seed(0)
        model = timm.create_model("deit_small_12", attn_skip=skip, **(TINY | {"depth": 8}))
        similarity[skip] = probe.layer_report(model, images)["token_similarity"][-1]
    assert similarity[0.5] > similarity[1.0]


def test_a_skip_of_one_is_the_model_as_it_was() -> None:
    model = timm.create_model("deit_small_12", attn_skip=1.0, **TINY)
    assert not any(block._forward_pre_hooks for block in model.blocks)
