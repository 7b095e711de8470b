"""``add_remedy`` on the models that people have: names, weights, what a model must still do, and what is refused."""

import copy
import io
import json
import math
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from architectures import ARCHITECTURES, REFUSED, TRANSFORMERS, build, build_transformers, images
from conftest import TINY
from runs import ROOT
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

import models  # noqa: F401  (registers the zoo)
import oversmoothing
from oversmoothing import (
    RemedyError,
    add_remedy,
    describe,
    is_remedy_parameter,
    list_remedies,
    remedies_of,
    remove_remedy,
)
from oversmoothing.attention import KINDS, attention_layers
from oversmoothing.fused.blocks import FoldedBlock
from oversmoothing.remedies import REMEDIES

SEVERAL = ["attnscale", "featscale", "neutreno", "gated"]
IDENTITY = [name for name in list_remedies() if name != "reattention"]


def vit(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    return timm.create_model(name, **{**TINY, **kwargs})


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_remedy_parameter(name):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def any_model(backbone: str) -> nn.Module:
    return build_transformers(backbone) if backbone in TRANSFORMERS else build(backbone)


def refusal(model: nn.Module, name: str) -> str | None:
    """Why a remedy does not fit; None where it does. The model is as it was."""
    try:
        remove_remedy(add_remedy(model, name))
    except RemedyError as error:
        return str(error)
    return None


def result(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output if isinstance(output, Tensor) else output[0]  # transformers: logits, or the last hidden state


# ---- any architecture, any remedy ------------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone", [*ARCHITECTURES, *TRANSFORMERS])
def test_every_remedy_starts_as_the_model_or_is_refused_with_a_reason(backbone: str) -> None:
    """Also the old state dict in its order, and the way back to the last bit."""
    model, x = any_model(backbone), images(backbone)
    expected = result(model, x)
    state, modules = model.state_dict(), [type(module) for module in model.modules()]
    for name in list_remedies():
        if reason := refusal(model, name):
            assert name in reason and type(model).__name__ in reason
        else:
            output = result(add_remedy(model, name), x)
            if name in IDENTITY:
                torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12, msg=name)
            assert output.isfinite().all()
            converted = list(model.state_dict())
            assert [key for key in converted if not is_remedy_parameter(key)] == list(state)
            assert len(converted) > len(state), name
            remove_remedy(model)
        assert [type(module) for module in model.modules()] == modules
        assert list(model.state_dict()) == list(state) and not remedies_of(model)
    assert torch.equal(result(model, x), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def families_table() -> str:
    """Markdown: a row a model, a column a remedy, the reasons of refusals below."""
    names, reasons = list_remedies(), {}
    lines = ["| model | " + " | ".join(f"`{name}`" for name in names) + " |", "| --- |" + " :-: |" * len(names)]
    for backbone in (*ARCHITECTURES, *TRANSFORMERS, *REFUSED):
        model = any_model(backbone)
        label = ARCHITECTURES.get(backbone, REFUSED.get(backbone, [None]))[0]
        label = label if isinstance(label, str) else type(model).__name__
        if backbone.endswith(("_norms", "_rotary", "_grouped", "_shared_bias", "_linear", "_scaling")):
            label += f", {backbone.partition('_')[2].replace('_', ' ')}"
        cells = []
        for name in names:
            if (reason := refusal(model, name)) is None:
                cells.append("yes")
            else:
                text = (reason.partition(" is not supported: ")[2] or reason.partition(": ")[2]).partition(".")[0]
                cells.append(f"[{reasons.setdefault(text, len(reasons) + 1)}]")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for text, number in reasons.items())])


