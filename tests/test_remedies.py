"""Each remedy against the numbers of its authors' own code, its fast form against its definition, and its start."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build, images
from conftest import GOLDEN
from timm.layers import Attention
from timm.models.cait import TalkingHeadAttn
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from oversmoothing import add_remedy, describe, list_remedies, set_fused
from oversmoothing.attention import Heads
from oversmoothing.remedies import REMEDIES, AttentionRemedy, Operator, attend

DIM, HEADS = 12, 3
pytestmark = pytest.mark.usefixtures("float64")


# ---- the authors' numbers --------------------------------------------------------------------------------------------
class Golden:
    """One record of ``remedies.npz``; see ``remedies.md`` beside it."""

    def __init__(self, record: str) -> None:
        path = GOLDEN / "remedies.npz"
        if not path.is_file():
            pytest.skip(f"the authors' numbers are not here ({path}); they do not come with a clone")
        self.arrays, self.record = np.load(path), record

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[f"{self.record}/{name}"])

    def parameters(self) -> dict[str, Tensor]:
        names = [key.split("/grad/")[1] for key in self.arrays if key.startswith(f"{self.record}/grad/")]
        own = {name: f"{self.record}/param/{name}" for name in names}
        return {n: torch.from_numpy(self.arrays[k if k in self.arrays else f"param/{n}"]) for n, k in own.items()}

    def input(self) -> Tensor:
        return torch.from_numpy(self.arrays["input"]).requires_grad_()

    def weights(self) -> Tensor:
        return torch.from_numpy(self.arrays["weights"])

    def check(self, output: Tensor, x: Tensor, parameters: dict[str, Tensor]) -> None:
        """Output, and the gradients of the input and of our parameters, under the authors' names."""
        self.check_gradients(output, x, lambda: {name: parameter.grad for name, parameter in parameters.items()})

    def check_gradients(self, output: Tensor, x: Tensor, gradients: Callable[[], dict[str, Tensor]]) -> None:
        """The same where the gradients have to be put together, after backward."""
        assert_close(output, self["output"])
        (output * self.weights()).sum().backward()
        assert_close(x.grad, self["grad_input"])
        found = gradients()
        assert found.keys() == self.parameters().keys()
        for name, gradient in found.items():
            assert_close(gradient, self[f"grad/{name}"])


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-10, atol=1e-10)


class Stack(nn.Module):
    """The records' geometry: one attention layer, or three with a residual sum."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": layer}) for layer in layers)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        if len(self.blocks) == 1:
            return self.blocks[0]["attn"](x, **kwargs)
        for block in self.blocks:
            x = x + block["attn"](x)
        return x


def attention(depth: int = 1) -> Stack:
    return Stack(*(Attention(DIM, HEADS, qkv_bias=True) for _ in range(depth)))


def load(stack: Stack, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fills the single layer; returns the layer's parameters by these names."""
    own = dict(stack.blocks[0]["attn"].named_parameters())
    with torch.no_grad():
        for name, value in parameters.items():
            own[name].copy_(value.reshape(own[name].shape))
    return {name: own[name] for name in parameters}


def renamed(parameters: dict[str, Tensor], **names: str) -> dict[str, Tensor]:
    return {names.get(name.replace(".", "_"), name): value for name, value in parameters.items()}


@pytest.mark.parametrize("record", ["gfsa", "gfsa_cait", "gfsa_swin"])
def test_gfsa(record: str) -> None:
    golden = Golden(record)
    layers = {
        "gfsa": lambda: Attention(DIM, HEADS, qkv_bias=True),
        "gfsa_cait": lambda: TalkingHeadAttn(DIM, HEADS, qkv_bias=True),
        "gfsa_swin": lambda: WindowAttention(DIM, HEADS, window_size=3),
    }
    stack = add_remedy(Stack(layers[record]()), "gfsa", K=3 if record == "gfsa_swin" else 4)
    kwargs = {}
    if record == "gfsa_swin":
        assert torch.equal(stack.blocks[0]["attn"].relative_position_index, golden["relative_position_index"])
        kwargs = {"mask": golden["mask"]}
    ours = load(stack, renamed(golden.parameters(), lamb="gfsa_beta"))
    x = golden.input()
    output = stack(x, **kwargs)
    golden.check(output, x, renamed(ours, gfsa_beta="lamb"))
    if record != "gfsa_swin":
        stack.blocks[0]["attn"].gfsa_beta.data.zero_()
        assert_close(stack(x), golden["output_lamb0"])


