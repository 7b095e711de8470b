"""Citizens of timm: what a user of timm does with any of its models works with ours.

Every backbone with every remedy, at a tiny size. The numbers, half precision, gradient checkpointing, ``torch.compile``
and building on the meta device are held by ``test_models.py`` and ``test_fused.py``, export by ``test_export.py``.

What does not hold is marked ``xfail`` below, beside timm's own ViT or CaiT, which lack the same:

* TorchScript of ``features_only`` on ViT: timm's wrapper passes an argument that scripted ViT does not take.
* ``set_input_size`` and ``init_weights`` on CaiT: timm's ``Cait`` has neither; give ``img_size`` when building it.
* ``pretrained=True`` at another ``img_size`` on CaiT: timm's filter does not resize its position embedding (our
  ``--finetune`` does).

Second derivatives and timm's ``AttentionExtract`` need the maps as tensors: ``fused=False``.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY
from safetensors.torch import save_file
from timm.models import create_feature_extractor, get_graph_node_names, group_parameters
from timm.utils import AttentionExtract
from torch import Tensor, nn

import models
import oversmoothing
from oversmoothing.remedies.attnscale import attn_scale

DEIT = ["deit_tiny_12", "attnscale_tiny_12", "featscale_tiny_12", "attnfeatscale_tiny_12"]
CAIT = ["cait_XXS24", "attnscale_cait_XXS24", "featscale_cait_XXS24", "attnfeatscale_cait_XXS24"]
TIMMS_VIT, TIMMS_CAIT = "vit_tiny_patch16_224", "cait_xxs24_384"
WIDTH, DEPTH, CLASSES = TINY["embed_dim"], TINY["depth"], TINY["num_classes"]

every_model = pytest.mark.parametrize("name", DEIT + CAIT)


def all_but(
    lacking: list[str], error: type[Exception] | tuple[type[Exception], ...], reason: str
) -> pytest.MarkDecorator:
    """Every model and timm's own two; ``lacking`` must fail with ``error``."""
    xfail = pytest.mark.xfail(raises=error, strict=True, reason=reason)
    names = [TIMMS_VIT, *DEIT, TIMMS_CAIT, *CAIT]
    return pytest.mark.parametrize("name", [pytest.param(n, marks=xfail) if n in lacking else n for n in names])


def tiny(name: str, **kwargs: object) -> nn.Module:
    """A model whose remedy does something."""
    model = timm.create_model(name, **TINY | kwargs)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if oversmoothing.is_remedy_parameter(key):
                parameter.normal_(std=0.3)
    return model


def images(batch: int = 2, *, chans: int = 3, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, chans, height, width, generator=torch.Generator().manual_seed(3))


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# ---- metadata --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", models.list_models())
def test_the_metadata_describe_the_model(name: str) -> None:
    with torch.device("meta"):
        if "swin" in name:
            model = timm.create_model(name, embed_dim=12, depths=(1, 1), num_heads=(1, 2))
        else:
            model = timm.create_model(name, embed_dim=24, depth=1, num_heads=3)
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert state[f"{cfg['classifier']}.weight"].shape[0] == cfg["num_classes"] == model.num_classes == 1000
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0] == 3
    assert cfg["fixed_input_size"] and cfg["input_size"][1:] == model.patch_embed.img_size
    assert cfg["architecture"] == name and cfg["license"] == "mit"
    assert cfg["pool_size"] == ((7, 7) if "swin" in name else None)
    assert ("arXiv:2203.05962" in cfg["paper_ids"]) == any(map(oversmoothing.is_remedy_parameter, state))
    assert len(cfg["paper_ids"]) == len(cfg["paper_name"].split("; "))
    data = timm.data.resolve_model_data_config(model)
    assert data["interpolation"] == "bicubic" and data["mean"] == (0.485, 0.456, 0.406)
    assert data["crop_pct"] == (1.0 if "cait" in name else 0.875)


@every_model
def test_parameters_are_grouped_by_layer(name: str) -> None:
    model = tiny(name)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert sorted(layers) == sorted(key for key, _ in model.named_parameters())
    for key, layer in layers.items():
        if key.startswith("blocks."):  # the remedies' parameters are among them
            assert layer == int(key.split(".")[1]) + 1
    assert (layers["pos_embed"], layers["norm.weight"], layers["head.weight"]) == (0, DEPTH, DEPTH + 1)
    assert group_parameters(model, model.group_matcher(coarse=True))


# ---- input and head --------------------------------------------------------------------------------------------------
@every_model
def test_images_of_other_sizes_and_channels(name: str) -> None:
    assert tiny(name, img_size=(32, 48))(images(width=48)).shape == (2, CLASSES)
    assert tiny(name, in_chans=1)(images(chans=1)).shape == (2, CLASSES)
    assert tiny(name)(images(0)).shape == (0, CLASSES)
    with pytest.raises(AssertionError, match="doesn't match model"):
        tiny(name)(images(width=48))