def remedies_table() -> str:
    """Markdown: what the classes say of themselves."""
    lines = ["| name | the branch becomes | learns | published | costs | source |", "| --- " * 6 + "|"]
    for remedy in map(describe, list_remedies()):
        learns = ", ".join(f"`{name}` {shape}" for name, shape in remedy["parameters"].items())
        published = ", ".join(f"{key}={value}" for key, value in remedy["published"].items()) or "as it is"
        formula = remedy["formula"].replace("|", "\\|")
        cells = [f"`{remedy['name']}`", formula, learns, published, remedy["cost"], remedy["source"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pytest.mark.parametrize("name", ["remedies", "families"])
def test_the_pages_tables_are_true(name: str) -> None:
    """With UPDATE_DOCS=1 in the environment they are written anew."""
    page = ROOT / "docs" / "remedies.md"
    made = {"remedies": remedies_table, "families": families_table}[name]()
    head, start, rest = page.read_text().partition(f"<!-- {name}: made by tests/test_convert.py -->\n")
    written, end, tail = rest.partition("<!-- end -->")
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(f"{head}{start}\n{made}\n\n{end}{tail}")
    else:
        assert written.strip() == made, "write it anew: UPDATE_DOCS=1 pytest tests/test_convert.py -k tables"


@pytest.mark.parametrize("backbone", ["deit", "dinov3_grouped", "cait", "swin", "hiera", "maxvit"])
def test_every_parameter_of_several_remedies_learns(backbone: str) -> None:
    model = build(backbone)
    names = [name for name in (*SEVERAL, "contranorm") if refusal(model, name) is None]
    add_remedy(model, names)
    model(images(backbone)).square().sum().backward()
    own = {name: p.grad for name, p in model.named_parameters() if is_remedy_parameter(name)}
    assert len(own) >= len(names)
    assert all(grad is not None and grad.abs().max() > 0 for grad in own.values())


@pytest.mark.parametrize("backbone", REFUSED)
def test_a_model_without_such_attention_is_refused(backbone: str) -> None:
    with pytest.raises(RemedyError, match="not supported: (its maps are between channels|attention and MLP share)"):
        add_remedy(build(backbone), "attnscale")


# ---- names and weights -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("plain", "names", "variant"),
    [
        ("deit_small_12", "attnscale", "attnscale_small_12"),
        ("deit_small_12", "featscale", "featscale_small_12"),
        ("deit_small_12", ["featscale", "attnscale"], "attnfeatscale_small_12"),
        ("cait_XXS24_224", "attnscale", "attnscale_cait_XXS24_224"),
        ("cait_XXS24_224", "featscale", "featscale_cait_XXS24_224"),
        ("cait_XXS24_224", ["attnscale", "featscale"], "attnfeatscale_cait_XXS24_224"),
    ],
)
def test_a_converted_plain_model_is_the_zoos_variant(plain: str, names: str | list[str], variant: str) -> None:
    model, zoo = randomized(add_remedy(vit(plain), names)), vit(variant)
    assert [type(module) for module in model.modules()] == [type(module) for module in zoo.modules()]
    zoo.load_state_dict(model.state_dict())
    assert list(zoo.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), zoo.eval()(x))


def test_a_model_of_the_librarys_blocks_gets_featscale_as_timms_does() -> None:
    """``FoldedBlock`` fits timm's ``block_fn``."""
    theirs, ours = vit("deit_small_12"), vit("deit_small_12", block_fn=FoldedBlock)
    for model in (theirs, ours):
        add_remedy(model, "featscale")
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {type(module) for module in remove_remedy(ours).blocks} == {FoldedBlock}


def test_weights_load_both_ways() -> None:
    plain, model = vit(), add_remedy(vit(), SEVERAL)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing and all(map(is_remedy_parameter, missing)) and not unexpected
    missing, unexpected = plain.load_state_dict(randomized(model).state_dict(), strict=False)
    assert unexpected and all(map(is_remedy_parameter, unexpected)) and not missing
    again = add_remedy(vit(), remedies_of(model))
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("backbone", ["swin", "eva02"])
def test_featscale_lives_on_the_module_that_ends_the_branch(backbone: str) -> None:
    model = add_remedy(build(backbone), "featscale")
    added = [name for name, _ in model.named_parameters() if is_remedy_parameter(name)]
    stem = {"swin": "layers.0.blocks.0", "eva02": "blocks.0.attn"}[backbone]
    assert added[:2] == [f"{stem}.lamb1", f"{stem}.lamb2"]


