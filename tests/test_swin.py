"""Swin with the remedies: the reference's numbers, the same as converting timm's model, and every way to use one."""

import csv
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden_json, golden_rules
from runs import TINY as TINY_RUN
from runs import call_main, tiny_tree
from states import swin_code_state
from timm.models.swin_transformer import WindowAttention, window_partition
from torch import nn

import models
import oversmoothing
from oversmoothing.analysis import probe
from oversmoothing.remedies.attnscale import attn_scale
from oversmoothing.remedies.featscale import feat_scale
from oversmoothing.weights import CheckpointError, load_weights, number_of_classes, read_checkpoint
from reporting import EpochLog
from scripts import analyze, export

NAMES = [name for name in models.list_models() if "swin" in name]
REMEDIES = {"attnscale": "attnscale", "featscale": "featscale", "attnfeatscale": ["attnscale", "featscale"]}
# A map of 16 x 16 in windows of 4 x 4, every other block shifted, then one of 8 x 8.
TINY = dict(img_size=32, patch_size=2, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(1, 2), num_classes=7)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
SIZE = ("patch_size=2", "window_size=4", "embed_dim=12", "depths=(2,2)", "num_heads=(1,2)")


def name_of(remedy: str, size: str = "tiny") -> str:
    return f"{remedy}_swin_{size}_patch4_window7_224"


def tiny(remedy: str, **kwargs: object) -> nn.Module:
    """A small model whose maps are not uniform and whose remedy does something."""
    torch.manual_seed(0)
    model = timm.create_model(name_of(remedy), **TINY | kwargs).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_lamb(key) or key.endswith(("qkv.weight", "relative_position_bias_table")):
                parameter.normal_(std=0.5)
    return model


def is_lamb(name: str) -> bool:
    return name.rpartition(".")[2] in ("lamb", "lamb1", "lamb2")


# ---- golden parity ---------------------------------------------------------------------------------------------------
def timm_key(key: str) -> str:
    """The reference's name of a parameter, which is that of Swin's own code, as timm has it."""
    key = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", key)
    return re.sub(r"^head\.", "head.fc.", key)


def our_name(golden_name: str) -> str:
    return re.sub(r"^(attnscale|featscale)_", r"\1_swin_", golden_name)


def golden_names() -> list[str]:
    """The entries of our variants, and one of timm's plain models: the others are the same code at other sizes."""
    path = GOLDEN / "public" / "models.json"
    records = json.loads(path.read_text()) if path.is_file() else {}
    plain = "swin_tiny_patch4_window7_224"
    return [name for name, record in records.items() if our_name(name) in NAMES or name == plain] or [NAMES[0]]


def golden_model(name: str, record: dict) -> nn.Module:
    model = timm.create_model(our_name(name), num_classes=record["num_classes"], drop_path_rate=0.0)
    values = {
        timm_key(key): torch.from_numpy(golden_rules().fill(key, shape, 0))
        for key, shape, kind in record["state_dict"]
        if kind == "param"
    }
    model.load_state_dict(values, strict=True)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", golden_names())
def test_logits_loss_and_every_gradient_equal_the_reference(name: str, float64: None) -> None:
    golden_json("public/models.json")
    rules = golden_rules()
    record = rules.load_models(str(GOLDEN / "public"))[name]
    model = golden_model(name, record)
    logits = model.train()(
        torch.from_numpy(rules.images(0, 2, 224, 224))
    )  # nothing is drawn: the same as in evaluation
    np.testing.assert_allclose(logits.detach().numpy(), record["logits"], rtol=1e-9, atol=1e-10)
    loss = F.cross_entropy(logits, torch.from_numpy(rules.targets(0, 2, record["num_classes"])))
    loss.backward()
    assert loss.item() == pytest.approx(record["loss"], rel=1e-9)
    expected = {timm_key(key): norm for key, norm in record["grad_norms"].items()}
    for key, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad.norm(), expected.pop(key), rtol=1e-9, atol=1e-12, err_msg=key)
    assert not expected


