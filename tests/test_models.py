"""The zoo: every name builds and trains, and its numbers are the reference's. Swin's numbers: ``test_swin.py``."""

import json
import re
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import GOLDEN, TINY, golden_json, golden_rules
from timm.layers import set_fused_attn
from timm.models.cait import Cait, LayerScaleBlock, TalkingHeadAttn
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

import models
import oversmoothing
from oversmoothing.remedies.attnscale import AttnScaleAttention, AttnScaleTalkingHeadAttn, attn_scale
from oversmoothing.remedies.featscale import FeatScaleBlock, FeatScaleLayerScaleBlock, feat_scale

DEIT_AND_CAIT = [name for name in models.list_models() if "swin" not in name]  # Swin: test_swin.py


def randomise_remedy(model: nn.Module) -> None:
    """Gives every lambda a value, so that the remedy does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if oversmoothing.is_remedy_parameter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)


def tiny(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, **{**TINY, **kwargs})


# ---- golden parity ---------------------------------------------------------------------------------------------------
def golden_names() -> list[str]:
    path = GOLDEN / "public" / "models.json"
    records = json.loads(path.read_text()) if path.is_file() else {}
    names = [name for name, record in records.items() if record["kind"] in ("vit", "cait")]
    # Models of one architecture in a row: see golden_state.
    return sorted(names, key=lambda name: records[name]["n_params"]) or ["attnscale_small_12"]


def golden_record(name: str) -> dict:
    golden_json("public/models.json")  # skips where there is none
    return golden_rules().load_models(str(GOLDEN / "public"))[name]


_last_state: dict[str, Tensor] = {}


def golden_state(record: dict) -> dict[str, Tensor]:
    """The weights of the golden fill rule; tensors of the last call are used again, drawing them takes long."""
    fill, dtype = golden_rules().fill, torch.get_default_dtype()
    shapes = {key: torch.Size(shape) for key, shape, _ in record["state_dict"]}
    for key, tensor in list(_last_state.items()):
        if tensor.shape != shapes.get(key) or tensor.dtype != dtype:
            del _last_state[key]
    for key, shape in shapes.items():
        if key not in _last_state:
            _last_state[key] = torch.from_numpy(fill(key, shape, 0)).to(dtype)
    return dict(_last_state)


@pytest.fixture(scope="module", autouse=True)
def _free_the_last_state() -> Iterator[None]:
    yield
    _last_state.clear()


def golden_model(name: str, record: dict) -> nn.Module:
    """Our model of the reference's name, with the weights of the golden fill rule."""
    with torch.device("meta"):  # the largest have 2 GB of weights in float64: one copy of them
        model = timm.create_model(name.replace("our_", "deit_"), num_classes=record["num_classes"])
    model.load_state_dict(golden_state(record), assign=True)
    return model.requires_grad_(record["grad_norms"] is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden_names())
def test_logits_loss_and_every_gradient_equal_the_reference(name: str, float64: None) -> None:
    record = golden_record(name)
    if record["logits"] is None:
        pytest.skip(f"{name}: the reference recorded no logits (too large); its keys are tested")
    rules = golden_rules()
    model = golden_model(name, record)
    images = torch.from_numpy(rules.images(0, 2, record["img_size"], record["img_size"]))
    with_gradients = record["grad_norms"] is not None
    # Large ones once only, it takes long: nothing here is drawn, so the logits in training are those of evaluation.
    if (model.embed_dim < 768 and record["img_size"] == 224) or not with_gradients:
        with torch.no_grad():
            logits = model.eval()(images)
        np.testing.assert_allclose(logits.numpy(), record["logits"], rtol=1e-9, atol=1e-10)
    if not with_gradients:
        return

    targets = torch.from_numpy(rules.targets(0, 2, record["num_classes"]))
    norms: dict[str, float] = {}

    def keep_the_norm(key: str, parameter: nn.Parameter) -> None:
        norms[key] = parameter.grad.norm().item()
        parameter.grad = None  # all of them are as large as the model

    for key, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(keep_the_norm, key))
    # Without it, the largest keep 4 GB and more for backward.
    model.set_grad_checkpointing(record["img_size"] > 224 and model.embed_dim >= 768)
    model.train()
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    outputs = model(images)
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    logits = sum(heads).detach() / len(heads)
    np.testing.assert_allclose(logits.numpy(), record["logits"], rtol=1e-9, atol=1e-10)
    loss = sum(F.cross_entropy(output, targets) for output in heads) / len(heads)
    loss.backward()
    assert loss.item() == pytest.approx(record["loss"], rel=1e-9)
    for key, _ in model.named_parameters():
        # atol: the gradients of proj_l.bias and of the keys' bias are zero but for rounding.
        np.testing.assert_allclose(norms[key], record["grad_norms"][key], rtol=1e-9, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    "name", ["attnscale_small_12", "featscale_small_12", "attnscale_cait_XXS24_224", "our_small_12"]
)
def test_float32_logits_equal_the_reference(name: str) -> None:
    record = golden_record(name)
    model = golden_model(name, record).eval()
    images = torch.from_numpy(golden_rules().images(0, 2, record["img_size"], record["img_size"])).float()
    with torch.no_grad():
        error = np.linalg.norm(model(images).numpy() - record["logits"]) / np.linalg.norm(record["logits"])
    assert error <= 1e-4