@pytest.mark.parametrize(("backbone", "gain"), [("deit", 2.0), ("dinov3", 1.0), ("cait", 1.0), ("swin", 1.0)])
def test_featscales_gain(backbone: str, gain: float) -> None:
    assert remedies_of(add_remedy(build(backbone), "featscale"))["featscale"]["gain"] == gain
    assert remedies_of(add_remedy(build(backbone), "featscale", gain=3.0))["featscale"]["gain"] == 3.0


def test_featscale_on_swin_means_over_the_whole_map() -> None:
    """Also where the map is padded to whole windows and shifted."""
    model, plain = build("swin", img_size=24), build("swin", img_size=24)
    randomized(add_remedy(model, "featscale"))
    for block, plain_block in zip(model.layers[0].blocks, plain.layers[0].blocks, strict=True):
        x = torch.randn(2, *block.input_resolution, 24, dtype=torch.float64)
        y = plain_block._attn(x)
        dc = y.mean(dim=(1, 2), keepdim=True)
        torch.testing.assert_close(block._attn(x), y + block.lamb1 * dc + block.lamb2 * (y - dc))


def test_the_model_remembers_as_plain_data() -> None:
    model = add_remedy(vit(), {"gfsa": dict(K=3, layers=slice(1, None)), "neutreno": dict(layers=[2])})
    record = remedies_of(model)
    assert record == json.loads(json.dumps(record))
    assert record["gfsa"] == dict(learnable=True, K=3, beta=0.0, layers="1:")
    again = add_remedy(vit(), record)
    assert list(again.state_dict()) == list(model.state_dict())
    added = [name for name in model.state_dict() if is_remedy_parameter(name)]
    assert added == ["blocks.1.attn.gfsa_beta", "blocks.2.attn.gfsa_beta", "blocks.2.attn.neutreno_alpha"]


@pytest.mark.parametrize("layers", ["1:", slice(1, 3), [1, 2], (-1, -2), range(1, 3)])
def test_layers(layers: Any) -> None:
    model = add_remedy(vit(), "attnscale", layers=layers)
    assert [hasattr(block.attn, "lamb") for block in model.blocks] == [False, True, True]


def test_every_parameter_a_remedy_adds_is_known_by_its_name() -> None:
    for name in list_remedies():
        plain = {key for key, _ in vit().named_parameters()}
        added = {key for key, _ in add_remedy(vit(), name).named_parameters()} - plain
        assert added and all(map(is_remedy_parameter, added))
        assert not any(map(is_remedy_parameter, plain))
        last = {part for key in added for part in key.split(".")}
        assert all(key.split(".")[0] in last for key in describe(name)["parameters"])