@all_but([TIMMS_CAIT, *CAIT], AttributeError, "timm's Cait has no set_input_size")
def test_the_input_size_can_be_set(name: str) -> None:
    model = tiny(name).eval()
    model.set_input_size((48, 64))
    assert model(images(height=48, width=64)).shape == (2, CLASSES)
    assert timm.models.get_model_input_config(model)["input_size"] == (3, 48, 64)


@every_model
def test_the_head_can_be_taken_off_and_put_on(name: str) -> None:
    model, x = tiny(name).eval(), images()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 17, WIDTH) and model.num_features == model.head_hidden_size == WIDTH
    embedding = model.forward_head(tokens, pre_logits=True)
    assert_close(model.get_classifier()(embedding), model(x))

    model.reset_classifier(0)
    assert_close(model(x), embedding)
    assert tiny(name, num_classes=0)(x).shape == (2, WIDTH)
    model.reset_classifier(0, "")
    assert_close(model(x), tokens)
    assert tiny(name, num_classes=0, global_pool="")(x).shape == (2, 17, WIDTH)
    model.reset_classifier(5, "avg")
    assert_close(model(x), model.head(tokens[:, 1:].mean(1)))
    model.reset_classifier(5, "token")
    assert_close(model(x), model.head(tokens[:, 0]))


# ---- features --------------------------------------------------------------------------------------------------------
@every_model
@pytest.mark.parametrize("kind", ["getter", "hook", "fx"])
def test_features_only(kind: str, name: str) -> None:
    """Maps of the asked layers; from hooks and graphs they are tokens, as for timm's own transformers."""
    model, x = tiny(name).eval(), images()
    features = timm.create_model(name, **TINY, features_only=True, out_indices=(0, -1), feature_cls=kind).eval()
    info = features.feature_info
    assert (info.channels(), info.reduction()) == ([WIDTH] * 2, [TINY["patch_size"]] * 2)
    assert info.module_name() == ["blocks.0", f"blocks.{DEPTH - 1}"]
    inner = {"getter": "model.", "hook": "body.", "fx": "graph_module."}[kind]
    weights = {f"{inner}{key}": tensor for key, tensor in model.state_dict().items()}
    assert not features.load_state_dict(weights, strict=False).missing_keys
    expected = model.forward_intermediates(x, indices=[0, DEPTH - 1], intermediates_only=True)
    for ours, theirs in zip(features(x), expected, strict=True):
        ours = ours if kind == "getter" else ours[:, -16:].transpose(1, 2).unflatten(2, (4, 4))
        assert_close(ours, theirs)


@every_model
def test_intermediates_agree_with_each_other(name: str) -> None:
    model, x = tiny(name).eval(), images()
    final, layers = model.forward_intermediates(x)
    assert_close(final, model.forward_features(x))
    assert [tuple(layer.shape) for layer in layers] == [(2, WIDTH, 4, 4)] * DEPTH
    assert_close(model.forward_intermediates(x, indices=2, intermediates_only=True)[0], layers[1])
    [early] = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True, output_fmt="NLC")
    assert_close(early, layers[1].flatten(2).transpose(1, 2))
    [normed] = model.forward_intermediates(x, indices=[1], norm=True, intermediates_only=True, output_fmt="NLC")
    assert_close(normed, model.norm(early))

    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.blocks) == 2
    assert_close(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], layers[1])


@every_model
def test_feature_extraction_by_graph(name: str) -> None:
    model, x = tiny(name), images()
    nodes_train, nodes_eval = get_graph_node_names(model)
    extractor = create_feature_extractor(model, {"blocks.1": "middle", nodes_eval[-1]: "logits"}).eval()
    middle = model.eval().forward_intermediates(x, indices=[1], intermediates_only=True, output_fmt="NLC")[0]
    found = extractor(x)
    assert_close(found["middle"][:, -16:], middle)
    assert_close(found["logits"], model(x))

    trained = create_feature_extractor(model.train(), [nodes_train[-1]])
    trained(x)[nodes_train[-1]].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@all_but([TIMMS_VIT, *DEIT], RuntimeError, "timm's wrapper passes return_prefix_tokens to what scripted ViT lacks")
def test_features_only_in_torchscript(name: str) -> None:
    features = timm.create_model(name, **TINY, features_only=True).eval()
    for ours, theirs in zip(torch.jit.script(features)(images()), features(images()), strict=True):
        assert_close(ours, theirs)


@every_model
def test_gradients_in_torchscript(name: str) -> None:
    model = tiny(name)
    expected = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))
    scripted = torch.jit.script(model)
    scripted(images()).square().sum().backward()
    for (key, parameter), gradient in zip(scripted.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4, msg=key)