def test_keys_shapes_order_and_parameter_counts_equal_the_reference() -> None:
    records = golden_json("public/models.json")
    for name, record in records.items():
        if record["kind"] not in ("vit", "cait"):
            continue
        with torch.device("meta"):
            model = timm.create_model(name.replace("our_", "deit_"), num_classes=record["num_classes"])
        found = [[key, list(tensor.shape)] for key, tensor in model.state_dict().items()]
        assert found == [entry[:2] for entry in record["state_dict"]], name
        assert sum(p.numel() for p in model.parameters()) == record["n_params"], name


def test_initial_values_follow_the_reference() -> None:
    for name, parameters in golden_json("init_stats.json")["models"].items():
        if name not in models.list_models() and not name.startswith("our_"):
            continue
        torch.manual_seed(0)
        model = timm.create_model(name.replace("our_", "deit_"))
        state = dict(model.named_parameters())
        for key, (mean, std, low, high) in parameters.items():
            values = state[key].detach()
            if std == 0:
                torch.testing.assert_close(
                    values, torch.full_like(values, mean), rtol=1e-6, atol=0, msg=f"{name} {key}"
                )
            else:
                assert values.std(correction=0).item() == pytest.approx(std, rel=6 / values.numel() ** 0.5), (name, key)
                assert abs(values.mean().item() - mean) < 8 * std / values.numel() ** 0.5, (name, key)
                assert max(values.max().item() / high, values.min().item() / low) < 1.8, (name, key)