def test_a_remedys_parameters_get_no_weight_decay_if_they_are_vectors() -> None:
    from timm.optim import param_groups_weight_decay

    model = add_remedy(vit(), [name for name in IDENTITY if name != "gated"])
    exempt, _ = param_groups_weight_decay(model, 0.05)
    assert all(any(p is q for q in exempt["params"]) for n, p in model.named_parameters() if is_remedy_parameter(n))


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "kwargs", "message"),
    [
        ("atnscale", {}, "there is no remedy 'atnscale'; did you mean attnscale"),
        ("dropout", {}, "there are attnscale"),
        ([], {}, "no remedy is named"),
        (["gfsa", "gfsa"], {}, "twice"),
        ("gfsa", dict(k=3), "gfsa has no option k; there are"),
        ("gfsa", dict(K="three"), "gfsa: K='three' is not a number"),
        ("gfsa", dict(learnable=1), "is not True or False"),
        ("gfsa", dict(K=None), "gfsa: K=None is not a number"),
        ("gfsa", dict(K=float("nan")), "gfsa: K=nan: give a number of at most 1000000"),
        ("featscale", dict(gain=-math.inf), "featscale: gain=-inf: give a number"),
        ("contranorm", dict(tau=0), "tau=0: give a temperature above 0"),
        ("gated", dict(std=-1), "std=-1: give a standard deviation"),
        ({"gfsa": 3}, {}, "the options of gfsa are 3: give a mapping"),
        ("gfsa", dict(layers=[True, False, True]), "give a slice, indices below 3"),
        ("gfsa", dict(layers=True), "layers=True: give a slice"),
        ("gfsa", dict(layers=1.5), "layers=1.5: give a slice"),
        (["gfsa", "neutreno"], dict(K=3), "of which remedy"),
        (["gated", "reattention"], {}, "gated leaves none: name reattention first"),
        ("gfsa", dict(layers="7:"), "chooses none of the model's 3 layers"),
        ("gfsa", dict(layers=[3]), "indices below 3"),
        ("gfsa", dict(layers="a:b"), "give a slice"),
        ("neutreno", dict(layers=[0]), "of its layers only the first is chosen"),
        ("contranorm", dict(identity=True), "need a scale above 0"),
    ],
)
def test_a_refusal_is_a_sentence_and_changes_nothing(names: Any, kwargs: dict, message: str) -> None:
    model = vit()
    before = [type(module) for module in model.modules()], list(model.state_dict()), set(vars(model))
    with pytest.raises(RemedyError, match=message):
        add_remedy(model, names, **kwargs)
    assert ([type(module) for module in model.modules()], list(model.state_dict()), set(vars(model))) == before


def test_a_name_is_no_model() -> None:
    with pytest.raises(RemedyError, match="'vit_tiny_patch16_224' is no model: give one"):
        add_remedy("vit_tiny_patch16_224", "attnscale")


def test_nothing_is_changed_if_the_second_of_two_is_refused() -> None:
    model = build("swin")
    before = list(model.state_dict())
    with pytest.raises(RemedyError, match="neutreno has no meaning in SwinTransformer: its layers see windows"):
        add_remedy(model, ["gfsa", "neutreno"])
    assert list(model.state_dict()) == before and not remedies_of(model)


@pytest.mark.parametrize("name", ["attnscale", "gfsa"])
def test_a_model_is_converted_once(name: str) -> None:
    model = add_remedy(vit(), name)
    with pytest.raises(RemedyError, match=rf"converted already \({name}\): call remove_remedy"):
        add_remedy(model, "twicing")
    with pytest.raises(RemedyError, match="converted already"):
        add_remedy(nn.Sequential(model), "twicing")


def test_a_fixed_strength_adds_no_parameter_where_the_zoo_has_a_class() -> None:
    """The zoo's classes hold parameters, so a remedy without any does not become one of them."""
    plain = vit("vit_tiny_patch16_224")
    fixed = add_remedy(copy.deepcopy(plain), "attnscale", lamb=0.3, learnable=False)
    learnt = add_remedy(copy.deepcopy(plain), "attnscale", lamb=0.3)
    assert list(fixed.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fixed.eval()(images), learnt.eval()(images), rtol=1e-5, atol=1e-6)


def test_a_variant_of_the_zoo_is_neither_converted_nor_unconverted() -> None:
    with pytest.raises(RemedyError, match="attnscale built in: start from its plain baseline"):
        add_remedy(vit("attnscale_small_12"), "gfsa")
    with pytest.raises(RemedyError, match="no remedy that was added"):
        remove_remedy(vit("attnscale_small_12"))


@pytest.mark.parametrize("names", ["attnscale", "featscale", SEVERAL, "contranorm", "reattention"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_small_12", "cait_XXS24_224"])
def test_remove_undoes_everything(name: str, names: Any) -> None:
    model, original = vit(name), vit(name)
    original.load_state_dict(model.state_dict())
    remove_remedy(randomized(add_remedy(model, names)))
    for module, other in zip(model.modules(), original.modules(), strict=True):
        assert type(module) is type(other)
        assert set(vars(module)) == set(vars(other))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), original.eval()(x))


