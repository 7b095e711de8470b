"""Every fast path against the definition it replaces: values and all gradients, in float64 to rounding."""

import copy
import itertools
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import Attention
from timm.models.cait import LayerScaleBlock, TalkingHeadAttn
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import oversmoothing
from models.deit import DeiT, first_tokens
from oversmoothing.fused import talking_heads
from oversmoothing.fused.blocks import FoldedBlock
from oversmoothing.fused.folding import FoldedAttention, share_folds
from oversmoothing.fused.talking_heads import FusedTalkingHeadAttn
from oversmoothing.remedies.attnscale import AttnScaleAttention, AttnScaleTalkingHeadAttn, attn_scale
from oversmoothing.remedies.featscale import FeatScaleBlock, FeatScaleLayerScaleBlock, feat_scale

DIM, HEADS, TOKENS = 24, 3, 10
TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7)
DEIT = ["deit_tiny_12", "attnscale_tiny_12", "featscale_tiny_12", "attnfeatscale_tiny_12"]
CAIT = ["cait_XXS24", "attnscale_cait_XXS24", "featscale_cait_XXS24", "attnfeatscale_cait_XXS24"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomise(module: nn.Module) -> nn.Module:
    """Every parameter away from where the remedies, LayerScale and the biases do nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
            if parameter.dim() == 1:
                parameter.add_(0.4)
    return module


def tiny(name: str, **kwargs: object) -> nn.Module:
    return randomise(timm.create_model(name, **TINY | kwargs))


def values_and_gradients(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    gradients = torch.autograd.grad((y * weights).sum(), [x, *module.parameters()], materialize_grads=True)
    return [y, *gradients]


def assert_same(ours: list[Tensor], definition: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(ours, definition, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + b.detach().abs().max().item()))


def masks(kind: str, num_tokens: int) -> tuple[dict, Tensor]:
    """Arguments of the call and the additive mask they stand for."""
    allowed = (torch.rand(num_tokens, num_tokens) > 0.4) | torch.eye(num_tokens, dtype=torch.bool)
    if kind == "causal":
        allowed = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    bias = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
    if kind != "none":
        bias = bias.masked_fill(~allowed, float("-inf"))
    return {"none": {}, "bool": dict(attn_mask=allowed), "float": dict(attn_mask=bias), "causal": dict(is_causal=True)}[
        kind
    ], bias


def dense_attention(attn: Attention, x: Tensor, bias: Tensor) -> Tensor:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    maps = (attn.scale * attn.q_norm(q) @ attn.k_norm(k).mT + bias).softmax(-1)
    if hasattr(attn, "lamb"):
        maps = attn_scale(maps, attn.lamb)
    y = attn.norm((maps @ v).transpose(1, 2).flatten(2))
    return attn.proj(y if attn.gate is None else y * attn.gate(x).sigmoid())


def dense_talking_heads(attn: TalkingHeadAttn, x: Tensor) -> Tensor:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    maps = attn.proj_l((attn.scale * q @ k.mT).permute(0, 2, 3, 1)).softmax(dim=2).permute(0, 3, 1, 2)
    maps = attn.proj_w(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if hasattr(attn, "lamb"):
        maps = attn_scale(maps, attn.lamb)
    return attn.proj((maps @ v).transpose(1, 2).flatten(2))


# ---- folding into proj -----------------------------------------------------------------------------------------------
OPTIONS = [
    {},
    {"qkv_bias": True},
    {"proj_bias": False},
    {"qk_norm": True},
    {"scale_norm": True},
    {"gated": True},
    {"attn_head_dim": 4},
]


@pytest.mark.parametrize("masking", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layer", [FoldedAttention, AttnScaleAttention])
def test_attention_equals_the_definition(layer: type[Attention], options: dict, masking: str) -> None:
    attn = randomise(layer(DIM, HEADS, norm_layer=nn.LayerNorm, **options).double())
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    call, bias = masks(masking, TOKENS)
    definition = values_and_gradients(lambda x: dense_attention(attn, x, bias), attn, x)
    for fused in (True, False):
        oversmoothing.set_fused(attn, fused)
        assert_same(values_and_gradients(lambda x: attn(x, **call), attn, x), definition)


@pytest.mark.parametrize("masking", ["none", "bool", "causal"])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"scale_attn_norm": True}, {"proj_bias": False}, {"init_values": 0.1}], ids=str
)
@pytest.mark.parametrize("layer", [Attention, AttnScaleAttention])
def test_feat_scale_block_equals_the_definition(layer: type[Attention], options: dict, masking: str) -> None:
    block = randomise(FeatScaleBlock(DIM, HEADS, norm_layer=nn.LayerNorm, attn_layer=layer, **options).double())
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    call, bias = masks(masking, TOKENS)

    def definition(x: Tensor) -> Tensor:
        y = feat_scale(dense_attention(block.attn, block.norm1(x), bias), block.lamb1, block.lamb2, 2.0)
        x = x + block.ls1(y)
        return x + block.ls2(block.mlp(block.norm2(x)))

    expected = values_and_gradients(definition, block, x)
    for fused in (True, False):
        oversmoothing.set_fused(block, fused)
        assert_same(values_and_gradients(lambda x: block(x, **call), block, x), expected)


@pytest.mark.parametrize("layer", [TalkingHeadAttn, AttnScaleTalkingHeadAttn])
def test_feat_scale_block_of_cait_equals_the_definition(layer: type[TalkingHeadAttn]) -> None:
    block = randomise(FeatScaleLayerScaleBlock(DIM, HEADS, attn_block=layer).double())
    x = torch.randn(3, TOKENS, DIM, dtype=torch.float64)

    def definition(x: Tensor) -> Tensor:
        y = feat_scale(dense_talking_heads(block.attn, block.norm1(x)), block.lamb1, block.lamb2, 1.0)
        x = x + block.gamma_1 * y
        return x + block.gamma_2 * block.mlp(block.norm2(x))

    expected = values_and_gradients(definition, block, x)
    for fused in (True, False):
        oversmoothing.set_fused(block, fused)
        assert_same(values_and_gradients(block, block, x), expected)


@pytest.mark.parametrize("rates", [dict(proj_drop=0.3), dict(attn_drop=0.3), dict(drop_path=0.5)], ids=str)
@pytest.mark.parametrize("layer", [Attention, AttnScaleAttention])
def test_dropout_falls_where_the_definition_has_it(layer: type[Attention], rates: dict) -> None:
    """With the same seed both forms drop the same entries, so what they give must be equal."""
    block = randomise(FeatScaleBlock(DIM, HEADS, attn_layer=layer, norm_layer=nn.LayerNorm, **rates).double())
    if layer is Attention and "attn_drop" in rates:
        pytest.skip("fused attention draws its own dropout, as in timm")
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    results = []
    for fused in (True, False):
        oversmoothing.set_fused(block, fused)
        torch.manual_seed(1)
        results.append(values_and_gradients(block, block, x))
    assert_same(*results)


def test_a_replaced_projection_is_called() -> None:
    """Adapters such as LoRA put another module in the place of ``proj``; its weight alone would not be its output."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block = randomise(FeatScaleBlock(DIM, HEADS, attn_layer=AttnScaleAttention).double()).eval()
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    plain = block.attn.proj
    block.attn.proj = Doubled(DIM, DIM).double()
    block.attn.proj.load_state_dict(plain.state_dict())
    ours = block.attention_branch(x)
    block.attn.proj = plain
    torch.testing.assert_close(ours, 2 * block.attention_branch(x))


def test_hooks_on_the_attention_and_its_projection_are_called() -> None:
    block = randomise(FeatScaleBlock(DIM, HEADS, attn_layer=AttnScaleAttention))
    x, calls = torch.randn(2, TOKENS, DIM), []
    expected = block(x)
    for module in (block.attn, block.attn.proj):
        module.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert calls == [nn.Linear, AttnScaleAttention]


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_every_kind_of_hook_on_the_projection_is_called(kind: str) -> None:
    block, calls = randomise(FeatScaleBlock(DIM, HEADS, attn_layer=AttnScaleAttention)), []
    getattr(block.attn.proj, f"register_{kind}")(lambda module, *given: calls.append(type(module)))
    block(torch.randn(2, TOKENS, DIM, requires_grad=True)).sum().backward()
    assert calls == [nn.Linear]


IDLE = ["drop_path1", "ls2", "attn.q_norm", "attn.norm", "attn.proj_drop", "mlp", "mlp.drop1", "mlp.norm", "mlp.drop2"]


@pytest.mark.parametrize("name", IDLE)
def test_hooks_on_modules_that_do_nothing_are_called_and_may_change_what_passes(name: str) -> None:
    """Without hooks, ``folding.call`` passes such modules by."""
    block = randomise(FeatScaleBlock(DIM, HEADS, norm_layer=nn.LayerNorm).double())
    x, inputs = torch.randn(2, TOKENS, DIM, dtype=torch.float64), []
    expected = block(x)
    handle = block.get_submodule(name).register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    torch.testing.assert_close(block(x), expected)
    handle.remove()
    assert len(inputs) == 1 and inputs[0].abs().sum() > 0
    block.get_submodule(name).register_forward_hook(lambda module, args, output: 0 * output)
    assert not torch.allclose(block(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layer_scale_at_its_start_is_not_lost_in_the_projection(dtype: torch.dtype) -> None:
    """A weight of 0.02 times 1e-6 is zero in float16, so there LayerScale stays outside."""
    block = FeatScaleLayerScaleBlock(DIM, HEADS, init_values=1e-6)
    x = torch.randn(2, TOKENS, DIM)
    y = 1e-6 * dense_talking_heads(block.attn, x)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        branch = block.scaled_branch(x)
    branch.sum().backward()
    torch.testing.assert_close(branch.float(), y, rtol=0, atol=0.02 * y.abs().max().item())
    gradient = block.gamma_1.grad.clone()
    block.zero_grad()
    (block.gamma_1 * dense_talking_heads(block.attn, x)).sum().backward()
    torch.testing.assert_close(gradient, block.gamma_1.grad, rtol=0, atol=0.02 * gradient.abs().max().item())


@pytest.mark.parametrize(
    "of_the_fold, of_the_block", [(None, "float16"), ("bfloat16", "float16"), ("float16", "bfloat16")]
)
def test_layer_scale_is_applied_once_where_precision_changes(of_the_fold: str | None, of_the_block: str | None) -> None:
    """The fold holds LayerScale or not; the block goes by that."""

    def autocast(name: str | None) -> torch.autocast:
        return torch.autocast("cpu", getattr(torch, name or "float16"), enabled=name is not None)

    block, x = FeatScaleLayerScaleBlock(DIM, HEADS, init_values=0.1), torch.randn(2, TOKENS, DIM)
    y = 0.1 * dense_talking_heads(block.attn, x)
    with autocast(of_the_fold), share_folds([(block, block.foldable())], x), autocast(of_the_block):
        ours = block.scaled_branch(x)
    torch.testing.assert_close(ours.float(), y, rtol=0, atol=0.02 * y.abs().max().item())


def test_backward_keeps_no_branch_for_layer_scale() -> None:
    block, x = FeatScaleLayerScaleBlock(DIM, HEADS), torch.randn(2, TOKENS, DIM, requires_grad=True)

    def branches_kept(fused: bool) -> int:
        storages = set()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape == x.shape:
                storages.add(tensor.untyped_storage().data_ptr())
            return tensor

        oversmoothing.set_fused(block, fused)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block.scaled_branch(x)
        return len(storages)

    assert branches_kept(fused=True) == 0 < branches_kept(fused=False)


@pytest.mark.parametrize("name", ["drop_path1", "mlp", "mlp.drop1", "attn.proj"])
def test_a_forward_of_the_instance_s_own_is_called(name: str) -> None:
    """Libraries that move weights between devices put it there; so do quick experiments."""
    block = randomise(FeatScaleBlock(DIM, HEADS, norm_layer=nn.LayerNorm))
    module, x = block.get_submodule(name), torch.randn(2, TOKENS, DIM)
    before, theirs = block(x), module.forward
    module.forward = lambda *args: 0 * theirs(*args)
    assert not torch.allclose(block(x), before)
    del module.forward
    torch.testing.assert_close(block(x), before)


def test_a_module_that_was_compiled_alone_is_called() -> None:
    block, graphs = randomise(FeatScaleBlock(DIM, HEADS)), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    block.mlp.compile(backend=backend)
    block(torch.randn(2, TOKENS, DIM))
    assert len(graphs) == 1


def test_hooks_on_all_modules_see_those_that_do_nothing() -> None:
    block, seen = FoldedBlock(DIM, HEADS), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.add(module))
    try:
        block(torch.randn(2, TOKENS, DIM))
    finally:
        handle.remove()
    assert {name for name, module in block.named_modules() if module not in seen} == {"attn.attn_drop"}  # SDPA's own


def test_exported_graphs_name_the_mlp() -> None:
    exported = torch.export.export(FoldedBlock(DIM, HEADS), (torch.randn(2, TOKENS, DIM),))
    stacks = [node.meta.get("nn_module_stack", {}) for node in exported.graph.nodes]
    assert any(path == "mlp" for stack in stacks for path, _ in stack.values())


def test_graphs_of_fx_keep_modules_that_do_nothing_while_they_are_traced() -> None:
    """Dropout that is off may be switched on, and nodes are known by their modules' names."""
    block = FeatScaleBlock(DIM, HEADS, proj_drop=0.3, norm_layer=nn.LayerNorm).eval()
    graph = torch.fx.symbolic_trace(block, concrete_args=dict(attn_mask=None, is_causal=False))
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert {"ls1", "ls2", "drop_path1", "drop_path2", "attn.q_norm", "attn.k_norm", "attn.norm"} <= names
    assert {"mlp.drop1", "mlp.norm", "mlp.drop2"} <= names


@pytest.mark.parametrize("rates", [{}, dict(proj_drop=0.3), dict(drop_path=0.5, init_values=0.1)], ids=str)
@pytest.mark.parametrize("scale_mlp_norm", [False, True])
def test_a_block_without_idle_modules_is_timms_to_the_bit(rates: dict, scale_mlp_norm: bool) -> None:
    options = dict(norm_layer=nn.LayerNorm, scale_mlp_norm=scale_mlp_norm, **rates)
    theirs, ours = randomise(Block(DIM, HEADS, **options)), FoldedBlock(DIM, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, TOKENS, DIM)
    for training in (True, False):
        results = []
        for block in (ours, theirs):
            torch.manual_seed(1)
            results.append(values_and_gradients(block.train(training), block, x))
        assert_same(*results, tolerance=0)


def test_second_derivatives_of_a_fast_path_are_refused_and_first_ones_are_not() -> None:
    qkv, *others = random_talking_heads(torch.float64)
    y = talking_heads.talking_heads(qkv, *others).square().sum()
    plain = torch.autograd.grad(y, qkv, retain_graph=True)[0]
    slope = torch.autograd.grad(y, qkv, create_graph=True)[0]
    torch.testing.assert_close(slope, plain)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


# ---- talking heads ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("images_at_a_time", [0.1, 0.4, 1, 2, 5])  # below one: so much of an image's rows
@pytest.mark.parametrize("layer", [FusedTalkingHeadAttn, AttnScaleTalkingHeadAttn])
def test_talking_heads_equal_the_definition(
    layer: type[TalkingHeadAttn], images_at_a_time: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talking_heads, "CPU_CHUNK_BYTES", int(images_at_a_time * HEADS * TOKENS**2 * 8))
    attn = randomise(layer(DIM, HEADS, qkv_bias=True).double())
    x = torch.randn(5, TOKENS, DIM, dtype=torch.float64)
    definition = values_and_gradients(lambda x: dense_talking_heads(attn, x), attn, x)
    for fused in (True, False):
        oversmoothing.set_fused(attn, fused)
        assert_same(values_and_gradients(attn, attn, x), definition)


def random_talking_heads(
    dtype: torch.dtype, tokens: int = TOKENS
) -> tuple[Tensor, float, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of the operator: two images, two heads of three channels."""
    qkv = torch.randn(3, 2, 2, tokens, 3, dtype=dtype, requires_grad=True)
    return qkv, 0.5, *(torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((2, 2), (2,), (2, 2), (2,)))


@pytest.mark.parametrize("function", [talking_heads.talking_heads, talking_heads.operator], ids=["eager", "operator"])
def test_talking_heads_gradients_equal_finite_differences(function: Callable[..., Tensor]) -> None:
    assert torch.autograd.gradcheck(function, random_talking_heads(torch.float64, tokens=4))


def test_talking_heads_as_the_last_of_a_checkpoint_let_the_rest_be_recorded_again() -> None:
    """Their backward is then the first that asks for saved tensors, and so the place where all is computed again."""
    inputs = random_talking_heads(torch.float64)
    tensors = [tensor for tensor in inputs if isinstance(tensor, Tensor)]

    def squared(qkv: Tensor, *others: Tensor) -> Tensor:
        return talking_heads.talking_heads(qkv.square(), *others)

    expected = torch.autograd.grad(squared(*inputs).sum(), tensors)
    again = torch.utils.checkpoint.checkpoint(squared, *inputs, use_reentrant=False)
    assert_same(torch.autograd.grad(again.sum(), tensors), expected, tolerance=0)


def test_selective_checkpointing_notices_operators_that_write_into_a_tensor() -> None:
    """It keeps the outputs of chosen operators; one that is written to afterwards would have wrong values."""
    qkv, *others = random_talking_heads(torch.float64)

    def policy(ctx, op, *args, **kwargs) -> torch.utils.checkpoint.CheckpointPolicy:
        is_out = op is torch.ops.aten.add.out
        return getattr(torch.utils.checkpoint.CheckpointPolicy, "MUST_SAVE" if is_out else "PREFER_RECOMPUTE")

    contexts = partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, policy)
    y = torch.utils.checkpoint.checkpoint(
        lambda qkv: talking_heads.talking_heads(qkv, *others).square(), qkv, use_reentrant=False, context_fn=contexts
    )
    with pytest.raises(RuntimeError, match="mutated"):
        y.sum().backward()


def test_talking_heads_take_an_empty_batch() -> None:
    qkv, *others = random_talking_heads(torch.float32)
    empty = qkv.detach()[:, :0].requires_grad_()
    talking_heads.talking_heads(empty, *others).sum().backward()
    assert empty.grad.shape == empty.shape and all((tensor.grad == 0).all() for tensor in others[1:])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_talking_heads_keep_no_map_for_backward(compiled: bool) -> None:
    attn, x, shapes = AttnScaleTalkingHeadAttn(DIM, HEADS), torch.randn(2, 50, DIM), []
    call = torch.compile(attn, backend="aot_eager", fullgraph=True) if compiled else attn
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        call(x).sum().backward()
    assert shapes and not any(shape.numel() >= HEADS * 50 * 50 for shape in shapes)


def test_talking_heads_are_an_operator_that_compilers_understand() -> None:
    arguments = random_talking_heads(torch.float64, tokens=4)
    assert set(torch.library.opcheck(talking_heads.operator, arguments).values()) == {"SUCCESS"}


def test_exported_programs_keep_the_operator() -> None:
    program = torch.export.export(AttnScaleTalkingHeadAttn(DIM, HEADS), (torch.randn(2, TOKENS, DIM),))
    assert torch.ops.oversmoothing.talking_heads.default in [node.target for node in program.graph.nodes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_talking_heads_follow_autocast(dtype: torch.dtype) -> None:
    qkv, *others = random_talking_heads(torch.float32)
    for function in (talking_heads.talking_heads, talking_heads.operator):
        with torch.autocast("cpu", dtype):
            y = function(qkv, *others)
        assert torch.equal(y, talking_heads.talking_heads(qkv.to(dtype), *others)) and y.dtype == dtype
        y.sum().backward()
        assert others[1].grad.dtype == torch.float32


def test_a_backward_pass_under_autocast_is_that_of_the_forward_pass() -> None:
    inputs = random_talking_heads(torch.float32)
    tensors = [tensor for tensor in inputs if isinstance(tensor, Tensor)]
    y = talking_heads.talking_heads(*inputs).square().sum()
    expected = torch.autograd.grad(y, tensors, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(y, tensors)
    assert_same(ours, expected, tolerance=0)


def test_compiled_autograd_takes_the_backward_of_eager_talking_heads_into_its_graph() -> None:
    inputs = random_talking_heads(torch.float64)
    tensors = [tensor for tensor in inputs if isinstance(tensor, Tensor)]
    talking_heads.talking_heads(*inputs).square().sum().backward()
    expected = [tensor.grad.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    y = talking_heads.talking_heads(*inputs).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        y.backward()
    assert_same([tensor.grad for tensor in tensors], expected)


@pytest.mark.parametrize("rms", [1e-1, 1e-4])
def test_half_precision_gradients_of_talking_heads_are_as_good_as_timms(rms: float) -> None:
    """While LayerScale is small, gradients are at float16's lower end."""
    qkv, scale, *mixings = random_talking_heads(torch.float32, tokens=196)

    def gradients(dtype: torch.dtype, function: Callable[..., Tensor], half: bool) -> list[Tensor]:
        tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in (qkv, *mixings)]
        inputs = tensors[0].half().to(dtype) if not half else tensors[0].half(), scale, *tensors[1:]
        y = function(*inputs)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).mul(rms).half()
        found = torch.autograd.grad(y, tensors, weights.to(y.dtype), materialize_grads=True)
        return [*found[0].unbind(0), *(found[i] for i in (1, 3, 4))]

    def timms(qkv: Tensor, scale: float, *mixings: Tensor) -> Tensor:
        q, k, v = qkv.unbind(0)
        w_l, b_l, w_w, b_w = (tensor.to(qkv.dtype) for tensor in mixings)
        attn = nn.functional.linear((q * scale @ k.mT).permute(0, 2, 3, 1), w_l, b_l).permute(0, 3, 1, 2)
        attn = attn.softmax(-1, dtype=torch.promote_types(qkv.dtype, torch.float32)).to(qkv.dtype)
        attn = nn.functional.linear(attn.permute(0, 2, 3, 1), w_w, b_w).permute(0, 3, 1, 2)
        return (attn @ v).transpose(1, 2)

    exact = gradients(torch.float64, timms, half=False)
    ours, theirs = (
        [
            float((a.double() - b).norm() / b.norm())
            for a, b in zip(gradients(torch.float32, f, True), exact, strict=True)
        ]
        for f in (talking_heads.talking_heads, timms)
    )
    assert all(a < max(1.2 * b, 2e-3) for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_dense_maps_keep_their_precision_beside_float32_weights() -> None:
    maps, weight, bias = torch.randn(2, HEADS, 5, 5).half(), torch.randn(HEADS, HEADS), torch.randn(HEADS)
    with torch.autocast("cpu", torch.float16):
        assert talking_heads.mix_heads(maps.float(), weight, bias).dtype == torch.float16


def test_the_bias_that_cancels_gets_a_zero_gradient() -> None:
    """DistributedDataParallel waits for a gradient of every parameter."""
    attn = AttnScaleTalkingHeadAttn(DIM, HEADS)
    attn(torch.randn(2, TOKENS, DIM)).sum().backward()
    assert attn.proj_l.bias.grad is not None and (attn.proj_l.bias.grad == 0).all()


# ---- the last block --------------------------------------------------------------------------------------------------
class OtherAttention(Attention):
    """An attention layer that this package knows nothing about."""


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("layer", [OtherAttention, AttnScaleAttention])
@pytest.mark.parametrize("block_fn", [Block, FoldedBlock, FeatScaleBlock])
def test_first_tokens_of_a_block(block_fn: type[Block], layer: type[Attention], num_tokens: int) -> None:
    block = randomise(block_fn(DIM, HEADS, attn_layer=layer, norm_layer=nn.LayerNorm, init_values=0.1).double())
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    ours = values_and_gradients(lambda x: first_tokens(block, x, num_tokens), block, x)
    assert_same(ours, values_and_gradients(lambda x: block(x)[:, :num_tokens], block, x))


@pytest.mark.parametrize(
    "name, options",
    [
        *itertools.product(DEIT + CAIT, [{}]),
        *itertools.product(DEIT, [dict(reg_tokens=4), dict(init_values=0.1, qk_norm=True), dict(global_pool="avg")]),
    ],
)
def test_a_model_equals_its_definition(name: str, options: dict) -> None:
    model = tiny(name, **options).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused = values_and_gradients(model, model, images)
    dense = values_and_gradients(oversmoothing.set_fused(copy.deepcopy(model), False), model, images)[:1]
    definition = oversmoothing.set_fused(model, False)
    assert_same(fused, values_and_gradients(definition, definition, images), 1e-8)
    assert_same(fused[:1], dense, 1e-8)


@pytest.mark.parametrize("name", DEIT)
def test_features_stay_whole(name: str) -> None:
    model, images = tiny(name).eval(), torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert features.shape == (2, 17, TINY["embed_dim"])
    torch.testing.assert_close(model.forward_head(features), model(images), rtol=1e-4, atol=1e-4)
    seen = []
    handle = model.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(images)
    handle.remove()
    assert seen == [features.shape]


@pytest.mark.parametrize("name", DEIT)
def test_the_last_block_computes_less(name: str) -> None:
    model, images = tiny(name).eval(), torch.randn(2, 3, 32, 32)
    counts = []
    for function in (model, lambda images: model.forward_head(model.forward_features(images))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(images)
        counts.append(counter.get_total_flops())
    assert counts[0] < 0.83 * counts[1]  # of three blocks, one without most of its MLP


def test_a_distilled_head_reads_two_tokens() -> None:
    class Distilled(timm.models.deit.VisionTransformerDistilled, DeiT):
        pass

    model = randomise(Distilled(**TINY, block_fn=FeatScaleBlock)).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model.forward_head(model.forward_features(images))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


# ---- switches and ways to run ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["attnfeatscale_tiny_12", "attnfeatscale_cait_XXS24"])
def test_fused_is_an_argument_of_create_model(name: str) -> None:
    off = timm.create_model(name, **TINY, fused=False)
    assert not any(getattr(module, "fused_attn", False) for module in off.modules())
    on = timm.create_model(name, **TINY)
    assert all(module.fused_attn for module in on.modules() if hasattr(module, "fused_attn"))


@pytest.mark.parametrize("name", ["attnfeatscale_tiny_12", "attnfeatscale_cait_XXS24", "featscale_cait_XXS24"])
class TestWaysToRun:
    """Each gives what the definition gives."""

    def pair(self, name: str) -> tuple[nn.Module, nn.Module, Tensor]:
        model = timm.create_model(name, **TINY, init_values=0.5)  # gradients that float16 can hold
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if oversmoothing.is_remedy_parameter(key):
                    parameter.normal_(std=0.3)
            model.head.weight.mul_(100)
        return model, oversmoothing.set_fused(copy.deepcopy(model), False), torch.randn(2, 3, 32, 32)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_models(self, name: str, dtype: torch.dtype) -> None:
        model, dense, images = self.pair(name)
        ours = values_and_gradients(model.to(dtype), model, images.to(dtype))
        theirs = values_and_gradients(dense, dense, images)
        assert all(value.dtype == dtype for value in ours)
        assert (ours[0].float() - theirs[0]).norm() < 0.05 * theirs[0].norm()
        assert (ours[1].float() - theirs[1]).norm() < 0.1 * theirs[1].norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, name: str, dtype: torch.dtype) -> None:
        model, dense, images = self.pair(name)
        with torch.autocast("cpu", dtype):
            ours = values_and_gradients(model, model, images)
        theirs = values_and_gradients(dense, dense, images)
        assert all(value.dtype == torch.float32 for value in ours[1:])
        assert (ours[0].float() - theirs[0]).norm() < 0.05 * theirs[0].norm()
        assert (ours[1] - theirs[1]).norm() < 0.1 * theirs[1].norm()

    def test_gradient_checkpointing(self, name: str) -> None:
        model, dense, images = self.pair(name)
        model.set_grad_checkpointing()
        theirs = values_and_gradients(dense, dense, images)
        assert_same(values_and_gradients(model, model, images), theirs, 1e-4)

    def test_graphs(self, name: str) -> None:
        model, dense, images = self.pair(name)
        expected = dense.eval()(images)
        model.eval()
        ways = torch.jit.script(model), torch.jit.trace(model, images), torch.fx.symbolic_trace(model)
        for way in (*ways, torch.export.export(model, (images,)).module()):
            torch.testing.assert_close(way(images), expected, rtol=1e-4, atol=1e-4)

    def test_shapes_are_known_without_numbers(self, name: str) -> None:
        model, _, images = self.pair(name)
        assert model.to("meta")(images.to("meta")).shape == (2, TINY["num_classes"])

    @pytest.mark.slow
    def test_compiled(self, name: str) -> None:
        if name.startswith("featscale"):
            pytest.skip("both remedies at once cover it, and compiling takes long")
        model, dense, images = self.pair(name)
        expected = values_and_gradients(dense, dense, images)
        assert_same(values_and_gradients(torch.compile(model), model, images), expected, 1e-4)

    def test_every_parameter_has_a_gradient_under_ddp(self, name: str, tmp_path) -> None:
        model, _, images = self.pair(name)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            for _ in range(2):  # the second step raises if the first left a parameter unused
                parallel(images).sum().backward()
        finally:
            dist.destroy_process_group()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_blocks_that_know_no_folding_take_the_general_path() -> None:
    for attn_block in (TalkingHeadAttn, lambda *args, **kwargs: TalkingHeadAttn(*args, **kwargs)):
        block = randomise(FeatScaleLayerScaleBlock(DIM, HEADS, attn_block=attn_block)).eval()
        x = torch.randn(2, TOKENS, DIM)
        y = feat_scale(dense_talking_heads(block.attn, x), block.lamb1, block.lamb2, 1.0)
        torch.testing.assert_close(block.scaled_branch(x) / block.gamma_1, y, rtol=1e-4, atol=1e-4)
    assert isinstance(block, LayerScaleBlock)
