"""Every kind of attention against the forward of its own layers, in tiny models of every family."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from architectures import ARCHITECTURES, HUGGING_FACE, REFUSED, TRANSFORMERS, build, build_transformers, images
from timm.layers import Attention, AttentionRope
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn

from oversmoothing import set_fused
from oversmoothing.attention import (
    KINDS,
    REFUSALS,
    Heads,
    Kind,
    UnsupportedAttentionError,
    attention_layers,
    counted_tokens,
    find_kind,
    kind_of,
    register_kind,
)
from oversmoothing.fused import FoldedAttention, FusedTalkingHeadAttn
from oversmoothing.remedies import AttnScaleAttention, AttnScaleTalkingHeadAttn


class Call(NamedTuple):
    """One call of one attention layer."""

    attn: nn.Module
    args: tuple
    kwargs: dict[str, Any]


def calls_of(model: nn.Module, inputs: Tensor | dict[str, Tensor]) -> list[Call]:
    """What each attention layer of a model is called with."""
    calls = []
    hooks = [
        module.register_forward_pre_hook(lambda *call: calls.append(Call(*call)), with_kwargs=True)
        for module in model.modules()
        if find_kind(module) is not None
    ]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return calls


def recomputed(call: Call, apply: Callable[[Heads], Tensor] = lambda heads: heads.apply(heads.v)) -> Tensor:
    """The layer's output by its kind."""
    kind = kind_of(call.attn)
    heads = kind.split(call.attn, *call.args, **call.kwargs)
    return kind.merge(call.attn, apply(heads), heads)


def with_gradients(call: Call, output: Callable[[Call], Tensor]) -> list[Tensor]:
    """An output and its gradients by the layer's input and parameters, where it depends on them."""
    x = call.args[0].detach().clone().requires_grad_()
    call = call._replace(args=(x, *call.args[1:]))
    y = output(call)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((y * weights).sum(), [x, *call.attn.parameters()], allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().clamp(min=1).item())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_split_and_merge_are_the_layer(name: str, fused: bool) -> None:
    model = set_fused(build(name), fused)
    calls = calls_of(model, images(name))
    assert calls
    for call in calls:
        expected = with_gradients(call, lambda c: c.attn(*c.args, **c.kwargs))
        for actual, reference in zip(with_gradients(call, recomputed), expected, strict=True):
            assert_close(actual, reference)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_maps_are_the_operator_on_any_values(name: str) -> None:
    for call in calls_of(build(name), images(name, batch=1)):
        kind = kind_of(call.attn)
        heads = kind.split(call.attn, *call.args, **call.kwargs)
        B, H, N, D = heads.v.shape
        assert heads.q.shape[:2] == heads.k.shape[:2] == (B, H) and kind.num_heads(call.attn) == H
        assert kind.projection(call.attn) in list(call.attn.children())
        if kind.is_square(call.attn):
            assert heads.q.shape[2] == N
        rows = heads.softmax_maps().sum(dim=-1)
        assert_close(rows, torch.ones_like(rows))
        for values in (heads.v, heads.v.roll(1, dims=2).square()):
            assert_close(heads.maps() @ values, heads.apply(values))
        assert_close(heads.token_mean(heads.v), heads.v.mean(dim=2, keepdim=True))


def test_every_kind_of_timm_is_in_a_tiny_architecture() -> None:
    seen = {type(module) for name in ARCHITECTURES for module in build(name).modules()}
    assert {kind for kind in KINDS if kind.__module__.startswith("timm.")} <= seen


# Where the layer drops elements of a tensor with its axes in another order in memory, the same seed drops others.
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"cait", "coatnet", "nest"}))
def test_dropout_draws_what_the_layer_draws(name: str) -> None:
    model = build(name)
    calls = calls_of(model, images(name))
    for module in model.modules():
        for part in ("attn_drop", "proj_drop"):
            if isinstance(getattr(module, part, None), nn.Dropout):
                getattr(module, part).p = 0.5
    for fused in (True, False):
        set_fused(model.train(), fused)
        for call in calls:
            torch.manual_seed(0)
            expected = call.attn(*call.args, **call.kwargs)
            torch.manual_seed(0)
            assert_close(recomputed(call), expected)