# ---- what a converted model must still do ----------------------------------------------------------------------------
ALL = [name for name in IDENTITY if name not in ("attnscale", "featscale")]
COMBINATIONS = [ALL, ["attnscale", "featscale"], SEVERAL]


@pytest.fixture(params=COMBINATIONS, ids="-".join)
def converted(request: pytest.FixtureRequest) -> nn.Module:
    return randomized(add_remedy(vit("deit_small_12"), request.param)).eval()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_copy_is_a_model_of_its_own(converted: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    logits = converted(x)
    copied = copy.deepcopy(converted)
    assert torch.equal(copied(x), logits)
    shared = {id(module.conversion.first_values) for module in converted.modules() if hasattr(module, "conversion")}
    copies = {id(module.conversion.first_values) for module in copied.modules() if hasattr(module, "conversion")}
    assert not (shared & copies) - {id(None)} and len(copies) == len(shared)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if is_remedy_parameter(name):
                parameter.zero_()
    assert torch.equal(converted(x), logits)
    assert not torch.equal(copied(x), logits)
    remove_remedy(copied)
    assert remedies_of(converted) and not remedies_of(copied)


def test_pickles(converted: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    logits = converted(x)
    again = pickle.loads(pickle.dumps(converted))
    assert torch.equal(again(x), logits)
    assert [type(module) for module in again.modules()] == [type(module) for module in converted.modules()]
    buffer = io.BytesIO()
    torch.save(dict(model=converted.state_dict(), remedies=remedies_of(converted)), buffer)
    buffer.seek(0)
    file = torch.load(buffer, weights_only=True)
    loaded = add_remedy(vit("deit_small_12"), file["remedies"]).eval()
    loaded.load_state_dict(file["model"])
    assert torch.equal(loaded(x), logits)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = vit()
    add_remedy(model, ["reattention", *SEVERAL, "contranorm"])
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(torch.randn(2, 3, 32, 32, device="meta")).shape == (2, 7)
    model.to_empty(device="cpu").init_weights(needs_reset=True)
    plain = vit()
    reference = add_remedy(vit(), ["reattention", *SEVERAL, "contranorm"]).state_dict()
    for name, tensor in model.state_dict().items():
        if is_remedy_parameter(name) and "reattention_matrix" not in name:
            assert torch.equal(tensor, reference[name]), name
    assert set(model.state_dict()) > set(plain.state_dict())
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("name", list_remedies())
def test_new_parameters_follow_device_and_dtype(name: str) -> None:
    model = add_remedy(vit().to(torch.bfloat16), name)
    added = [p for n, p in model.named_parameters() if is_remedy_parameter(n)]
    assert added and all(p.dtype == torch.bfloat16 for p in added)
    assert model.eval()(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list_remedies())
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model, x = randomized(add_remedy(vit(), name)).eval(), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype):
        logits = model(x)
    logits.square().sum().backward()
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), model(x), rtol=0.1, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_distributed_data_parallel(converted: nn.Module) -> None:
    """Every parameter takes part in every step: otherwise the second one raises."""
    x = torch.randn(2, 3, 32, 32)
    expected = gradients(converted, x)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(converted)
        for _ in range(2):
            found = gradients(parallel, x)
    finally:
        distributed.destroy_process_group()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"module.{name}"], gradient, msg=name)


def test_the_last_block_has_all_tokens_that_a_remedy_needs(converted: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(converted(x), converted.forward_head(converted.forward_features(x)))


def test_fully_sharded(converted: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    expected = gradients(converted, x)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*converted.blocks, converted):
            fully_shard(module, mesh=mesh)
        for _ in range(2):
            found = {name: gradient.full_tensor() for name, gradient in gradients(converted, x).items()}
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("names", ["attnscale", "featscale", ["attnscale", "featscale"]], ids=str)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "cait_xxs24_224"])
def test_layers_of_a_converted_model_fold_together_as_they_would_alone(name: str, names: str | list[str]) -> None:
    plain = vit(name)
    model, x = randomized(add_remedy(copy.deepcopy(plain), names)), torch.randn(2, 3, 32, 32)
    together = gradients(model, x)
    model.zero_grad()
    model.forward_head(model.forward_features(x)).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(together[key], parameter.grad, rtol=1e-4, atol=1e-5, msg=key)
    assert type(remove_remedy(model)) is type(plain)


