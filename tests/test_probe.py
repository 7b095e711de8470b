"""What the visitor hands out of a forward pass: the residual stream, the attention branch, the maps."""

import architectures
import pytest
import timm
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

import models  # noqa: F401  (registers the zoo with timm)
from oversmoothing.analysis import probe, spectrum

VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3)


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturb(module: nn.Module) -> nn.Module:
    """No parameter at a value, such as zero, that would hide a missing term."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module.double().eval()


def test_an_unknown_attention_is_refused_by_name() -> None:
    class OtherAttention(Attention):
        pass

    model = timm.create_model("vit_tiny_patch16_224", attn_layer=OtherAttention, **VIT)
    with pytest.raises(probe.UnsupportedModelError, match=r"VisionTransformer.*blocks\.0\.attn.*OtherAttention"):
        probe.find_layers(model)
    with pytest.raises(probe.UnsupportedModelError, match="ResNet has no block"):
        probe.find_layers(timm.create_model("resnet18"))


def small_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "swin_tiny_patch4_window7_224": dict(img_size=32, embed_dim=12, depths=(1, 2), num_heads=(2, 3), window_size=4),
        "eva02_tiny_patch14_224": VIT | dict(patch_size=8, embed_dim=24),
        "cait_xxs24_224": VIT | dict(init_values=1.0),
        "featscale_cait_S24_224": VIT | dict(init_values=1.0),
        "attnscale_cait_S24_224": VIT | dict(init_values=1.0),
    }
    return timm.create_model(name, num_classes=5, **sizes.get(name, VIT))


# In these the second norm reads the stream after the first residual sum, so it shows what the visitor must hand out.
PRE_NORM = {
    name: "norm2"
    for name in ("beit", "dinov3", "volo", "maxvit", "hiera", "naflexvit", "sam", "coatnet", "convit", "pvt")
}


@pytest.mark.parametrize("name", [*PRE_NORM, "swinv2", "swinv2_cr", "davit"])
def test_families_of_timm(name: str) -> None:
    model, batch = architectures.build(name), architectures.images(name)
    streams, residuals = [], []
    layers = probe.find_layers(model)
    if name in PRE_NORM:
        for layer in layers:
            layer.block.norm2.register_forward_pre_hook(lambda norm, args: streams.append(args[0]))

    def visit(view: probe.LayerView) -> None:
        stats = probe.feature_statistics(view, 16) | probe.map_statistics(view.attention_maps())
        assert all(values.isfinite().all() for values in stats.values())
        assert ("delta_log_amplitude" in stats) == view.layer.kind.raster
        assert view.after_attention.shape == view.after_residual.shape == view.after_mlp.shape
        residuals.append(view.after_residual)

    with torch.no_grad(), probe.visiting(model, visit):
        model(batch)
    assert len(residuals) == len(layers)
    for residual, stream in zip(residuals, streams, strict=name in PRE_NORM):
        stream = stream.flatten(2).mT if name == "coatnet" else stream
        torch.testing.assert_close(residual, stream.reshape(residual.shape))


def test_layers_without_a_spectrum_are_left_out() -> None:
    names = [layer.name for layer in probe.find_layers(architectures.build("hiera"))]
    assert names == ["blocks.0", "blocks.3"]  # the others pool their queries
    with pytest.raises(probe.UnsupportedModelError, match="no attention layer has as many queries as keys"):
        probe.find_layers(architectures.build("pvt_linear"))


@pytest.mark.parametrize("name", ["vit_parallel", "tnt"])
def test_blocks_with_several_attention_branches_are_refused(name: str) -> None:
    with pytest.raises(probe.UnsupportedModelError, match="one of several attention layers in one block"):
        probe.find_layers(architectures.build(name))


MODELS = [
    "vit_base_patch16_224",
    "deit_small_distilled_patch16_224",
    "cait_xxs24_224",
    "swin_tiny_patch4_window7_224",
    "eva02_tiny_patch14_224",
    "attnscale_small_12",
    "featscale_small_24",
    "attnscale_cait_S24_224",
    "featscale_cait_S24_224",
]


@pytest.mark.parametrize("name", MODELS)
def test_visiting_hands_out_the_residual_stream_and_leaves_no_trace(name: str) -> None:
    model = perturb(small_model(name))
    images = random_tokens(2, 3, 32, 32)
    expected = model(images)
    outputs, inputs, seen = [], [], []
    for layer in probe.find_layers(model):
        layer.block.register_forward_hook(lambda block, args, output: outputs.append(output))
        # In these pre-norm blocks the second norm reads the stream after the first residual sum.
        layer.block.norm2.register_forward_hook(lambda norm, args, output: inputs.append(args[0]))

    def visit(view: probe.LayerView) -> None:
        stats = probe.feature_statistics(view, 16) | probe.map_statistics(view.attention_maps())
        assert all(values.isfinite().all() for values in stats.values())
        seen.append((view.index, view.after_residual, view.after_mlp))

    with probe.visiting(model, visit) as layers:
        torch.testing.assert_close(model(images), expected)
    assert [index for index, _, _ in seen] == list(range(3)) and len(layers) == 3
    for (_, residual, output), stream, block_output in zip(seen, inputs[-3:], outputs[-3:], strict=True):
        torch.testing.assert_close(residual, stream.reshape(residual.shape))
        torch.testing.assert_close(output, block_output.reshape(output.shape))
    seen.clear()
    model(images)
    assert not seen


@pytest.mark.parametrize("name", ["featscale_small_12", "featscale_cait_S24_224"])
def test_the_attention_branch_is_read_after_featscale(name: str) -> None:
    plain, scaled = small_model(name), small_model(name)
    with torch.no_grad():
        for layer in probe.find_layers(scaled):
            layer.block.lamb2.fill_(0.5)
            layer.block.lamb1.fill_(-0.25)
    branches = []
    for model in (plain, scaled):
        collected = []
        with probe.evaluating(model), probe.visiting(model, lambda v, c=collected: c.append(v.after_attention)):
            model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        branches.append(collected[0])  # the first layer: the same input in both models
    (dc_before, hc_before), (dc, hc) = ((y.mean(dim=1), y - y.mean(dim=1, keepdim=True)) for y in branches)
    dc, hc = dc / dc_before, (hc * hc_before).sum(dim=1) / hc_before.square().sum(dim=1)  # by least squares
    gain = 2.0 if name == "featscale_small_12" else 1.0
    torch.testing.assert_close(dc, torch.full_like(dc, 1 - 0.25 * gain), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(hc, torch.full_like(hc, 1 + 0.5 * gain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_patch_grid(name: str) -> None:
    assert probe.patch_grid(small_model(name), torch.zeros(1, 3, 32, 32)) == ((8, 8) if "swin" in name else (4, 4))


def test_class_attention_is_left_out() -> None:
    names = [layer.name for layer in probe.find_layers(small_model("cait_xxs24_224"))]
    assert names == ["blocks.0", "blocks.1", "blocks.2"]


def test_layer_report_has_one_number_a_layer_and_puts_the_modes_back() -> None:
    model = small_model("attnscale_small_12").train()
    model.blocks[1].eval()
    with torch.no_grad():
        model.blocks[2].attn.lamb.copy_(torch.tensor([0.0, 0.3, 0.6]))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    report = probe.layer_report(model, images)
    features = {"hc_dc_attention", "hc_dc_residual", "hc_dc_mlp", "token_similarity", "effective_rank"}
    assert set(report) == {*features, "lamb"}
    assert all(len(values) == 3 for values in report.values())
    assert report["lamb"] == pytest.approx([0, 0, 0.3])
    assert [block.training for block in model.blocks] == [True, False, True] and model.training
    assert report == probe.layer_report(model, images)
    features = model.eval().forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC")[1]
    last = torch.cat([features[-1][1], features[-1][0]], dim=1)
    assert report["hc_dc_mlp"][-1] == pytest.approx(spectrum.high_frequency_ratio(last).mean().item(), rel=1e-4)
    assert report["effective_rank"][-1] == pytest.approx(spectrum.effective_rank(last).mean().item(), rel=1e-4)


def test_layer_report_of_a_model_that_has_diverged_is_not_a_number() -> None:
    model = small_model("deit_small_12")
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias.fill_(float("inf"))
    ranks = probe.layer_report(model, torch.randn(2, 3, 32, 32))["effective_rank"]
    assert ranks[0] > 1 and ranks[1] != ranks[1]


def test_layer_report_reads_both_weights_of_featscale() -> None:
    report = probe.layer_report(small_model("featscale_small_24"), torch.zeros(1, 3, 32, 32))
    assert report["lamb1"] == report["lamb2"] == [0, 0, 0] and "lamb" not in report


@pytest.mark.parametrize("name", ["attnscale_small_12", "cait_xxs24_224"])
def test_layer_report_draws_nothing_at_random(name: str) -> None:
    model = timm.create_model(name, num_classes=5, **VIT, drop_path_rate=0.5).train()
    before = torch.get_rng_state()
    probe.layer_report(model, torch.zeros(2, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), before)


def test_layer_report_of_a_compiled_model_is_that_of_its_plain_code() -> None:
    model, images = small_model("attnscale_small_12"), torch.randn(2, 3, 32, 32)
    expected = probe.layer_report(model, images)
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> nn.Module:
        compilations.append(graph)
        return graph

    model.compile(backend=backend)
    logits, count = model(images), len(compilations)
    assert count > 0 and probe.layer_report(model, images) == expected
    torch.testing.assert_close(model(images), logits, rtol=0, atol=0)
    assert len(compilations) == count  # nothing was left behind that makes it compile again


def test_layer_report_of_a_model_with_gradient_checkpointing() -> None:
    model, images = small_model("featscale_small_12"), torch.randn(2, 3, 32, 32)
    expected = probe.layer_report(model, images)
    model.set_grad_checkpointing(True)
    assert probe.layer_report(model, images) == expected
