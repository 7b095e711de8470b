"""Norms of tokens, and which of them are outliers."""

import torch
from subjects import subject_of
from torch import Tensor, nn

from oversmoothing.analysis.layer_maps import layer_maps
from oversmoothing.analysis.measurement import measure
from oversmoothing.analysis.quantities.tokens import outliers, token_norms


def test_norms_are_euclidean() -> None:
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]]])
    assert token_norms(tokens).tolist() == [[5, 0, 13]]


def test_outliers_are_longer_than_twice_the_median_whatever_the_unit() -> None:
    norms = torch.tensor([[1.0, 1.1, 0.9, 1.0, 1.9, 2.1, 9.0, 0.1]])  # the median is 1.05
    for unit in (1.0, 1e-3, 1e4):
        assert outliers(unit * norms).tolist() == [[False] * 5 + [False, True, False]]
    assert outliers(norms, ratio=1.5).sum() == 3
    assert not outliers(torch.ones(2, 6) + 1e-5 * torch.arange(6)).any()  # nearly alike: none


def lengthen(block: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A class token and 16 patches, of which the one in row 1, column 2 becomes the longest by far."""
    output = output / output.norm(dim=-1, keepdim=True)
    output[:, 0] *= 3
    output[:, 1 + 6] *= 10
    return output


def test_one_long_patch_is_found_where_it_is() -> None:
    subject = subject_of("vit_tiny_patch16_224")
    subject.layers[1].block.register_forward_hook(lengthen)
    (result,) = measure([subject], [[torch.randn(3, 3, 32, 32)]], quantities=["tokens"])
    layer = result.layers[1]
    expected = {"token_norm_median": 1, "token_norm_max": 10, "outlier_tokens": 1}
    for name, value in expected.items():
        torch.testing.assert_close(layer[name].mean.item(), float(value), msg=name)
    assert layer["outlier_positions"].mean.nonzero().tolist() == [[1, 2]]
    torch.testing.assert_close(layer["prefix_norm"].mean, torch.tensor([3.0], dtype=torch.float64))
    image = layer_maps(subject, torch.randn(3, 32, 32), "tokens").maps["blocks.1"]
    expected = torch.ones(4, 4)
    expected[1, 2] = 10
    torch.testing.assert_close(image, expected)