def test_gradient_checkpointing(converted: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    expected = gradients(converted, x)
    converted.set_grad_checkpointing()
    for _ in range(2):
        for name, gradient in gradients(converted, x).items():
            torch.testing.assert_close(gradient, expected[name], msg=name)


def test_gradient_checkpointing_refuses_values_of_another_pass() -> None:
    model = add_remedy(vit(), "neutreno", alpha=0.6).train()
    first, second = torch.randn(2, 2, 3, 32, 32).unbind(0)
    model(first)  # no backward: its graph is gone with its logits
    gradients(model, first)
    logits, others = model(first), model(second)  # without checkpointing nothing is run again
    (logits + others).sum().backward()
    model.set_grad_checkpointing()
    gradients(model, second)
    logits, others = model(first), model(second)
    with pytest.raises(RuntimeError, match="several forward passes wait for their backward"):
        logits.sum().backward()
    del logits, others
    gradients(model, second)


def test_reentrant_checkpointing_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    model = add_remedy(vit(), "neutreno", alpha=0.6)
    x = torch.randn(2, 17, TINY["embed_dim"], requires_grad=True)
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        x.sum().backward()


def test_one_layer_alone_has_no_first_values() -> None:
    model = add_remedy(vit(), "value_residual")
    with pytest.raises(RuntimeError, match="first layer's values are missing"):
        model.blocks[2](torch.randn(1, 17, TINY["embed_dim"]))


def test_first_values_are_let_go_after_evaluation() -> None:
    model = add_remedy(vit(), "neutreno").eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert model.blocks[0].attn.conversion.first_values.v is None


def test_threads_do_not_get_each_others_first_values() -> None:
    """As ``DataParallel`` runs its copies of a model, which share all but their parameters."""
    model, both_began = randomized(add_remedy(vit(), "value_residual")).eval(), threading.Barrier(2, timeout=60)
    batches = torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad():
        expected = [model(images) for images in batches]

    def wait(block: nn.Module, args: tuple) -> None:
        both_began.wait()

    model.blocks[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:  # with gradients: the values stay where they are
        for logits, alone in zip(threads.map(model, batches), expected, strict=True):
            torch.testing.assert_close(logits, alone)


@pytest.mark.parametrize("name", ["neutreno", "value_residual"])
def test_gradients_of_each_image_through_torch_func(name: str) -> None:
    model, x = randomized(add_remedy(vit(), name)), torch.randn(2, 3, 32, 32)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for key, gradient in gradients(model, x).items():
        torch.testing.assert_close(each[key].sum(0), gradient, rtol=1e-3, atol=1e-4, msg=key)


def test_torch_export(converted: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    logits = converted(x)
    program = torch.export.export(converted, (x,))
    torch.testing.assert_close(program.module()(x), logits)
    assert torch.equal(converted(x), logits)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["twicing", "neutreno", "gated"], ["exclusive", "contranorm", "featscale"]])
def test_torch_compile_makes_one_graph(names: list[str]) -> None:
    model, x = randomized(add_remedy(vit(depth=2), names)), torch.randn(2, 3, 32, 32)
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    for _ in range(2):
        compiled(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_forward_intermediates(converted: nn.Module) -> None:
    x, found = torch.randn(2, 3, 32, 32), []
    for block in converted.blocks:
        block.register_forward_hook(lambda block, args, output: found.append(output))
    final, intermediates = converted.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
    assert len(intermediates) == len(found) == 3
    for (patches, prefix), output in zip(intermediates, found, strict=True):
        assert torch.equal(torch.cat([prefix, patches], dim=1), output)


@pytest.mark.parametrize("name", [name for name in IDENTITY if name != "contranorm"])
def test_padded_tokens_do_not_count(name: str) -> None:
    """An image of 2 x 3 patches, alone and in a batch padded to 16."""
    model = randomized(add_remedy(build("naflexvit"), name))
    size = model.embeds.proj.in_features
    patches = torch.randn(1, 6, size, dtype=torch.float64)
    coordinates = torch.tensor([[(row, column) for row in range(2) for column in range(3)]])
    alone = model(dict(patches=patches, patch_coord=coordinates, patch_valid=torch.ones(1, 6, dtype=torch.bool)))
    padded = dict(
        patches=torch.cat([patches, torch.randn(1, 10, size, dtype=torch.float64)], dim=1),
        patch_coord=torch.cat([coordinates, torch.zeros(1, 10, 2, dtype=torch.long)], dim=1),
        patch_valid=torch.arange(16)[None] < 6,
    )
    torch.testing.assert_close(model(padded), alone)


@pytest.mark.parametrize("name", ["centred", "gfsa", "neutreno", "shaped"])
def test_attention_masks(name: str) -> None:
    """The fast form under a mask is the dense one, and no token sees what is hidden from all."""
    model = randomized(add_remedy(vit().double().eval(), name))
    mask = torch.rand(17, 17, generator=torch.Generator().manual_seed(0)) > 0.3
    mask.fill_diagonal_(True)
    mask[:, 9] = mask[9] = False
    mask[9, 9] = True
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused = model(x, attn_mask=mask)
    dense = oversmoothing.set_fused(model, False)(x, attn_mask=mask)
    torch.testing.assert_close(fused, dense)


def test_the_analysis_sees_the_remedies_in_the_maps() -> None:
    model = randomized(add_remedy(vit().double().eval(), ["gfsa", "centred"]))
    attn, x = model.blocks[1].attn, torch.randn(2, 17, TINY["embed_dim"], dtype=torch.float64)
    [layer] = [layer for layer in attention_layers(model) if layer.attn is attn]
    heads = layer.kind.split(attn, x)
    maps = layer.kind.applied_maps(attn, heads)
    torch.testing.assert_close(layer.kind.merge(attn, maps @ heads.v, heads), attn(x))
    assert not torch.allclose(maps, heads.maps())


def test_a_parametrised_module_stays_converted() -> None:
    model = randomized(add_remedy(vit(), "gfsa")).eval()
    x = torch.randn(1, 3, 32, 32)
    logits = model(x)

    class Same(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value

    parametrize.register_parametrization(model.blocks[0].attn, "gfsa_beta", Same())
    assert torch.equal(model(x), logits)


def test_a_remedy_of_ones_own_is_known_everywhere_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass

    from oversmoothing.remedies import AttentionRemedy, register_remedy

    monkeypatch.setattr("oversmoothing.remedies.base.REMEDIES", REMEDIES)

    @dataclass(frozen=True, kw_only=True)
    class Gain(AttentionRemedy):
        name, formula, source, cost = "gain", "(1 + g) y", "a test", "one pass"
        per_head = ("g",)
        g: float = 0.0

        def wrap(self, attn: nn.Module, apply: Any, heads: Any) -> Any:
            (g,) = self.weights(attn, heads.v)
            return lambda v: (1 + g) * apply(v)

    monkeypatch.setitem(REMEDIES, "gain", Gain)
    assert register_remedy(Gain) is Gain and "gain" in list_remedies()
    model = add_remedy(vit(), "gain")
    assert model.blocks[0].attn.gain_g.shape == (3,)
    assert is_remedy_parameter("blocks.0.attn.gain_g")


def test_every_class_of_the_architectures_is_convertible() -> None:
    """No kind is left without a model in which at least one remedy works."""
    kinds = {type(layer.kind) for name in ARCHITECTURES for layer in attention_layers(build(name))}
    assert {type(kind) for cls, kind in KINDS.items() if cls.__module__.startswith("timm.")} <= kinds