@pytest.mark.slow
@pytest.mark.parametrize("remedy", ["attnscale", "featscale"])
def test_float32_logits_equal_the_reference_with_either_attention(remedy: str) -> None:
    name = f"{remedy}_tiny_patch4_window7_224"
    golden_json("public/models.json")
    record = golden_rules().load_models(str(GOLDEN / "public"))[name]
    model = golden_model(name, record).eval()
    images = torch.from_numpy(golden_rules().images(0, 2, 224, 224)).float()
    for fused in (False, True):
        oversmoothing.set_fused(model, fused)
        with torch.no_grad():
            error = np.linalg.norm(model(images).numpy() - record["logits"]) / np.linalg.norm(record["logits"])
        assert error <= 1e-4


def test_parameters_and_their_shapes_are_the_references() -> None:
    for name, record in golden_json("public/models.json").items():
        if record["kind"] != "swin" or our_name(name) not in NAMES:
            continue
        with torch.device("meta"):
            model = timm.create_model(our_name(name))
        expected = {timm_key(key): shape for key, shape, kind in record["state_dict"] if kind == "param"}
        assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == expected, name
        assert sum(p.numel() for p in model.parameters()) == record["n_params"], name


# ---- what a variant is -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_timms_model_with_its_remedy(name: str) -> None:
    remedy, plain_name = name.split("_", 1)
    with torch.device("meta"):
        model, plain = (timm.create_model(name, depths=(1, 1, 2, 1)) for name in (name, plain_name))
    oversmoothing.add_remedy(plain, REMEDIES[remedy])
    assert [(k, t.shape) for k, t in model.state_dict().items()] == [
        (k, t.shape) for k, t in plain.state_dict().items()
    ]
    ours, theirs = ({n: oversmoothing.remedies_at(m) for n, m in x.named_modules()} for x in (model, plain))
    assert {n: r for n, r in ours.items() if r} == {n: r for n, r in theirs.items() if r} != {}
    assert oversmoothing.remedies_of(plain) and not oversmoothing.remedies_of(model), "the name says what it has"
    with pytest.raises(oversmoothing.RemedyError, match="built in"):
        oversmoothing.add_remedy(model, "gfsa")
    cfg, timms = model.pretrained_cfg, plain.pretrained_cfg
    assert cfg["crop_pct"] == 224 / 256
    same = ("input_size", "pool_size", "interpolation", "mean", "std", "first_conv", "classifier", "num_classes")
    assert {key: cfg[key] for key in same} == {key: timms[key] for key in same}


@pytest.mark.parametrize("remedy", REMEDIES)
def test_it_computes_what_a_converted_model_does_and_starts_as_the_plain_one(remedy: str) -> None:
    model = tiny(remedy)
    plain = timm.create_model("swin_tiny_patch4_window7_224", **TINY).eval()
    lambdas = {key for key in model.state_dict() if is_lamb(key)}
    plain.load_state_dict({k: t for k, t in model.state_dict().items() if k not in lambdas})
    expected = plain(IMAGES)
    assert not torch.allclose(model(IMAGES), expected, atol=1e-3)
    oversmoothing.add_remedy(plain, REMEDIES[remedy])
    torch.testing.assert_close(plain(IMAGES), expected, rtol=0, atol=0)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(IMAGES), model(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("remedy", REMEDIES)
def test_it_trains_with_a_gradient_for_every_parameter_and_decay_for_matrices_alone(remedy: str) -> None:
    model = tiny(remedy, drop_path_rate=0.0).train()
    model(IMAGES).logsumexp(-1).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key
    tables = {key for key, _ in model.named_parameters() if "relative_position_bias_table" in key}
    assert model.no_weight_decay() == tables


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_window_attention_equals_the_dense_definition(fused: bool, shifted: bool, float64: None) -> None:
    """N is the window's area, and masked pairs get -lamb / N: the mask is in the maps before AttnScale."""
    model = oversmoothing.set_fused(tiny("attnscale").double(), fused)
    block = model.layers[0].blocks[int(shifted)]
    attn, mask = block.attn, block.attn_mask
    assert isinstance(attn, WindowAttention) and (mask is not None) == shifted
    x = torch.randn(2 * 16, 16, 12, requires_grad=True)
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q * attn.scale @ k.mT
    scores = scores + attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)
    if shifted:
        scores = (scores.unflatten(0, (2, 16)) + mask[:, None]).flatten(0, 1)
    maps = attn_scale(scores.softmax(-1), attn.lamb)
    if shifted:
        kept_apart = maps.unflatten(0, (2, 16)).masked_select(mask[:, None] != 0)
        torch.testing.assert_close(kept_apart, (-attn.lamb / 16).expand_as(kept_apart))
    expected = attn.proj((maps @ v).transpose(1, 2).flatten(2))
    found = attn(x, mask)
    torch.testing.assert_close(found, expected)
    inputs, weights = [x, *attn.parameters()], torch.randn_like(found)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_featscale_takes_the_mean_of_the_whole_map_with_gain_one(float64: None) -> None:
    model = tiny("featscale").double()
    plain = timm.create_model("swin_tiny_patch4_window7_224", **TINY).double().eval()
    plain.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if not is_lamb(key)})
    x = torch.randn(2, 16, 16, 12)
    for block, timms in zip(model.layers[0].blocks, plain.layers[0].blocks, strict=True):
        tokens = timms._attn(x).flatten(1, 2)
        expected = feat_scale(tokens, block.lamb1, block.lamb2, gain=1.0).view_as(x)
        torch.testing.assert_close(block._attn(x), expected)
        assert not torch.allclose(window_partition(expected, (4, 4)).mean(), expected[:, :4, :4].mean())


