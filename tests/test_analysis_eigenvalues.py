"""Eigenvalues of the value-output products, and where the weights of both are found."""

import architectures
import pytest
import torch
from torch import Tensor

from oversmoothing.analysis import analyze, probe
from oversmoothing.analysis.measurement import measure
from oversmoothing.analysis.quantities.eigenvalues import negative_share, value_output_eigenvalues
from oversmoothing.analysis.subject import subject_of
from oversmoothing.attention import merge_heads


def assert_same_set(found: Tensor, expected: list[complex]) -> None:
    def ordered(values: list[complex]) -> list[complex]:
        return sorted(values, key=lambda v: (round(v.real, 6), round(v.imag, 6)))

    assert ordered(found.tolist()) == pytest.approx(ordered(expected))


def test_known_eigenvalues_of_two_heads_and_of_their_sum() -> None:
    output = torch.block_diag(2 * torch.tensor([[1.0, -1], [1, 1]]), torch.tensor([[3.0, 5], [0, -1]]))
    basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    value, output = basis, basis.T @ output  # W_V W_O in another basis of the channels
    heads, whole = value_output_eigenvalues(value, output, num_heads=2)
    assert_same_set(heads[0], [2 + 2j, 2 - 2j])
    assert_same_set(heads[1], [3, -1])
    assert_same_set(whole, [2 + 2j, 2 - 2j, 3, -1])
    torch.testing.assert_close(heads.abs()[:, 0], torch.tensor([8**0.5, 3], dtype=torch.float64), rtol=1e-5, atol=0)
    assert negative_share(heads).tolist() == [0, 0.5]


@pytest.mark.parametrize("num_heads", [1, 4])
def test_the_small_product_has_the_eigenvalues_of_the_large_one(num_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    value, output = torch.randn(8, 12, generator=generator), torch.randn(12, 8, generator=generator)
    heads, whole = value_output_eigenvalues(value, output, num_heads)
    d = 8 // num_heads
    for head, found in enumerate(heads):
        part = slice(head * d, (head + 1) * d)
        large = torch.linalg.eigvals(output[:, part].double() @ value[part].double())
        assert_same_set(found, large[large.abs().argsort(descending=True)[:d]].tolist())
    large = torch.linalg.eigvals(output.double() @ value.double())
    assert_same_set(whole, large[large.abs().argsort(descending=True)[:8]].tolist())


KNOWN = "vit eva eva02 dinov3 beit relpos convit cait swin swinv2 volo hiera sam davit hf_dinov3 hf_clip".split()


@pytest.mark.parametrize("name", KNOWN)
def test_the_weights_of_a_kind_are_those_between_input_and_output(name: str) -> None:
    model = (architectures.build_transformers if name in architectures.TRANSFORMERS else architectures.build)(name)
    checked = []

    def visit(view: probe.LayerView) -> None:
        attn, kind, heads = view.layer.attn, view.layer.kind, view.heads()
        value, output = kind.value_weights(attn)
        # Values are the input's product with the weight, plus the same bias for every token.
        x = heads.x.flatten(0, -2) @ value.T
        found = kind.unprojected(attn, heads.v, heads).flatten(0, -2)
        torch.testing.assert_close(found - x, (found - x)[:1].expand_as(x))
        other = torch.randn_like(heads.v)
        outputs = [kind.merge(attn, y, heads) for y in (heads.v, other)]
        first, second = (y[0] if isinstance(y, tuple) else y for y in outputs)
        difference = kind.unprojected(attn, heads.v - other, heads) @ output.T
        torch.testing.assert_close(first - second, difference)
        assert merge_heads(heads.v).shape[-1] == len(value)
        checked.append(view.index)

    with torch.no_grad(), probe.visiting(model, visit) as layers:
        model(architectures.images(name, batch=1))
    assert checked == list(range(len(layers)))


@pytest.mark.parametrize("name", ["vit_norms", "naflexvit_rotary", "dinov3_grouped", "nest"])
def test_where_no_two_weights_tell_it_the_block_is_named(name: str) -> None:
    (result,) = measure([subject_of(architectures.build(name), name)], [], quantities=["eigenvalues"])
    assert set(result.left_out["eigenvalues"]) == set(result.layer_names)
    assert not any("vo_real" in layer for layer in result.layers)


def test_no_image_is_needed(tmp_path) -> None:
    analysis = analyze(architectures.build("vit"), [], tmp_path, quantities=["eigenvalues"])
    (result,) = analysis.results
    assert result.num_images == 0 and result.layers[0]["vo_real"].mean.shape == (3, 16)
    assert {path.name for path in tmp_path.glob("*.png")} == {"eigenvalue_summary.png", "eigenvalues_0.png"}
    assert "vo_negative" in analysis.report.read_text(encoding="utf-8")