# ---- the registry ----------------------------------------------------------------------------------------------------
def test_the_zoo_is_registered_under_the_papers_names() -> None:
    sizes = [f"{size}_{depth}" for size in ("tiny", "small", "base") for depth in (12, 24)]
    caits = ["XXS24_224", "XXS24", "XXS36_224", "XXS36", "XS24", "S24_224", "S24", "S36", "M36", "M48"]
    expected = [f"{remedy}_{size}" for remedy in ("deit", "attnscale", "featscale", "attnfeatscale") for size in sizes]
    expected += [
        f"{remedy}cait_{size}" for remedy in ("", "attnscale_", "featscale_", "attnfeatscale_") for size in caits
    ]
    swins = [f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")]
    expected += [f"{remedy}_{swin}" for remedy in ("attnscale", "featscale", "attnfeatscale") for swin in swins]
    assert sorted(models.list_models()) == sorted(expected)
    assert set(expected) <= set(timm.list_models())
    assert set(timm.list_models("attnscale_*")) == {name for name in expected if name.startswith("attnscale_")}


def test_no_name_of_timm_is_overwritten() -> None:
    for name in models.list_models():
        assert timm.model_entrypoint(name).__module__ in ("models.deit", "models.cait", "models.swin")
    assert timm.model_entrypoint("deit_small_patch16_224").__module__ == "timm.models.deit"
    assert timm.model_entrypoint("cait_s24_224").__module__ == "timm.models.cait"


@pytest.mark.parametrize("name", DEIT_AND_CAIT)
def test_every_name_builds_and_every_parameter_gets_a_gradient(name: str) -> None:
    model = timm.create_model(name, num_classes=10, img_size=32, depth=2)
    model(torch.randn(2, 3, 32, 32)).logsumexp(-1).sum().backward()
    assert model.pretrained_cfg["classifier"] == "head" and model.pretrained_cfg["first_conv"] == "patch_embed.proj"
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_evaluation_crop_is_a_property_of_the_data_config() -> None:
    assert timm.get_pretrained_cfg("attnscale_small_12").crop_pct == 224 / 256
    assert timm.get_pretrained_cfg("attnscale_cait_S24_224").crop_pct == 1.0
    assert timm.get_pretrained_cfg("cait_M48").input_size == (3, 448, 448)


def test_pretrained_weights_that_do_not_exist_are_refused_clearly() -> None:
    with pytest.raises(ValueError, match="deit_tiny_24"):
        timm.create_model("deit_tiny_24", pretrained=True)


# ---- the equations ---------------------------------------------------------------------------------------------------
def test_attn_scale_scales_the_high_pass_part_and_keeps_the_mean_map(float64: None) -> None:
    attn, lamb = torch.randn(2, 3, 5, 5).softmax(-1), torch.randn(3)
    mean = torch.full((5, 5), 1 / 5)
    torch.testing.assert_close(attn_scale(attn, lamb), mean + (1 + lamb)[:, None, None] * (attn - mean))
    torch.testing.assert_close(attn_scale(attn, lamb).sum(-1), torch.ones(2, 3, 5))


def test_feat_scale_weights_the_two_bands_apart(float64: None) -> None:
    y, lamb1, lamb2 = torch.randn(2, 5, 4), torch.randn(4), torch.randn(4)
    dc = y.mean(1, keepdim=True)
    scaled = feat_scale(y, lamb1, lamb2, 2.0)
    torch.testing.assert_close(scaled.mean(1, keepdim=True), (1 + 2 * lamb1) * dc)
    torch.testing.assert_close(scaled - scaled.mean(1, keepdim=True), (1 + 2 * lamb2) * (y - dc))


@pytest.mark.parametrize(
    "name",
    [
        "attnscale_tiny_12",
        "featscale_tiny_12",
        "attnfeatscale_tiny_12",
        "attnscale_cait_XXS24",
        "featscale_cait_XXS24",
        "attnfeatscale_cait_XXS24",
    ],
)
def test_at_lambda_zero_a_variant_is_its_plain_baseline(name: str) -> None:
    plain = tiny(re.sub(r"^[a-z]+scale_", "" if "cait" in name else "deit_", name)).eval()
    variant = tiny(name).eval()
    missing, unexpected = variant.load_state_dict(plain.state_dict(), strict=False)
    assert missing and all(map(oversmoothing.is_remedy_parameter, missing)) and not unexpected
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(variant(images), plain(images), rtol=1e-5, atol=1e-6)


def test_no_remedy_in_the_class_attention_blocks() -> None:
    names = [
        key for key, _ in tiny("attnfeatscale_cait_S24").named_parameters() if oversmoothing.is_remedy_parameter(key)
    ]
    assert len(names) == 3 * TINY["depth"] and not any("token_only" in key for key in names)


# ---- closed form against dense form ----------------------------------------------------------------------------------
def dense_attention(attn: AttnScaleAttention, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The definition, written out: the oracle of the fused forms."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    y = (attn_scale(scores.softmax(-1), attn.lamb) @ v).transpose(1, 2).flatten(2)
    y = attn.norm(y)
    return attn.proj(y if attn.gate is None else y * attn.gate(x).sigmoid())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"scale_norm": True}, {"gated": True}, {"attn_head_dim": 8}]
)
@pytest.mark.parametrize("masking", ["none", "bool", "float", "causal"])
def test_attention_equals_the_dense_definition(fused: bool, options: dict, masking: str, float64: None) -> None:
    layer = AttnScaleAttention(12, 3, qkv_bias=True, norm_layer=nn.LayerNorm, **options)
    layer.fused_attn = fused
    randomise_remedy(layer)
    x = torch.randn(2, 6, 12, requires_grad=True)
    mask = torch.rand(6, 6) > 0.4
    mask |= torch.eye(6, dtype=torch.bool)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    call, oracle_mask = {
        "none": ({}, None),
        "bool": ({"attn_mask": mask}, mask),
        "float": ({"attn_mask": torch.zeros(6, 6).masked_fill(~mask, float("-inf"))}, mask),
        "causal": ({"is_causal": True}, causal),
    }[masking]
    inputs = [x, *layer.parameters()]
    outputs = layer(x, **call), dense_attention(layer, x, oracle_mask)
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-12)
    weights = torch.randn_like(outputs[0])
    for ours, theirs in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in outputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_attention_dropout_falls_on_the_scaled_map(float64: None) -> None:
    layer = AttnScaleAttention(12, 3, attn_drop=0.5)
    randomise_remedy(layer)
    x = torch.randn(2, 6, 12)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    attn = attn_scale((q * layer.scale @ k.transpose(-2, -1)).softmax(-1), layer.lamb)
    torch.manual_seed(3)
    expected = layer.proj((F.dropout(attn, 0.5) @ v).transpose(1, 2).flatten(2))
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), expected)