def test_drop_acts_behind_the_patches_in_the_projections_and_the_mlp() -> None:
    model = tiny("attnscale", pos_drop_rate=0.2, proj_drop_rate=0.2)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert rates.pop("patch_embed.drop") == 0.2
    for name, rate in rates.items():
        assert rate == (0.0 if name.endswith(("attn_drop", "head.drop")) else 0.2), name


@pytest.mark.parametrize("remedy", REMEDIES)
class TestWaysToRunAModel:
    """Each way gives the logits of the plain call."""

    def test_autocast(self, remedy: str) -> None:
        model = tiny(remedy)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(IMAGES)
        expected = model(IMAGES)
        assert (logits.float() - expected).norm() / expected.norm() < 0.05

    def test_gradient_checkpointing(self, remedy: str) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = tiny(remedy, drop_path_rate=0.0).train()
            model.set_grad_checkpointing(checkpointing)
            model(IMAGES).square().sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

    def test_features(self, remedy: str) -> None:
        model = tiny(remedy)
        final, stages = model.forward_intermediates(IMAGES)
        assert [tuple(stage.shape) for stage in stages] == [(2, 12, 16, 16), (2, 24, 8, 8)]
        torch.testing.assert_close(model.forward_head(final), model(IMAGES))
        extractor = timm.create_model(name_of(remedy), **TINY, features_only=True, out_indices=(0, 1)).eval()
        assert [stage.shape[-1] for stage in extractor(IMAGES)] == [12, 24]

    def test_the_meta_device_and_a_new_start(self, remedy: str) -> None:
        with torch.device("meta"):
            model = timm.create_model(name_of(remedy), **TINY)
        model.to_empty(device="cpu").init_weights()
        assert all((p == 0).all() for key, p in model.named_parameters() if is_lamb(key))
        assert model.eval()(IMAGES).isfinite().all()

    def test_another_image_size(self, remedy: str) -> None:
        """Built for it, or changed to it; the windows of a smaller map shrink."""
        model = tiny(remedy, img_size=48)
        assert model(torch.randn(1, 3, 48, 48)).shape == (1, 7)
        model.set_input_size(img_size=(64, 32))
        assert model(torch.randn(1, 3, 64, 32)).isfinite().all()


# ---- weights of Swin's own code --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model("swin_tiny_patch4_window7_224", **TINY).eval()


