"""The attention rollout on maps whose product is known."""

import math

import architectures
import pytest
import torch
from subjects import dense_maps, subject_of

from oversmoothing.analysis.layer_maps import layer_maps
from oversmoothing.analysis.measurement import measure
from oversmoothing.analysis.quantities.rollout import rollout_step
from oversmoothing.analysis.subject import subject_of as subject_of_model
from oversmoothing.analysis.token_map import token_map


def test_rollout_of_uniform_maps_and_of_the_identity() -> None:
    identity, uniform = torch.eye(5)[None], torch.full((1, 5, 5), 0.2)
    rollout = None
    for t in range(1, 5):
        rollout = rollout_step(rollout, uniform)
        torch.testing.assert_close(rollout, (1 - 2.0**-t) * uniform + 2.0**-t * identity)
    torch.testing.assert_close(rollout_step(rollout, identity), rollout)


def test_later_layers_multiply_from_the_left() -> None:
    first, second = torch.tensor([[[0.0, 1], [0, 1]]]), torch.tensor([[[1.0, 0], [1, 0]]])
    expected = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]])  # [[1, 0], [.5, .5]] @ [[.5, .5], [0, 1]]
    torch.testing.assert_close(rollout_step(rollout_step(None, first), second), expected)


def test_a_model_with_uniform_attention() -> None:
    subject = subject_of("vit_tiny_patch16_224")
    for layer in subject.layers:
        torch.nn.init.zeros_(layer.attn.qkv.weight)
    (result,) = measure([subject], [[torch.randn(2, 3, 32, 32)]], quantities=["rollout"])
    for index, layer in enumerate(result.layers):
        assert layer["rollout_entropy"].mean.item() == pytest.approx(math.log(16), rel=1e-5)
        # The identity's part is left of the high-pass: 2^-t on every frequency but zero.
        assert layer["rollout_high_frequency_response"].mean.item() == pytest.approx(0.5 ** (index + 1), rel=1e-5)


def test_attnscales_maps_are_used_and_cait_is_named() -> None:
    subject, image = subject_of("attnscale_small_12"), torch.randn(3, 32, 32)
    with torch.no_grad():
        for layer in subject.layers:
            layer.attn.lamb.copy_(torch.tensor([-0.2, 0.3, 0.9]))
            layer.attn.qkv.weight.mul_(5)
    ours = layer_maps(subject, image, "rollout").maps["blocks.2"]
    rollout = torch.eye(17)
    for maps in dense_maps(subject.model, image[None]):
        rollout = (maps[0].mean(dim=0) + torch.eye(17)) / 2 @ rollout
    row = rollout[0, 1:]
    torch.testing.assert_close(ours.flatten(), 16 * row / row.sum(), rtol=1e-4, atol=1e-5)
    (result,) = measure([subject_of("cait_xxs24_224")], [[image[None]]], quantities=["rollout"])
    assert "their rows do not sum to one; the softmax is used" in result.left_out["rollout"]["blocks.0"]
    assert all("rollout_entropy" in layer for layer in result.layers)


def test_registers_alone_are_no_class_token() -> None:
    subject = subject_of("vit_tiny_patch16_224", class_token=False, reg_tokens=2, global_pool="avg")
    image = torch.randn(3, 32, 32)
    rollout = torch.eye(18)
    for maps in dense_maps(subject.model, image[None]):
        rollout = (maps[0].mean(dim=0) + torch.eye(18)) / 2 @ rollout
    row = rollout[:, 2:].mean(dim=0)
    ours = layer_maps(subject, image, "rollout").maps["blocks.2"]
    torch.testing.assert_close(ours.flatten(), 16 * row / row.sum(), rtol=1e-4, atol=1e-5)
    assert token_map(subject, image, -1).query == "mean over all queries"


def test_windows_have_no_rollout_and_say_so() -> None:
    subject = subject_of_model(architectures.build("swin"), "swin", 32)
    (result,) = measure([subject], [[architectures.images("swin")]], quantities=["rollout"])
    assert set(result.left_out["rollout"].values()) == {"its attention is in windows", "a layer before is left out"}
    assert not any("rollout_entropy" in layer for layer in result.layers)
