"""The attention distance on grids and maps whose answer is known."""

import math

import architectures
import pytest
import torch
from subjects import subject_of
from torch import nn

from oversmoothing.analysis.measurement import measure
from oversmoothing.analysis.quantities.distance import attention_distance, patch_distances
from oversmoothing.analysis.subject import subject_of as subject_of_model


def uniform(attn: nn.Module) -> None:
    """Zero queries, keys and position biases: every key gets the same attention."""
    with torch.no_grad():
        for name, parameter in attn.named_parameters():
            if name.startswith("qkv") or "bias_table" in name:
                parameter.zero_()


def test_distances_between_the_centres_of_a_grid() -> None:
    root = math.sqrt(2)
    expected = [[0, 1, 1, root], [1, 0, root, 1], [1, root, 0, 1], [root, 1, 1, 0]]
    torch.testing.assert_close(patch_distances(2, 2), torch.tensor(expected, dtype=torch.float64))
    assert patch_distances(2, 3, height=16, width=8)[0].tolist() == [
        0,
        8,
        16,
        16,
        math.hypot(16, 8),
        math.hypot(16, 16),
    ]


def test_identity_uniform_and_one_far_patch() -> None:
    distances = patch_distances(1, 3, width=16)
    assert attention_distance(torch.eye(3), distances) == 0
    torch.testing.assert_close(attention_distance(torch.full((3, 3), 1 / 3), distances).item(), 16 * 8 / 9)
    assert attention_distance(torch.tensor([[0.0, 0, 1]] * 3), distances) == 16  # (32 + 16 + 0) / 3


def test_prefix_tokens_are_left_out_and_rows_are_renormalised() -> None:
    distances = patch_distances(1, 2, width=8)
    row = [0.6, 0.3, 0.1]  # class token, then two patches: a quarter of what remains is on the second
    attn = torch.tensor([[1.0, 0, 0], row, row])
    torch.testing.assert_close(attention_distance(attn, distances).item(), (0.25 * 8 + 0.75 * 8) / 2)
    assert attention_distance(torch.tensor([[1.0, 0, 0]] * 3), distances) == 0  # all on the class token


def test_a_vit_that_attends_uniformly() -> None:
    subject = subject_of("vit_tiny_patch16_224")
    uniform(subject.layers[1].attn)
    (result,) = measure([subject], [[torch.randn(2, 3, 32, 32)]], quantities=["distance"])
    mean = patch_distances(4, 4, 8, 8).mean()
    torch.testing.assert_close(result.layers[1]["attention_distance"].mean, mean.expand(3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_windows_have_the_patch_size_of_their_stage(name: str) -> None:
    model = architectures.build(name)
    subject = subject_of_model(model, name, 32)
    for layer in subject.layers:
        uniform(layer.attn)
        if name == "swinv2":
            nn.init.zeros_(layer.attn.cpb_mlp[-1].weight)  # the same position bias everywhere
    (result,) = measure([subject], [[architectures.images(name)]], quantities=["distance"])
    for index, pixels in ((0, 2), (2, 4)):  # the first blocks of both stages, whose windows are not shifted
        mean = patch_distances(4, 4, pixels, pixels).mean()
        torch.testing.assert_close(result.layers[index]["attention_distance"].mean.mean(), mean, rtol=1e-5, atol=0)


def test_where_the_grid_is_unknown_the_block_is_named() -> None:
    subject = subject_of_model(architectures.build("hiera"), "hiera", 64)
    (result,) = measure([subject], [[architectures.images("hiera")]], quantities=["distance"])
    assert result.left_out["distance"] == dict.fromkeys(
        ["blocks.0", "blocks.3"], "where its tokens lie on the image is unknown"
    )
    assert all("attention_distance" not in layer for layer in result.layers)