def test_dense_heads_draw_one_dropout_for_every_use() -> None:
    attn = set_fused(Attention(12, num_heads=3, attn_drop=0.5), False).train()
    heads = kind_of(attn).split(attn, torch.randn(2, 9, 12))
    assert torch.equal(heads.apply(heads.v), heads.apply(heads.v))
    assert not torch.equal(heads.apply(heads.v), heads.maps() @ heads.v)
    assert heads.drop(torch.ones(100, 100)).unique().tolist() == [0, 2]


def perturbed(module: nn.Module) -> nn.Module:
    """No parameter at a value, such as zero, that would hide a missing term."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double().eval()


@pytest.mark.parametrize("make", [FoldedAttention, FusedTalkingHeadAttn, TalkingHeadAttn])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
def test_our_own_layers(make: type[nn.Module], fused: bool) -> None:
    attn = set_fused(perturbed(make(12, num_heads=3, qkv_bias=True)), fused)
    call = Call(attn, (torch.randn(2, 9, 12, dtype=torch.float64),), {})
    for actual, reference in zip(
        with_gradients(call, recomputed), with_gradients(call, lambda c: c.attn(*c.args)), strict=True
    ):
        assert_close(actual, reference)


@pytest.mark.parametrize("make", [AttnScaleAttention, AttnScaleTalkingHeadAttn])
def test_maps_of_a_layer_with_attnscale_built_in(make: type[nn.Module]) -> None:
    attn = perturbed(make(12, num_heads=3, qkv_bias=True))
    call = Call(attn, (torch.randn(2, 9, 12, dtype=torch.float64),), {})
    assert_close(recomputed(call, lambda heads: kind_of(attn).applied_maps(attn, heads) @ heads.v), attn(*call.args))
    with torch.no_grad():
        attn.lamb.zero_()
    assert_close(recomputed(call), attn(*call.args))


MASKS = {
    "boolean": dict(attn_mask=torch.ones(9, 9, dtype=torch.bool).tril()),
    "additive": dict(attn_mask=torch.linspace(-4, 4, 81, dtype=torch.float64).view(9, 9)),
    "by image": dict(attn_mask=(torch.arange(9) < torch.tensor([[9], [5]]))[:, None, None]),
    "causal": dict(is_causal=True),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("make", [Attention, AttentionRope])
def test_masks(make: type[nn.Module], mask: str, fused: bool) -> None:
    attn = set_fused(perturbed(make(12, num_heads=3)), fused)
    call = Call(attn, (torch.randn(2, 9, 12, dtype=torch.float64),), MASKS[mask])
    assert_close(recomputed(call), attn(*call.args, **call.kwargs))
    assert_close(recomputed(call, lambda heads: heads.maps() @ heads.v), attn(*call.args, **call.kwargs))


def test_tokens_that_no_query_sees_do_not_count_in_the_mean() -> None:
    attn = perturbed(Attention(12, num_heads=3))
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    by_head = dict(attn_mask=MASKS["by image"]["attn_mask"].expand(2, 3, 9, 9))
    plain = (MASKS["boolean"], MASKS["additive"])
    for mask, counts in ((MASKS["by image"], (9, 5)), (by_head, (9, 5)), *((mask, (9, 9)) for mask in plain)):
        heads = kind_of(attn).split(attn, x, **mask)
        for image, count in enumerate(counts):
            mean = heads.v[image, :, :count].mean(dim=1, keepdim=True)
            assert_close(heads.token_mean(heads.v)[image], mean)
            features = heads.token_mean(x[:, None])[image, 0]  # the same of features without heads
            assert_close(features, x[image, :count].mean(dim=0, keepdim=True))


@pytest.mark.parametrize("name", ["naflexvit", "naflexvit_rotary"])
@pytest.mark.parametrize("key_mask_only", [True, False])
def test_padded_tokens_of_naflexvit_do_not_count_in_the_mean(name: str, key_mask_only: bool) -> None:
    model = build(name, use_key_only_attn_mask=key_mask_only)
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    coordinates = torch.stack((rows, columns), dim=-1).flatten(0, 1).expand(2, -1, -1)
    valid = torch.arange(12) < torch.tensor([[12], [8]])  # the second picture has two rows of patches
    patches = torch.randn(2, 12, 3 * 8 * 8, dtype=torch.float64)
    batch = dict(patches=patches, patch_coord=coordinates * valid[..., None], patch_valid=valid)
    prefix = model.num_prefix_tokens
    for call in calls_of(model, batch):
        heads = kind_of(call.attn).split(call.attn, *call.args, **call.kwargs)
        assert counted_tokens(heads.attn_mask).squeeze(1).sum(dim=-1).tolist() == [prefix + 12, prefix + 8]
        assert_close(heads.token_mean(heads.v)[1], heads.v[1, :, : prefix + 8].mean(dim=1, keepdim=True))
        assert_close(recomputed(call), call.attn(*call.args, **call.kwargs))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_branch_is_what_the_block_scales_and_adds(name: str) -> None:
    model = build(name)
    reached = []
    for layer in attention_layers(model):
        branch = layer.kind.branch(layer.attn, layer.block)
        if branch is not None:
            owner, method = branch
            assert callable(getattr(owner, method))
            forward = getattr(owner, method)
            setattr(owner, method, lambda *a, f=forward, n=layer.attn_name, **k: (reached.append(n), f(*a, **k))[1])
    expected = {layer.attn_name for layer in attention_layers(model) if layer.kind.branch(layer.attn, layer.block)}
    model(images(name, batch=1))
    assert set(reached) == expected


@pytest.mark.parametrize("name", ["swin", "swinv2", "maxvit", "hiera", "cait", "vit", "volo"])
def test_the_branch_has_all_tokens_of_an_image(name: str) -> None:
    model, shapes = build(name), []
    for layer in attention_layers(model):
        owner, method = layer.kind.branch(layer.attn, layer.block)
        forward = getattr(owner, method)

        def record(*args: Any, forward: Callable[..., Tensor] = forward, **kwargs: Any) -> Tensor:
            shapes.append(forward(*args, **kwargs).shape)
            return forward(*args, **kwargs)

        setattr(owner, method, record)
        layer.block.register_forward_hook(lambda block, args, output: shapes.append(output.shape))
    model(images(name))
    assert shapes[0::2] == shapes[1::2]


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_maps_over_tokens_are_refused_by_name(name: str) -> None:
    model = build(name)
    with pytest.raises(UnsupportedAttentionError, match=r"has no attention that is supported.*blocks\.0"):
        attention_layers(model)


def test_refusals_are_sentences() -> None:
    assert not set(REFUSALS) & set(KINDS)
    for reason in REFUSALS.values():
        assert len(reason.split()) > 4 and reason[0].islower() and reason[-1] not in ".!"
    for name in ("xcit", "vit_parallel_scaling"):
        with pytest.raises(UnsupportedAttentionError) as error:
            attention_layers(build(name))
        assert str(error.value).endswith(".") and "is not supported: " in str(error.value)
    with pytest.raises(UnsupportedAttentionError, match="ResNet has no block with a self-attention module"):
        attention_layers(timm.create_model("resnet18"))
    with pytest.raises(UnsupportedAttentionError, match=r"torch\.nn.*Linear is not supported: no kind is registered"):
        kind_of(nn.Linear(2, 2))


def test_attention_that_is_refused_is_left_out_beside_other_attention() -> None:
    assert [layer.name for layer in attention_layers(build("volo"))] == ["network.2.0", "network.2.1"]
    assert [layer.name for layer in attention_layers(build("cait"))] == ["blocks.0", "blocks.1"]


def test_a_class_of_your_own_gets_a_kind_by_a_decorator() -> None:
    class Halved(Attention):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            return super().forward(x / 2, attn_mask, is_causal)

    model = timm.create_model("vit_tiny_patch16_224", attn_layer=Halved, **ARCHITECTURES["vit"].kwargs).double().eval()
    with pytest.raises(UnsupportedAttentionError, match=r"VisionTransformer, blocks\.0\.attn: .*Halved"):
        attention_layers(model)
    try:

        @register_kind(Halved)
        class HalvedKind(type(kind_of(Attention(4, 1)))):
            def split(self, attn: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Heads:
                return super().split(attn, x / 2, *args, **kwargs)

        assert isinstance(kind_of(model.blocks[0].attn), Kind) and len(attention_layers(model)) == 2
        for call in calls_of(model, images("vit")):
            assert_close(recomputed(call), call.attn(*call.args, **call.kwargs))
    finally:
        KINDS.pop(Halved, None)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_layers_of_transformers(name: str, implementation: str) -> None:
    model = build_transformers(name, attn_implementation=implementation)
    layers = attention_layers(model)
    assert len(layers) == 2 and layers[1].name.endswith((".layer.1", ".layers.1"))
    calls = []
    for layer in layers:
        layer.attn.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        model(images(name))
    assert len(calls) == 2
    for attn, args, kwargs, (expected, expected_maps) in calls:
        kind = kind_of(attn)
        heads = kind.split(attn, *args, **kwargs)
        y, maps = kind.merge(attn, heads.apply(heads.v), heads)
        assert_close(y, expected)
        assert_close(kind.merge(attn, heads.maps() @ heads.v, heads)[0], expected)
        assert (maps is None) == (expected_maps is None) == (implementation == "sdpa")
        if maps is not None:
            assert_close(maps, expected_maps)
        assert kind.projection(attn) in list(attn.children()) and heads.v.shape[1] == kind.num_heads(attn) == 3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov3", "hf_clip"])
def test_layers_of_transformers_while_training(name: str, implementation: str) -> None:
    rates = dict(attention_dropout=0.5) if name != "hf_vit" else dict(attention_probs_dropout_prob=0.5)
    model = build_transformers(name, attn_implementation=implementation, **rates).train()
    for layer in attention_layers(model):

        def check(attn: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, kind: Kind = layer.kind) -> None:
            state = torch.get_rng_state()
            torch.manual_seed(0)
            heads = kind.split(attn, *args, **kwargs)
            actual, _ = kind.merge(attn, heads.apply(heads.v), heads)
            torch.manual_seed(0)
            assert_close(actual, type(attn).forward(attn, *args, **kwargs)[0])
            assert not torch.equal(actual, output[0])
            torch.set_rng_state(state)

        layer.attn.register_forward_hook(check, with_kwargs=True)
    model(images(name))


@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov3"])
def test_masks_of_transformers(name: str) -> None:
    layer = attention_layers(build_transformers(name))[0]
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    mask = (torch.arange(9) < torch.tensor([[9], [5]]))[:, None, None].expand(2, 1, 9, 9)
    kwargs = dict(position_embeddings=(torch.randn(4, 16), torch.randn(4, 16))) if name == "hf_dinov3" else {}
    heads = layer.kind.split(layer.attn, x, mask, **kwargs)
    expected = layer.attn(x, mask, **kwargs)[0]
    assert_close(layer.kind.merge(layer.attn, heads.apply(heads.v), heads)[0], expected)
    assert_close(layer.kind.merge(layer.attn, heads.maps() @ heads.v, heads)[0], expected)
    assert_close(heads.token_mean(heads.v)[1], heads.v[1, :, :5].mean(dim=1, keepdim=True))


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_text_encoders_are_left_out(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    text = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=HUGGING_FACE)
    model = getattr(transformers, f"{family}Model")(config)
    layers = attention_layers(model)
    assert len(layers) == 2 and all(layer.name.startswith("vision_model.") for layer in layers)
    with pytest.raises(UnsupportedAttentionError, match=r"Attention is not supported: it belongs to a text encoder\."):
        kind_of(model.text_model.encoder.layers[0].self_attn)


def test_transformers_is_imported_for_its_models_only() -> None:
    code = (
        "import sys, timm, oversmoothing.analysis, oversmoothing.attention as a;"
        "a.attention_layers(timm.create_model('vit_tiny_patch16_224', depth=1));"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_other_attention_of_transformers_is_refused_by_name() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMSNConfig(**HUGGING_FACE)
    with pytest.raises(UnsupportedAttentionError, match=r"modeling_vit_msn\.\w+ is not supported"):
        attention_layers(transformers.ViTMSNModel(config))


@pytest.mark.parametrize("name", ["vit", "dinov3", "cait", "swin", "hiera", "hf_vit"])
def test_split_and_merge_compile_without_a_graph_break(name: str) -> None:
    model = build_transformers(name) if name in TRANSFORMERS else build(name)
    call = calls_of(model, images(name))[0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda: recomputed(call), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(), recomputed(call))
