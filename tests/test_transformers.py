"""Models of Hugging Face transformers: remedies added, saved, loaded; the analysis of them."""

import copy
from pathlib import Path

import pytest
import torch
from architectures import TRANSFORMERS, build_transformers, images
from torch import Tensor, nn
from transformers import AutoModel

from oversmoothing import RemedyError, add_remedy, from_pretrained, remedies_of, remove_remedy
from oversmoothing.analysis import probe
from oversmoothing.analysis.measurement import measure
from oversmoothing.analysis.subject import subject_of
from oversmoothing.attention import attention_layers

REMEDIES = {"featscale": {}, "attnscale": {}, "neutreno": {"layers": "1:"}}


def output(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return model(images(name))[0]


def perturbed(model: nn.Module) -> nn.Module:
    """The remedies' parameters away from their start values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("lamb", "lamb1", "lamb2", "neutreno_alpha"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_remedy_starts_from_the_model_as_it_was(name: str, implementation: str) -> None:
    model = build_transformers(name, attn_implementation=implementation)
    expected, keys = output(model, name), list(model.state_dict())
    add_remedy(model, REMEDIES)
    torch.testing.assert_close(output(model, name), expected, rtol=0, atol=1e-12)
    added = set(model.state_dict()) - set(keys)
    assert len(added) == 2 * 3 + 1 and [key for key in model.state_dict() if key not in added] == keys
    assert not torch.equal(output(perturbed(model), name), expected)
    remove_remedy(model)
    assert torch.equal(output(model, name), expected) and list(model.state_dict()) == keys


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_saved_and_loaded_with_its_remedies(name: str, tmp_path: Path) -> None:
    model = perturbed(add_remedy(build_transformers(name), REMEDIES))
    expected = output(model, name)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(type(model), tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert list(remedies_of(loaded).items()) == list(remedies_of(model).items())  # their order too
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    # Loaded weights lie elsewhere in memory, and DINOv3 makes its rotary frequencies anew in float32.
    torch.testing.assert_close(output(loaded, name), expected, rtol=0, atol=1e-9)
    loaded.save_pretrained(tmp_path / "again")
    again = from_pretrained(type(model), tmp_path / "again")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_model_without_a_head_is_saved_and_loaded(tmp_path: Path) -> None:
    """transformers writes ViTModel's weights under their old names, and renames them again for its own classes only."""
    model = perturbed(add_remedy(build_transformers("hf_vit").vit, "attnscale"))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(type(model), tmp_path, add_pooling_layer=False)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_loading_accounts_for_every_weight(tmp_path: Path) -> None:
    plain = build_transformers("hf_vit")
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(RemedyError, match="saved without remedies: load it with ViTForImageClassification"):
        from_pretrained(type(plain), tmp_path / "plain")
    model = add_remedy(build_transformers("hf_vit"), "attnscale")
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("0.attention.lamb")}
    model.save_pretrained(tmp_path / "short", state_dict=state)
    with pytest.raises(RemedyError, match=r"missing_keys.*vit\.layers\.0\.attention\.lamb"):
        from_pretrained(type(model), tmp_path / "short")


@pytest.mark.parametrize("wrong", [AutoModel, "ViTModel", None])
def test_what_is_no_model_class_is_named(wrong: object, tmp_path: Path) -> None:
    with pytest.raises(RemedyError, match=f"{getattr(wrong, '__name__', wrong)}.* is no model class: give"):
        from_pretrained(wrong, tmp_path)


def test_a_plain_checkpoint_is_what_a_remedy_is_added_to(tmp_path: Path) -> None:
    model = build_transformers("hf_dinov2")
    model.save_pretrained(tmp_path)
    loaded = add_remedy(type(model).from_pretrained(tmp_path), "attnscale")
    torch.testing.assert_close(output(loaded, "hf_dinov2"), output(model, "hf_dinov2"))
    remove_remedy(loaded).save_pretrained(tmp_path)
    torch.testing.assert_close(output(type(model).from_pretrained(tmp_path), "hf_dinov2"), output(model, "hf_dinov2"))


@pytest.mark.parametrize("name", ["hf_vit", "hf_beit"])
def test_copies_train_with_and_without_gradient_checkpointing(name: str) -> None:
    model = perturbed(add_remedy(build_transformers(name), ["attnscale", "featscale"])).train()
    gradients = []
    for checkpointing in (False, True):
        copied = copy.deepcopy(model)
        if checkpointing:
            # transformers 5.20, the newest for Python 3.10, has the older name only.
            enable = getattr(copied, "activation_checkpointing_enable", None) or copied.gradient_checkpointing_enable
            enable()
        torch.manual_seed(0)  # of drop-path
        copied(images(name))[0].square().sum().backward()
        gradients.append({key: p.grad for key, p in copied.named_parameters() if p.grad is not None})
    assert any(key.endswith("attention.lamb") for key in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_analysis(name: str) -> None:
    model, batch = perturbed(add_remedy(build_transformers(name), "attnscale")), images(name)
    layers = attention_layers(model)
    norms = [name for name in ("norm2", "layernorm_after", "layer_norm2") if hasattr(layers[0].block, name)]
    streams, residuals, maps = [], [], []
    for layer in layers:
        getattr(layer.block, norms[0]).register_forward_pre_hook(lambda norm, args: streams.append(args[0]))

    def visit(view: probe.LayerView) -> None:
        residuals.append(view.after_residual)
        maps.append(view.attention_maps())

    with torch.no_grad(), probe.visiting(model, visit):
        model(batch)
    torch.testing.assert_close(residuals, streams)
    for layer, seen in zip(layers, maps, strict=True):
        n, lamb = seen.mixed.shape[-1], layer.attn.lamb[:, None, None]
        torch.testing.assert_close(seen.applied, seen.mixed + lamb * (seen.mixed - 1 / n))
    assert probe.patch_grid(model, batch) == (4, 4)
    assert len(probe.layer_report(model, batch)["lamb"]) == 2
    result = measure([subject_of(model, "model", 32)], [[batch]])[0]
    assert [layer.name for layer in layers] == result.layer_names
    assert all("delta_log_amplitude" in layer and "spectrum" in layer for layer in result.layers)


def test_maps_are_returned_where_they_are_asked_for() -> None:
    model = add_remedy(build_transformers("hf_vit", attn_implementation="eager"), "attnscale")
    with torch.no_grad():
        attentions = model(images("hf_vit"), output_attentions=True).attentions
        plain = remove_remedy(model)(images("hf_vit"), output_attentions=True).attentions
    torch.testing.assert_close(attentions, plain)