@pytest.mark.parametrize("alpha", [0.6, 0.35])
def test_neutreno(alpha: float) -> None:
    golden = Golden("neutreno")
    stack = attention(3)
    parameters = golden.parameters()
    stack.load_state_dict(parameters)
    add_remedy(stack, "neutreno", alpha=alpha, learnable=False)
    x = golden.input()
    output = stack(x)
    if alpha == 0.6:
        assert describe("neutreno")["published"] == dict(alpha=0.6, learnable=False)
        ours = dict(stack.named_parameters())
        golden.check(output, x, {name: ours[name] for name in parameters})
    else:
        assert_close(output, golden["output_alpha0.35"])


def packed(parameters: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Separate projections in timm's joint one."""
    joint = {}
    for kind in ("weight", "bias"):
        joint[f"qkv.{kind}"] = torch.cat([parameters[f"{prefix}{part}_proj.{kind}"] for part in "qkv"])
        joint[f"proj.{kind}"] = parameters[f"{prefix}o_proj.{kind}"]
    return joint


def unpacked_gradients(attn: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    gradients = {}
    for kind in ("weight", "bias"):
        parts = getattr(attn.qkv, kind).grad.chunk(3)
        gradients |= {f"{prefix}{part}_proj.{kind}": grad for part, grad in zip("qkv", parts, strict=True)}
        gradients[f"{prefix}o_proj.{kind}"] = getattr(attn.proj, kind).grad
    return gradients


def value_residual_stack(names: Any, **options: Any) -> tuple[Golden, Stack]:
    golden = Golden("value_residual")
    stack = attention(3)
    parameters = golden.parameters()
    for i, block in enumerate(stack.blocks):
        block["attn"].load_state_dict(packed(parameters, f"layers.{i}.self_attn."))
    return golden, add_remedy(stack, names, **options)


def test_value_residual() -> None:
    golden, stack = value_residual_stack("value_residual", **describe("value_residual")["published"])
    x = golden.input()
    output = stack(x)

    def gradients() -> dict[str, Tensor]:
        parts = [unpacked_gradients(b["attn"], f"layers.{i}.self_attn.") for i, b in enumerate(stack.blocks)]
        return {name: grad for part in parts for name, grad in part.items()}

    golden.check_gradients(output, x, gradients)


@pytest.mark.parametrize(
    ("names", "output"),
    [
        ({"value_residual": dict(a=0.0, b=1.0)}, "svformer"),
        ({"neutreno": dict(alpha=0.4, learnable=False)}, "neutreno_lambda04"),
        ({"neutreno": dict(alpha=0.2), "value_residual": dict(a=0.5, b=0.5)}, "resformer_neutreno"),
    ],
)
def test_value_residual_and_its_relatives(names: dict, output: str) -> None:
    golden, stack = value_residual_stack(names)
    assert_close(stack(golden.input()), golden[f"output_{output}"])


CONTRANORM = {
    "base": dict(learnable=False),
    "dual": dict(learnable=False, dual=True),
    "pre": dict(learnable=False, pre=True),
    "temp": dict(learnable=False, tau=0.5),
    "identity": dict(learnable=False, identity=True),
    "learnable": {},
    "learnable_positive": dict(positive=True),
    "learnable_identity": dict(identity=True),
    "all": dict(dual=True, pre=True, tau=0.5, positive=True, identity=True),
}


class NormOnly(nn.Module):
    """A block whose first norm is all that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.attn = Attention(DIM, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(x)


@pytest.mark.parametrize("form", ["mixing", "attention", "definition"])
@pytest.mark.parametrize("variant", CONTRANORM)
def test_contranorm(variant: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "attention":
        monkeypatch.setattr("oversmoothing.remedies.contranorm.can_mix", lambda x, tau: False)
    golden = Golden(f"contranorm_{variant}")
    model = nn.Sequential(NormOnly())
    add_remedy(model, "contranorm", scale=0.2, **CONTRANORM[variant])
    set_fused(model, form != "definition")
    norm = model[0].norm1
    ours = {"layernorm.weight": norm.weight, "layernorm.bias": norm.bias}
    if "scale_param" in golden.parameters():
        ours["scale_param"] = norm.contranorm_scale
    with torch.no_grad():
        for name, value in golden.parameters().items():
            ours[name].copy_(value)
    x = golden.input()
    golden.check(model(x), x, ours)


@pytest.mark.parametrize("scale", [0, 0.01])
def test_contranorm_at_other_scales(scale: float) -> None:
    golden = Golden("contranorm_base")
    model = add_remedy(nn.Sequential(NormOnly()), "contranorm", scale=scale, learnable=False)
    with torch.no_grad():
        for name, value in golden.parameters().items():
            getattr(model[0].norm1, name.removeprefix("layernorm.")).copy_(value)
    assert_close(model(golden.input()), golden[f"output_scale{scale}"])


def reattention(**options: Any) -> tuple[Golden, Stack, dict[str, Tensor]]:
    golden = Golden("reattention")
    stack = add_remedy(attention(), "reattention", **options)
    theirs = golden.parameters()
    names = {name: name.replace("reatten_matrix", "reattention_matrix") for name in theirs}
    names = {name: ours.replace("var_norm", "reattention_norm") for name, ours in names.items()}
    ours = load(stack, {names[name]: value for name, value in theirs.items()})
    norm = stack.blocks[0]["attn"].reattention_norm
    norm.running_mean.copy_(golden["running_mean"])
    norm.running_var.copy_(golden["running_var"])
    return golden, stack, {name: ours[names[name]] for name in theirs}


def test_reattention_in_training() -> None:
    golden, stack, ours = reattention()
    x = golden.input()
    golden.check(stack(x), x, ours)
    norm = stack.blocks[0]["attn"].reattention_norm
    assert_close(norm.running_mean, golden["running_mean_after"])
    assert_close(norm.running_var, golden["running_var_after"])


def test_reattention_in_evaluation() -> None:
    golden, stack, _ = reattention()
    x = golden.input()
    output = stack.eval()(x)
    assert_close(output, golden["output_eval"])
    (output * golden.weights()).sum().backward()
    assert_close(x.grad, golden["grad_input_eval"])


def test_reattention_with_another_scale() -> None:
    golden, stack, _ = reattention(transform_scale=True)
    assert_close(stack(golden.input()), golden["output_transform_scale"])


SHAPED = {"attn_mat_skip_gain": "alpha", "attn_mat_resid_gain": "beta", "centre_attn_gain": "gamma"}


def shaped(is_start: bool = False, gains: bool = True) -> tuple[Golden, Stack]:
    golden = Golden("shaped")
    theirs = golden.parameters()
    stack = add_remedy(attention(), "shaped", **describe("shaped")["published"])
    attn = stack.blocks[0]["attn"]
    with torch.no_grad():
        attn.qkv.weight.copy_(torch.cat([theirs["qk_attn.weight"].T, theirs["v_attn.weight"].T]))
        attn.qkv.bias.copy_(torch.cat([theirs["qk_attn.bias"], torch.zeros(DIM)]))
        attn.proj.weight.copy_(theirs["c_proj.weight"].T)
        attn.proj.bias.zero_()
        if is_start:
            attn.qkv.weight[:DIM] = 0
            attn.qkv.bias[:DIM] = 0
        for name, ours in SHAPED.items() if gains else ():
            getattr(attn, f"shaped_{ours}").copy_(theirs[name].flatten())
    return golden, stack


def test_shaped() -> None:
    golden, stack = shaped()
    attn = stack.blocks[0]["attn"]
    x = golden.input()
    output = stack(x)

    def gradients() -> dict[str, Tensor]:
        weight, bias = attn.qkv.weight.grad, attn.qkv.bias.grad
        own = {name: getattr(attn, f"shaped_{ours}").grad.view(1, -1, 1, 1) for name, ours in SHAPED.items()}
        return own | {
            "qk_attn.weight": weight[: 2 * DIM].T,
            "v_attn.weight": weight[2 * DIM :].T,
            "qk_attn.bias": bias[: 2 * DIM],
            "c_proj.weight": attn.proj.weight.grad.T,
        }

    golden.check_gradients(output, x, gradients)
    assert_close(stack(x, is_causal=True), golden["output_causal"])


@pytest.mark.parametrize("is_start", [False, True])
def test_shaped_at_its_published_start(is_start: bool) -> None:
    golden, stack = shaped(is_start, gains=False)
    assert_close(stack(golden.input()), golden["output_start" if is_start else "output_gains1"])


@pytest.mark.parametrize("record", ["gated_headwise", "gated_elementwise"])
def test_gated(record: str) -> None:
    golden = Golden(record)
    elementwise = record == "gated_elementwise"
    gates = DIM // HEADS if elementwise else 1
    theirs = golden.parameters()
    split = {  # of each head's rows: first the query's, then the gate's
        kind: theirs[f"q_proj.{kind}"].unflatten(0, (HEADS, -1)).split([DIM // HEADS, gates], dim=1)
        for kind in ("weight", "bias")
    }
    plain = theirs | {f"q_proj.{kind}": q.flatten(0, 1) for kind, (q, _) in split.items()}
    stack = attention()
    stack.blocks[0]["attn"].load_state_dict(packed(plain))
    published = dict(describe("gated")["published"])
    add_remedy(stack, "gated", elementwise=elementwise, **published)
    attn = stack.blocks[0]["attn"]
    with torch.no_grad():
        for kind, (_, gate) in split.items():
            getattr(attn, f"gated_{kind}").copy_(gate.flatten(0, 1))
    x = golden.input()
    output = stack(x)

    def gradients() -> dict[str, Tensor]:
        found = unpacked_gradients(attn)
        for kind in ("weight", "bias"):
            q, gate = found[f"q_proj.{kind}"], getattr(attn, f"gated_{kind}").grad
            parts = [part.unflatten(0, (HEADS, -1)) for part in (q, gate)]
            found[f"q_proj.{kind}"] = torch.cat(parts, dim=1).flatten(0, 1)
        return found

    golden.check_gradients(output, x, gradients)


def test_twicing() -> None:
    golden = Golden("twicing")
    stack = add_remedy(attention(), "twicing", **describe("twicing")["published"])
    ours = load(stack, golden.parameters())
    x = golden.input()
    golden.check(stack(x), x, ours)


def test_exclusive() -> None:
    golden = Golden("exclusive")
    stack = add_remedy(attention(), "exclusive")
    ours = load(stack, renamed(golden.parameters(), xsa_alphas="exclusive_alpha"))
    x = golden.input()
    golden.check(stack(x), x, renamed(ours, exclusive_alpha="xsa_alphas"))
    stack.blocks[0]["attn"].exclusive_alpha.data.zero_()
    assert_close(stack(x), golden["output_alpha0"])


def test_exclusive_as_published() -> None:
    golden = Golden("exclusive")
    stack = add_remedy(attention(), "exclusive", **describe("exclusive")["published"])
    load(stack, {name: value for name, value in golden.parameters().items() if name != "xsa_alphas"})
    assert_close(stack(golden.input()), golden["output_full"])


# ---- fast form and definition ----------------------------------------------------------------------------------------
MAPS = [name for name, cls in REMEDIES.items() if issubclass(cls, AttentionRemedy) and cls.has_maps()]


def definition(name: str) -> Operator | None:
    """Remedies that are no maps, from the maps: (remedy, attn, maps, heads) -> (B, H, N, D), as in the papers."""

    def neutreno(attn: nn.Module, A: Tensor, v: Tensor, v0: Tensor, x: Tensor) -> Tensor:
        return A @ v + attn.neutreno_alpha[:, None, None] * (v0 - v)

    def value_residual(attn: nn.Module, A: Tensor, v: Tensor, v0: Tensor, x: Tensor) -> Tensor:
        a, b = attn.value_residual_a[:, None, None], attn.value_residual_b[:, None, None]
        return A @ (a * v + b * v0)

    def exclusive(attn: nn.Module, A: Tensor, v: Tensor, v0: Tensor, x: Tensor) -> Tensor:
        y, strength = A @ v, attn.exclusive_alpha.tanh()[:, None, None]
        along = (y * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True)
        return y - strength * along * v

    def gated(attn: nn.Module, A: Tensor, v: Tensor, v0: Tensor, x: Tensor) -> Tensor:
        gate = 2 * torch.sigmoid(x.reshape(len(v), v.shape[2], -1) @ attn.gated_weight.T + attn.gated_bias)
        return A @ v * gate.unflatten(-1, (v.shape[1], -1)).transpose(1, 2)

    return locals()[name]


BACKBONES = ["deit", "dinov3_grouped", "cait", "swin"]


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter of a remedy away from its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lamb", *list_remedies())):
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients_of(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return output.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", [name for name in list_remedies() if name not in ("contranorm", "reattention")])
def test_the_fast_form_is_the_definition(name: str, backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backbone == "swin" and name in ("neutreno", "value_residual"):
        pytest.skip("has no meaning in windows")
    model, x = randomized(add_remedy(build(backbone), name)), images(backbone)
    output, gradients = gradients_of(model, x)

    def by_definition(attn: nn.Module, remedies: tuple, heads: Heads) -> Tensor:
        (remedy,) = remedies or (None,)
        if remedy is None:
            return heads.maps() @ heads.v
        if remedy.has_maps():
            return remedy.maps(attn, heads.maps(), heads) @ heads.v
        return definition(name)(attn, heads.maps(), heads.v, heads.first_v, heads.x)

    if name in ("attnscale", "featscale"):
        set_fused(model, False)
    else:
        monkeypatch.setattr("oversmoothing.converted.attend", by_definition)
    dense, dense_gradients = gradients_of(model, x)
    torch.testing.assert_close(output, dense, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == dense_gradients.keys()
    assert any(name in key or "lamb" in key for key in gradients)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, dense_gradients[key], rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_contranorms_fast_forms_are_its_definition(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Including more tokens than channels, and maps (B, H, W, C)."""
    model, x = randomized(add_remedy(build(backbone), "contranorm")), images(backbone)
    mixing = gradients_of(model, x)
    monkeypatch.setattr("oversmoothing.remedies.contranorm.can_mix", lambda x, tau: False)
    attention = gradients_of(model, x)
    definition = gradients_of(set_fused(model, False), x)
    for output, gradients in (mixing, attention):
        torch.testing.assert_close(output, definition[0], rtol=1e-10, atol=1e-12)
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, definition[1][key], rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", MAPS)
def test_dropout_falls_on_the_map_that_the_remedy_makes(name: str) -> None:
    """But for twicing and re-attention, whose authors drop entries of the softmax."""
    stack = add_remedy(attention(), {"attnscale": {}, "shaped": {}} if name == "attnscale" else name)
    attn = randomized(stack).blocks[0]["attn"]
    attn.attn_drop.p = 0.5
    x = torch.randn(2, 9, DIM)
    remedies = attn.conversion.remedies
    torch.manual_seed(3)
    output = stack.train()(x)
    q, k, v = attn.qkv(x).reshape(2, 9, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    maps = (q @ k.mT * attn.scale).softmax(dim=-1)
    heads = Heads(x, q, k, v)
    torch.manual_seed(3)
    if name in ("twicing", "reattention"):
        maps = nn.functional.dropout(maps, 0.5)
    for remedy in remedies:
        maps = remedy.maps(attn, maps, heads)
    if name not in ("twicing", "reattention"):
        maps = nn.functional.dropout(maps, 0.5)
    torch.testing.assert_close(output, attn.proj((maps @ v).transpose(1, 2).flatten(2)))


def test_one_dropout_mask_serves_a_map_and_what_follows_it() -> None:
    stack = add_remedy(attention(2), ["twicing", "neutreno"])
    stack.blocks[1]["attn"].attn_drop.p = 0.5
    heads = Heads(*torch.randn(4, 1, HEADS, 9, 4).unbind(0), dropout=0.5, first_v=torch.zeros(1, HEADS, 9, 4))
    attn = randomized(stack).blocks[1]["attn"]
    torch.manual_seed(0)
    output = attend(attn, attn.conversion.remedies, heads)
    torch.manual_seed(0)
    dropped = heads.drop(heads.maps())
    gamma, alpha = attn.twicing_gamma[:, None, None], attn.neutreno_alpha[:, None, None]
    y = dropped @ heads.v
    torch.testing.assert_close(output, y + gamma * (y - dropped @ y) - alpha * heads.v)


# ---- start and order -------------------------------------------------------------------------------------------------
IDENTITY = [name for name in list_remedies() if name != "reattention"]


@pytest.mark.parametrize("name", IDENTITY)
def test_the_start_is_the_model_as_it_was(name: str) -> None:
    model, x = build("deit"), images("deit")
    before = model(x)
    after = add_remedy(model, name)(x)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", IDENTITY)
def test_every_parameter_learns_from_the_start(name: str) -> None:
    model = add_remedy(build("deit"), name)
    _, gradients = gradients_of(model, images("deit"))
    own = [key for key in gradients if any(part in key for part in (name, "lamb"))]
    assert own
    assert all(gradients[key].abs().max() > 1e-12 for key in own), own


def test_remedies_wrap_in_the_order_of_their_names() -> None:
    """(1 + gamma) y - gamma A y of what AttnScale returns, and the other way round: different where maps differ."""
    first = randomized(add_remedy(attention(), ["attnscale", "exclusive"]))
    second = add_remedy(attention(), ["exclusive", "attnscale"])
    second.load_state_dict(first.state_dict())
    attn, x = first.blocks[0]["attn"], torch.randn(2, 9, DIM)
    q, k, v = attn.qkv(x).reshape(2, 9, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    y, lamb = (q @ k.mT * attn.scale).softmax(dim=-1) @ v, attn.lamb[:, None, None]
    n, strength = nn.functional.normalize(v, dim=-1), attn.exclusive_alpha.tanh()[:, None, None]

    def attn_scale(y: Tensor) -> Tensor:
        return (1 + lamb) * y - lamb * v.mean(dim=-2, keepdim=True)

    def exclusive(y: Tensor) -> Tensor:
        return y - strength * (y * n).sum(-1, keepdim=True) * n

    for stack, expected in ((first, exclusive(attn_scale(y))), (second, attn_scale(exclusive(y)))):
        torch.testing.assert_close(stack(x), attn.proj(expected.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("name", list_remedies())
def test_a_remedy_declares_itself(name: str) -> None:
    description = describe(name)
    assert description["formula"] and description["source"] and description["cost"]
    assert description["published"].keys() <= description["options"].keys()
    fixed = dataclasses.replace(REMEDIES[name](), **description["published"])
    assert fixed == REMEDIES[name](**description["published"])
    assert description["changes"] in ("attention", "branch", "norm")
    assert description["parameters"], "a remedy without anything to learn at its defaults"