@every_model
def test_attention_maps_can_be_extracted(name: str) -> None:
    """The maps that dropout acts on by hooks, those of the softmax by the graph."""
    model, tokens = tiny(name, fused=False).eval(), 16 if name in CAIT else 17
    hooked, softmax = (
        [value for key, value in AttentionExtract(model, method=method)(images()).items() if "token_only" not in key]
        for method in ("hook", "fx")
    )
    for block, applied, soft in zip(model.blocks, hooked, softmax, strict=True):
        assert applied.shape == soft.shape == (2, TINY["num_heads"], tokens, tokens)
        assert_close(soft.sum(-1), torch.ones(()).expand(soft.shape[:-1]))
        if name in DEIT:  # CaiT mixes its heads in between
            assert_close(applied, attn_scale(soft, block.attn.lamb) if hasattr(block.attn, "lamb") else soft)
    assert len(hooked) == DEPTH


# ---- weights ---------------------------------------------------------------------------------------------------------
@every_model
def test_pretrained_weights_adapt_to_channels_and_classes(name: str, tmp_path: Path) -> None:
    source = tiny(name).eval()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    here = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.safetensors"), num_classes=7))
    assert_close(timm.create_model(name, **TINY, **here).eval()(images()), source(images()))
    grey = timm.create_model(name, **TINY | dict(in_chans=1), **here).eval()
    one = images(chans=1)
    assert_close(grey(one), source(one.expand(-1, 3, -1, -1)))
    other = timm.create_model(name, **TINY | dict(num_classes=4), **here).eval()
    assert other(images()).shape == (2, 4)
    assert_close(other.forward_features(images()), source.forward_features(images()))
    again = timm.create_model(name, **TINY, checkpoint_path=str(tmp_path / "weights.safetensors")).eval()
    assert_close(again(images()), source(images()))


@all_but([TIMMS_CAIT, *CAIT], (RuntimeError, ValueError), "timm's filter of CaiT's weights does not resize pos_embed")
def test_pretrained_weights_adapt_to_the_image_size(name: str, tmp_path: Path) -> None:
    save_file(tiny(name).state_dict(), tmp_path / "weights.safetensors")
    overlay = dict(file=str(tmp_path / "weights.safetensors"), num_classes=7)
    model = timm.create_model(name, **TINY | dict(img_size=48), pretrained=True, pretrained_cfg_overlay=overlay)
    assert model(images(height=48, width=48)).shape == (2, CLASSES)


@every_model
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_apart(copied: Callable[[nn.Module], nn.Module], name: str) -> None:
    model = tiny(name).eval()
    twin, expected = copied(model), model(images())
    nn.init.zeros_(model.head.weight)
    assert_close(twin(images()), expected)
    assert twin.pretrained_cfg == model.pretrained_cfg


@every_model
def test_device_and_dtype_are_arguments(name: str) -> None:
    on_meta = timm.create_model(name, **TINY, device="meta", dtype=torch.float16)
    assert all(p.is_meta and p.dtype == torch.float16 for p in (*on_meta.parameters(), *on_meta.buffers()))
    half = tiny(name, device="cpu", dtype=torch.bfloat16)
    assert half(images().bfloat16()).dtype == torch.bfloat16


@all_but([TIMMS_CAIT, *CAIT], AttributeError, "timm's Cait has no init_weights")
def test_weights_can_be_drawn_anew(name: str) -> None:
    model = tiny(name)
    model.init_weights()
    assert all((p == 0).all() for key, p in model.named_parameters() if oversmoothing.is_remedy_parameter(key))


@every_model
def test_channels_last_changes_nothing(name: str) -> None:
    model, x = tiny(name).eval(), images()
    expected = model(x)
    assert_close(model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), expected)


# ---- derivatives of other kinds --------------------------------------------------------------------------------------
@every_model
def test_gradients_of_each_image_through_torch_func(name: str) -> None:
    model, x = tiny(name).eval(), images()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    whole = torch.autograd.grad(model(x).square().sum(), list(parameters.values()))
    for key, gradient in zip(parameters, whole, strict=True):
        torch.testing.assert_close(each[key].sum(0), gradient, rtol=1e-3, atol=1e-4, msg=key)


@every_model
def test_second_derivatives(name: str) -> None:
    model, x = tiny(name, fused=False).eval().double(), images().double().requires_grad_()
    direction = images().flip(0).double()

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]

    product = torch.autograd.grad((slope(x) * direction).sum(), x)[0]
    step = 1e-5
    numeric = (slope(x + step * direction) - slope(x - step * direction)) / (2 * step)
    torch.testing.assert_close(product, numeric, rtol=1e-5, atol=1e-9)