def test_talking_heads_equal_timms_with_the_dense_definition(float64: None) -> None:
    layer = AttnScaleTalkingHeadAttn(12, 3, qkv_bias=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 6, 12)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    attn = layer.proj_l((q * layer.scale @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
    attn = attn_scale(layer.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), layer.lamb)
    torch.testing.assert_close(layer(x), layer.proj((attn @ v).transpose(1, 2).flatten(2)))


# ---- slots of any timm model -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("vit_tiny_patch16_224", {"init_values": 1e-2}),
        ("vit_tiny_patch16_224", {"reg_tokens": 4}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
        ("deit3_small_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_the_remedies_fit_any_timm_vision_transformer(name: str, options: dict) -> None:
    slots = dict(attn_layer=AttnScaleAttention, block_fn=FeatScaleBlock)
    model = timm.create_model(name, img_size=32, depth=2, num_classes=5, **options, **slots)
    plain = timm.create_model(name, img_size=32, depth=2, num_classes=5, **options)
    model.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-5, atol=1e-6)
    model(images).sum().backward()
    assert all(block.attn.lamb.grad.abs().sum() > 0 and block.lamb2.grad.abs().sum() > 0 for block in model.blocks)


def test_the_slots_are_timms_own_classes() -> None:
    assert issubclass(FeatScaleBlock, Block) and issubclass(FeatScaleLayerScaleBlock, LayerScaleBlock)
    assert issubclass(AttnScaleTalkingHeadAttn, TalkingHeadAttn)
    assert isinstance(tiny("attnscale_tiny_12"), VisionTransformer) and isinstance(tiny("attnscale_cait_S24"), Cait)


@pytest.mark.parametrize("name", ["attnfeatscale_tiny_12", "attnfeatscale_cait_XXS24"])
class TestWaysToRunAModel:
    """Each way gives the logits of the plain call."""

    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def model(self, name: str) -> nn.Module:
        torch.manual_seed(0)
        model = tiny(name).eval()
        randomise_remedy(model)
        return model

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, name: str, dtype: torch.dtype) -> None:
        model = self.model(name)
        expected = model(self.images)
        logits = model.to(dtype)(self.images.to(dtype))
        assert logits.dtype == dtype
        assert (logits.float() - expected).norm() / expected.norm() < 0.05

    def test_autocast(self, name: str) -> None:
        model = self.model(name)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(self.images)
        expected = model(self.images)
        assert (logits.float() - expected).norm() / expected.norm() < 0.05

    def test_gradient_checkpointing(self, name: str) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = self.model(name).train()
            model.set_grad_checkpointing(checkpointing)
            model(self.images).square().sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

    def test_intermediates(self, name: str) -> None:
        model = self.model(name)
        final, layers = model.forward_intermediates(self.images, output_fmt="NLC")
        assert len(layers) == TINY["depth"] and layers[-1].shape == (2, 16, TINY["embed_dim"])
        torch.testing.assert_close(final, model.forward_features(self.images))
        torch.testing.assert_close(model.forward_head(final), model(self.images))

    def test_meta_device(self, name: str) -> None:
        model = self.model(name)
        with torch.device("meta"):
            empty = tiny(name)
        empty.load_state_dict(model.state_dict(), assign=True)
        torch.testing.assert_close(empty.eval()(self.images), model(self.images))

    def test_head_reset(self, name: str) -> None:
        model = self.model(name)
        model.reset_classifier(3)
        assert model(self.images).shape == (2, 3)


def test_image_size_can_change_from_call_to_call() -> None:
    model = tiny("attnfeatscale_tiny_12", dynamic_img_size=True).eval()
    assert model(torch.randn(2, 3, 48, 40)).shape == (2, TINY["num_classes"])


@pytest.mark.parametrize("fused", [True, False])
def test_masks_reach_the_attention(fused: bool) -> None:
    set_fused_attn(fused)
    model = tiny("attnfeatscale_tiny_12").eval()
    set_fused_attn(True)
    images, mask = torch.randn(2, 3, 32, 32), torch.eye(17, dtype=torch.bool)
    assert not torch.allclose(model(images, attn_mask=mask), model(images))
    assert not torch.allclose(model(images, is_causal=True), model(images))


def test_weights_built_on_the_meta_device_can_be_initialised_there_after() -> None:
    with torch.device("meta"):
        model = tiny("attnfeatscale_tiny_12")
    model.to_empty(device="cpu").init_weights()
    assert all((p == 0).all() for name, p in model.named_parameters() if oversmoothing.is_remedy_parameter(name))
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()
