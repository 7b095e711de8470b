"""Linear CKA: closed forms, and that the result is about the images and not about how they arrive."""

import architectures
import pytest
import timm
import torch
from torch import Tensor

from oversmoothing.analysis import cka

VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0)


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka_of(*layers: Tensor, minibatch: int = 256, arriving: int = 7) -> Tensor:
    running = cka.RunningCKA(minibatch)
    for batch in zip(*(x.split(arriving) for x in layers), strict=True):
        running.update(batch)
    return running.result()


def test_a_rotation_a_scale_and_a_shift_change_nothing() -> None:
    x = features(50, 12)
    rotation = torch.linalg.qr(features(12, 12, seed=1)).Q
    table = cka_of(x, x, 3 * x @ rotation + 100, torch.cat([x, torch.zeros(50, 5)], dim=1))
    torch.testing.assert_close(table, torch.ones(4, 4, dtype=torch.float64))


def test_independent_features_are_near_zero_with_fewer_images_than_features() -> None:
    table = cka_of(features(60, 200), features(60, 200, seed=1))
    assert abs(table[0, 1]) < 0.05
    x, y = (f - f.mean(dim=0) for f in (features(60, 200), features(60, 200, seed=1)))
    biased = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert biased > 0.7  # the form with cross-covariances


def test_an_exact_small_case() -> None:
    """Four images, features of one dimension: HSIC is the mean over all orders of the images, equation by equation."""
    x, y = torch.tensor([[0.0], [1], [3], [7]]), torch.tensor([[2.0], [1], [5], [4]])
    k, l = (f.double() @ f.double().T for f in (x, y))  # noqa: E741
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    orders = orders[[len(set(order)) == 4 for order in orders.tolist()]]
    i, j, q, r = orders.unbind(1)
    expected = (k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])).mean()  # Song et al., JMLR 2012, theorem 2
    torch.testing.assert_close(cka.hsic(torch.stack([k, l]))[0, 1], expected)


def test_a_common_part_gives_its_share() -> None:
    """Half of the variance is common: ||C_xy||^2 / (||C_x|| ||C_y||) with C = I of dimension 2d, d of them shared."""
    shared, mine, other = features(4000, 10), features(4000, 10, seed=1), features(4000, 10, seed=2)
    table = cka_of(torch.cat([shared, mine], 1), torch.cat([shared, other], 1), arriving=500)
    assert table[0, 1].item() == pytest.approx(0.5, abs=0.02)


def test_the_result_does_not_depend_on_how_the_images_arrive() -> None:
    x, y = features(101, 6), features(101, 9, seed=1) + features(101, 6)[:, :1]
    one, many = cka_of(x, y, minibatch=16, arriving=101), cka_of(x, y, minibatch=16, arriving=3)
    torch.testing.assert_close(one, many)
    running = cka.RunningCKA(16)
    for batch in zip(x.split(3), y.split(3), strict=True):
        running.update(batch)
        assert running._num_waiting() < 16 + cka.LEAST  # what is kept does not grow
    running.result()
    assert running.count == 101  # none is left out


def test_constant_features_and_too_few_images() -> None:
    assert cka_of(torch.ones(20, 3), features(20, 3))[0].isnan().all()
    with pytest.raises(ValueError, match="CKA needs 4 images or more, got 3"):
        cka_of(features(3, 2), features(3, 2))


def test_layers_of_models_of_different_widths_and_depths() -> None:
    torch.manual_seed(0)
    vit, cait = timm.create_model("vit_tiny_patch16_224", **VIT).train(), architectures.build("cait").float()
    images = torch.randn(12, 3, 32, 32)
    result = cka.compare_layers({"vit": vit, "cait": cait}, [(images, torch.zeros(12)), (images.flip(0), None)])
    assert vit.training and result.count == 24
    assert {label: len(names) for label, names in result.layers.items()} == {"vit": 3, "cait": 2}
    assert result.between("vit", "cait").shape == (3, 2)
    torch.testing.assert_close(result.between("vit", "vit").diagonal(), torch.ones(3, dtype=torch.float64))
    rows = list(result.rows())
    assert len(rows) == 9 + 6 + 4 and float(rows[-1]["cka"]) == pytest.approx(1)
    figure = result.picture().figure
    assert [ax.get_title() for ax in figure.axes[:3]] == ["vit", "cait", "vit (rows), cait (columns)"]
    assert len(figure.axes[2].texts) == 6  # the numbers
    with pytest.raises(ValueError, match="cait has no class token in its blocks"):
        cka.compare_layers({"cait": cait}, [images], pool="class")
    by_hand = vit.eval().forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC")[1]
    expected = cka_of(*(prefix[:, 0].detach() for _, prefix in by_hand))
    torch.testing.assert_close(cka.compare_layers(vit, [images], pool="class").values, expected, rtol=1e-4, atol=1e-4)


def test_heat_maps_of_models_of_different_depths_stay_within_the_figure() -> None:
    layers = {"deep": [str(index) for index in range(24)], "shallow": [str(index) for index in range(10)]}
    figure = cka.draw_cka(cka.CKA(layers, torch.eye(34), "patches", 9))
    figure.draw_without_rendering()
    assert all(ax.yaxis.label.get_window_extent().x0 >= 0 for ax in figure.axes)


@pytest.mark.parametrize("name", ["swin", "hiera", "maxvit"])
def test_stages_of_other_widths_are_compared(name: str) -> None:
    table = cka.compare_layers(architectures.build(name), [architectures.images(name, batch=8)]).values
    torch.testing.assert_close(table.diagonal(), torch.ones_like(table.diagonal()))
    assert table.isfinite().all()
