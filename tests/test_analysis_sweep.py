"""Sweeps of a remedy's parameter: the numbers of models built with each value, and models that are put back."""

import architectures
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models  # noqa: F401  (registers the zoo with timm)
from oversmoothing import RemedyError, add_remedy
from oversmoothing.analysis import sweep
from oversmoothing.analysis.probe import layer_report
from oversmoothing.analysis.sweep import sweep_parameter

VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)
IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5
BATCHES = [(IMAGES[:7], LABELS[:7]), (IMAGES[7:], LABELS[7:])]


def vit(name: str = "vit_tiny_patch16_224", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **VIT | kwargs)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 or "lamb" in key else None
    return model


def numbers(model: nn.Module) -> list[float]:
    """Accuracy, loss and similarity, straight from the model."""
    with torch.no_grad():
        logits = model.eval()(IMAGES)
    accuracy = 100 * (logits.argmax(dim=1) == LABELS).double().mean()
    loss = F.cross_entropy(logits, LABELS)
    return [accuracy.item(), loss.item(), layer_report(model, IMAGES)["token_similarity"][-2]]


def everything(model: nn.Module) -> tuple[dict[str, Tensor], list[type], list[set], list[bool]]:
    """Weights, classes, attributes and modes of a model."""
    modules = list(model.modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [type(m) for m in modules], [set(m.__dict__) for m in modules], [m.training for m in modules]


def assert_untouched(model: nn.Module, before: tuple) -> None:
    after = everything(model)
    assert list(after[0]) == list(before[0]) and after[1:] == before[1:]
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())


@pytest.mark.parametrize("layers", ["all", "each"])
def test_numbers_are_those_of_models_with_the_value(layers: str) -> None:
    model = vit("attnscale_small_12").train()
    before = everything(model)
    (result,) = sweep_parameter({"ours": model}, BATCHES, "attnscale", values=[-0.5, 1], layers=layers)
    assert_untouched(model, before)
    assert result.count == 12 and result.layers == ([sweep.ALL] if layers == "all" else [0, 1, 2])
    assert list(result.unchanged.values()) == pytest.approx(numbers(vit("attnscale_small_12")), rel=1e-4)
    for row, layer in enumerate(result.layers):
        for column, value in enumerate([-0.5, 1]):
            other = vit("attnscale_small_12")
            with torch.no_grad():
                for block in other.blocks if layers == "all" else [other.blocks[layer]]:
                    block.attn.lamb.fill_(value)
            found = [table[row, column].item() for table in result.numbers.values()]
            assert found == pytest.approx(numbers(other), rel=1e-4)


def test_a_plain_model_gets_the_remedy_and_loses_it_again() -> None:
    model = vit().eval()
    model.blocks[1].train()
    before, logits = everything(model), model.eval()(IMAGES)
    model.blocks[1].train()
    results = sweep_parameter(model, BATCHES, "featscale", values=[0, 0.5])
    assert_untouched(model, before)
    assert torch.equal(model.eval()(IMAGES), logits)  # to the bit
    assert [result.parameter for result in results] == ["lamb1", "lamb2"]
    for result in results:
        assert result.numbers["loss"][0, 0].item() == pytest.approx(result.unchanged["loss"], rel=1e-5)  # identity
        assert result.numbers["loss"][0, 1].item() != pytest.approx(result.unchanged["loss"], rel=1e-3)
    other = add_remedy(vit(), "featscale", lamb2=0.5)
    found = [table[0, 1].item() for table in results[1].numbers.values()]
    assert found == pytest.approx(numbers(other), rel=1e-4)


def test_a_model_is_put_back_after_an_error() -> None:
    model = vit()
    before = everything(model)
    with pytest.raises(ValueError, match="labels from 0 to 4, but VisionTransformer has 3 outputs"):
        sweep_parameter(vit(num_classes=3), BATCHES, "attnscale")
    with pytest.raises(ValueError, match="a sweep needs labels"):
        sweep_parameter(model, [IMAGES], "attnscale")

    def interrupted() -> object:
        yield BATCHES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_parameter(model, interrupted(), "attnscale", values=[1])
    assert_untouched(model, before)


@pytest.mark.parametrize("remedy", ["neutreno", "value_residual", "gfsa", "shaped", "contranorm", "gated"])
def test_any_remedy_with_numbers_a_head_or_channel_can_be_swept(remedy: str) -> None:
    model = vit()
    before = everything(model)
    results = sweep_parameter(model, BATCHES[:1], remedy, values=[0.3], layers="each")
    assert_untouched(model, before)
    assert [result.parameter for result in results] == sweep.parameters_of(remedy)
    for result in results:
        assert result.layers == ([1, 2] if remedy in ("neutreno", "value_residual") else [0, 1, 2])
        assert (result.numbers["loss"] != result.unchanged["loss"]).all()


@pytest.mark.parametrize("name", ["cait", "swin", "hf_vit"])
def test_other_families(name: str) -> None:
    build = architectures.build_transformers if name.startswith("hf") else architectures.build
    model, images = build(name), architectures.images(name)
    before = everything(model)
    labels = torch.zeros(len(images), dtype=torch.long)
    (result,) = sweep_parameter({name: model}, [(images, labels)], "attnscale", values=[0, 1], layers=[1])
    assert_untouched(model, before)
    assert result.numbers["loss"][0, 0].item() == pytest.approx(result.unchanged["loss"], rel=1e-4)
    assert result.numbers["loss"][0, 1] != result.numbers["loss"][0, 0]


def test_what_cannot_be_swept_is_said() -> None:
    with pytest.raises(RemedyError, match="there is no remedy 'attnscal'; did you mean attnscale"):
        sweep_parameter(vit(), BATCHES, "attnscal")
    with pytest.raises(RemedyError, match="featscale has no parameter 'lamb' to sweep; there are lamb1, lamb2"):
        sweep_parameter(vit(), BATCHES, "featscale", parameter="lamb")
    with pytest.raises(RemedyError, match="reattention has no parameter that is a number a head or channel"):
        sweep_parameter(vit(), BATCHES, "reattention")
    with pytest.raises(RemedyError, match="mine cannot be swept over gfsa: .* has attnscale built in"):
        sweep_parameter({"mine": vit("attnscale_small_12")}, BATCHES, "gfsa")
    with pytest.raises(ValueError, match="layer 7 of VisionTransformer has no lamb; layers 0, 1, 2 have"):
        sweep_parameter(vit(), BATCHES, "attnscale", layers=[7])
    with pytest.raises(ValueError, match="no logits"):
        sweep_parameter(vit(num_classes=0, global_pool=""), BATCHES, "attnscale")


@pytest.mark.parametrize("layers", ["all", "each"])
def test_rows_and_figure(layers: str) -> None:
    two = {"plain": vit(), "ours": vit("attnscale_small_12")}
    results = sweep_parameter(two, BATCHES[:1], "attnscale", values=[1, -1, 0], layers=layers)
    rows = [row for result in results for row in result.rows()]
    assert len(rows) == 2 * (1 + 3 * (1 if layers == "all" else 3)) and rows[0]["value"] == ""
    assert rows[1] == rows[1] | {"model": "plain", "layer": "all" if layers == "all" else 0, "value": "1"}
    picture = sweep.sweep_picture(results)
    axes = [ax for ax in picture.figure.axes if ax.get_xlabel()]
    assert len(axes) == (3 if layers == "all" else 6) and all(ax.get_ylabel() for ax in axes)
    assert picture.file == "sweep_attnscale.png" and "plain: " in picture.caption and "as it is" in picture.caption