@pytest.fixture(scope="module")
def published_file(plain: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "swin_tiny_patch4_window7_224.pth"
    torch.save({"model": swin_code_state(plain)}, path)
    return path


def test_a_file_of_swins_own_code_loads_with_every_key_accounted_for(
    plain: nn.Module, published_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    state = read_checkpoint(published_file)["model"]
    assert "layers.0.downsample.reduction.weight" in state and "layers.0.blocks.1.attn_mask" in state
    assert number_of_classes(state) == number_of_classes(plain.state_dict()) == 7
    model = timm.create_model(name_of("attnfeatscale"), **TINY).eval()
    missing = load_weights(model, state, source="file", may_be_missing=oversmoothing.is_remedy_parameter)
    assert missing and all(map(is_lamb, missing))
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=0)
    lines = caplog.text
    assert "left out 6 constants (relative_position_index, attn_mask)" in lines and "head to head.fc" in lines
    assert "layers.*.blocks.*.attn.lamb (4)" in lines


def test_a_file_of_the_papers_own_swin_loads_strictly() -> None:
    source, model = tiny("attnfeatscale"), timm.create_model(name_of("attnfeatscale"), **TINY).eval()
    assert load_weights(model, swin_code_state(source), source="file") == []
    torch.testing.assert_close(model(IMAGES), source(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_file_of_swins_own_code_with_another_key_is_refused(change: str, plain: nn.Module) -> None:
    state = swin_code_state(plain)
    if change == "missing":
        del state["layers.0.downsample.norm.weight"]
    elif change == "unexpected":
        state["layers.0.blocks.0.attn.extra"] = torch.zeros(1)
    else:
        state["layers.0.blocks.0.attn.relative_position_bias_table"] = torch.zeros(81, 1)
    named = {"missing": "layers.1.downsample.norm.weight", "unexpected": "attn.extra", "shape": "bias_table (81, 1)"}
    with pytest.raises(CheckpointError, match=re.escape(named[change])):
        load_weights(timm.create_model("swin_tiny_patch4_window7_224", **TINY), state, source="file")


def test_a_fine_tune_takes_other_windows_and_other_classes(plain: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = timm.create_model(name_of("attnscale"), **TINY | dict(window_size=8, num_classes=3)).eval()
    load_weights(
        model, swin_code_state(plain), source="file", finetune=True, may_be_missing=oversmoothing.is_remedy_parameter
    )
    assert "dropped head.fc (7 classes in the file, 3 in the model)" in caplog.text
    assert "interpolated 4 of relative_position_bias_table to other windows" in caplog.text
    ours, theirs = (m.layers[0].blocks[0].attn.relative_position_bias_table for m in (model, plain))
    assert ours.shape == (225, 1) and theirs.shape == (49, 1)
    torch.testing.assert_close(ours[112], theirs[24])  # no offset: the middle of both tables
    with pytest.raises(CheckpointError, match="pass the file with --finetune"):
        load_weights(model, swin_code_state(plain), source="file", may_be_missing=oversmoothing.is_remedy_parameter)


def test_pretrained_takes_timms_config_of_the_plain_model_and_a_file(plain: nn.Module, published_file: Path) -> None:
    overlay = timm.get_pretrained_cfg("swin_tiny_patch4_window7_224.ms_in1k").to_dict()
    overlay |= dict(file=str(published_file), hf_hub_id=None, url="", num_classes=7)
    model = timm.create_model(name_of("featscale"), pretrained=True, pretrained_cfg_overlay=overlay, **TINY).eval()
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=0)
    assert model.pretrained_cfg["crop_pct"] == 0.9, "the overlay's"


# ---- runs ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, three steps of four images an epoch."""
    return tiny_tree(tmp_path_factory.mktemp("data"), train=12)


def run_flags(data: Path, folder: Path | None, *more: object) -> list[str]:
    words = [*TINY_RUN, "--data-path", data, "--model", name_of("attnfeatscale"), "--model-kwargs", *SIZE]
    return [*map(str, words), *(["--output_dir", str(folder)] if folder else []), *map(str, more)]


@pytest.fixture(scope="module")
def trained(data: Path, published_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of two epochs that began with a published file; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    printed = call_main(*run_flags(data, folder, *RECIPE, "--finetune", published_file)).stdout
    assert "dropped head.fc (7 classes in the file, 3 in the model)" in printed and "renamed layers.i" in printed
    return folder


RECIPE = ("--epochs", 2, "--sched-on-updates", "--scale-min-lr", "--lr", 0.05, "--clip-grad", 5, "--drop-path", 0.3)
RECIPE += ("--no-model-ema", "--no-repeated-aug", "--checkpoint-steps", 2, "--auto_reload")


def test_a_run_resumed_within_an_epoch_equals_one_left_alone(trained: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "parts")
    (tmp_path / "parts" / "checkpoint.pth").unlink()
    before = read_checkpoint(tmp_path / "parts" / "checkpoint_prev.pth")
    assert (before["epoch"], before["step"]) == (0, 2)
    printed = call_main(*run_flags(data, tmp_path / "parts", *RECIPE)).stdout
    assert "Epoch: [0]" not in printed and "Epoch: [1]  [2/3]" in printed
    whole, parts = (read_checkpoint(folder / "checkpoint.pth") for folder in (trained, tmp_path / "parts"))
    for key in ("model", "optimizer"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    assert EpochLog.read(trained / "log.txt") == EpochLog.read(tmp_path / "parts" / "log.txt")
    lambdas = {name: tensor for name, tensor in whole["model"].items() if is_lamb(name)}
    assert len(lambdas) == 12 and all(tensor.any() for tensor in lambdas.values())


def test_resume_of_a_published_file_is_weights_only(data: Path, plain: nn.Module, tmp_path: Path) -> None:
    torch.save({"model": swin_code_state(plain), "max_accuracy": 81.2, "epoch": 299}, tmp_path / "swin.pth")
    words = run_flags(data, None, "--resume", tmp_path / "swin.pth", "--num-classes", 7, "--epochs", 1)
    printed = call_main(*words).stdout
    assert "weights only, training starts at epoch 0" in printed and "left out 6 constants" in printed
    assert "Accuracy of the network" in call_main(*words, "--eval").stdout


def test_any_image_size_trains_that_holds_a_patch(data: Path) -> None:
    """Windows are padded where they do not divide the map, and shrink with a map smaller than they are."""
    assert "Epoch: [0]" in call_main(*run_flags(data, None, "--input-size", 45)).stdout
    done = call_main(*run_flags(data, None, "--input-size", 1), code=2)
    assert "takes no RGB images of 1 pixels" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_analysis_sees_the_remedies_maps_and_parameters(data: Path, trained: Path, tmp_path: Path) -> None:
    words = ("--data-path", data, "--resume", trained / "checkpoint.pth", "--num-images", 3, "--output_dir", tmp_path)
    args = analyze.get_parser().parse_args([str(word) for word in ("--model", name_of("attnfeatscale"), *words)])
    assert analyze.main(args).is_file()
    rows = list(csv.DictReader((tmp_path / "analysis.csv").open()))
    assert {row["block"] for row in rows} == {f"layers.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)}
    assert {"lamb", "lamb1", "lamb2", "dc_gain", "spectrum", "hc_dc_attention"} <= {row["quantity"] for row in rows}
    model = tiny("attnscale")
    images, found = torch.randn(2, 3, 32, 32), []
    with probe.evaluating(model), probe.visiting(model, lambda view: found.append(view.attention_maps())) as layers:
        model(images)
    for layer, maps in zip(layers, found, strict=True):
        torch.testing.assert_close(maps.applied, attn_scale(maps.softmax, layer.attn.lamb))
    assert (found[1].softmax < 1e-20).any(), "the mask of shifted windows"


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_a_trained_model_is_exported(suffix: str, trained: Path, tmp_path: Path) -> None:
    """For any batch size; the command compares what it wrote with the model."""
    export.main(["--checkpoint", str(trained / "checkpoint.pth"), "--output", str(tmp_path / f"swin{suffix}")])
    about = json.loads((tmp_path / "swin.json").read_text())
    assert about["check"]["batch_sizes"] == [1, 2, 5] and about["check"]["max_difference"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_torch_compile_has_no_graph_break(fused: bool) -> None:
    model = oversmoothing.set_fused(tiny("attnfeatscale"), fused)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
