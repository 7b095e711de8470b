"""Looks into a model's forward pass: one layer at a time, its tokens and its attention maps.

Attention maps are recomputed from q and k, because fused attention never holds them; ``visiting`` hands out the layers
by hooks, which are gone afterwards; ``layer_report`` is the summary that a training run logs. Models are not changed,
but while there are hooks ours take no path that skips a layer's module or most of the last block's tokens.
The quantities themselves, and the conventions on B, N, C and DC, are in ``spectrum.py``.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.layers.attention import resolve_self_attn_mask
from timm.models.cait import ClassAttn, TalkingHeadAttn
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ..fused.folding import FoldedAttention
from ..fused.talking_heads import FusedTalkingHeadAttn
from ..remedies.attnscale import AttnScaleAttention, AttnScaleTalkingHeadAttn, attn_scale
from . import spectrum


class AttentionMaps(NamedTuple):
    """The maps of one layer, each of shape (B, num_heads, N, N); on Swin, B counts windows and N their tokens."""

    softmax: Tensor  # rows sum to one
    mixed: Tensor  # after CaiT's second head mixing; elsewhere the softmax
    applied: Tensor  # what multiplies the values: ``mixed`` after AttnScale, where the layer has it


def _softmax_maps(q: Tensor, k: Tensor, scale: float, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    scores = q * scale @ k.transpose(-2, -1)
    bias = resolve_self_attn_mask(q.shape[-2], scores, attn_mask, is_causal)
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, N, H * D) -> (B, H, N, D)


def _plain_maps(attn: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> AttentionMaps:
    q, k, _ = (_split_heads(part, attn.num_heads) for part in attn.qkv(x).chunk(3, dim=-1))
    maps = _softmax_maps(attn.q_norm(q), attn.k_norm(k), attn.scale, attn_mask, is_causal)
    return AttentionMaps(maps, maps, maps)


def _talking_heads_maps(attn: TalkingHeadAttn, x: Tensor) -> AttentionMaps:
    q, k, _ = (_split_heads(part, attn.num_heads) for part in attn.qkv(x).chunk(3, dim=-1))
    scores = q * attn.scale @ k.transpose(-2, -1)
    maps = attn.proj_l(scores.movedim(1, -1)).movedim(-1, 1).softmax(dim=-1)
    mixed = attn.proj_w(maps.movedim(1, -1)).movedim(-1, 1)
    return AttentionMaps(maps, mixed, mixed)


def _rotary_maps(
    attn: EvaAttention | AttentionRope,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> AttentionMaps:
    if attn.qkv is None:
        q, k = attn.q_proj(x), attn.k_proj(x)
    else:
        qkv = attn.qkv(x)
        if getattr(attn, "q_bias", None) is not None:
            qkv = qkv + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        q, k, _ = qkv.chunk(3, dim=-1)
    kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
    q, k = attn.q_norm(_split_heads(q, attn.num_heads)), attn.k_norm(_split_heads(k, kv_heads))
    if rope is not None:
        q, k = (_rotate(part, rope, attn.num_prefix_tokens, attn.rotate_half) for part in (q, k))
    maps = _softmax_maps(q, k.repeat_interleave(attn.num_heads // kv_heads, dim=1), attn.scale, attn_mask, is_causal)
    return AttentionMaps(maps, maps, maps)


def _rotate(x: Tensor, rope: Tensor, num_prefix_tokens: int, half: bool) -> Tensor:
    prefix, patches = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:]
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=half)], dim=2).type_as(x)


def _window_maps(attn: WindowAttention, x: Tensor, mask: Tensor | None = None) -> AttentionMaps:
    q, k, _ = (_split_heads(part, attn.num_heads) for part in attn.qkv(x).chunk(3, dim=-1))
    area = attn.window_area
    bias = attn.relative_position_bias_table[attn.relative_position_index.view(-1)]
    scores = q * attn.scale @ k.transpose(-2, -1) + bias.view(area, area, -1).movedim(-1, 0)
    if mask is not None:  # (num_windows, area, area), the windows of one image after another
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    maps = scores.softmax(dim=-1)
    return AttentionMaps(maps, maps, maps)


def _attnscale_maps(base: Callable[..., AttentionMaps]) -> Callable[..., AttentionMaps]:
    def maps(attn: nn.Module, *args: Any, **kwargs: Any) -> AttentionMaps:
        plain = base(attn, *args, **kwargs)
        return plain._replace(applied=attn_scale(plain.mixed, attn.lamb))

    return maps


# One recomputation for each kind of attention, called with what the module's forward was called with. The type must
# match exactly: a subclass may compute something else. To analyse another kind, add it here.
ATTENTION_MAPS: dict[type[nn.Module], Callable[..., AttentionMaps]] = {
    Attention: _plain_maps,
    FoldedAttention: _plain_maps,
    AttnScaleAttention: _attnscale_maps(_plain_maps),
    TalkingHeadAttn: _talking_heads_maps,
    FusedTalkingHeadAttn: _talking_heads_maps,
    AttnScaleTalkingHeadAttn: _attnscale_maps(_talking_heads_maps),
    EvaAttention: _rotary_maps,
    AttentionRope: _rotary_maps,
    WindowAttention: _window_maps,
}


class UnsupportedModelError(ValueError):
    """The model holds no attention whose maps can be recomputed; the message names the module and the reason."""


@dataclass(frozen=True)
class Layer:
    """One residual block with self-attention."""

    name: str  # as in named_modules(), for example "blocks.3"
    block: nn.Module
    attn: nn.Module


def find_layers(model: nn.Module) -> list[Layer]:
    """The self-attention blocks of a model, in the order of registration, which in timm is the order of execution.

    Class-attention blocks (CaiT) are left out: their map is one row, which has no spectrum.

    Args:
        model: A model without compile or data-parallel wrappers.

    Raises:
        UnsupportedModelError: If a block's attention is of a kind that :data:`ATTENTION_MAPS` lacks, or none has any.
    """
    layers = []
    for name, block in model.named_modules():
        attn = getattr(block, "attn", None)
        if not isinstance(attn, nn.Module) or type(attn) is ClassAttn:
            continue
        if type(attn) not in ATTENTION_MAPS:
            known = ", ".join(kind.__name__ for kind in ATTENTION_MAPS)
            raise UnsupportedModelError(
                f"{type(model).__name__}: the attention maps of {name}.attn, a {type(attn).__module__}."
                f"{type(attn).__name__}, cannot be recomputed. Known kinds: {known}. Another kind needs one function "
                "in probe.ATTENTION_MAPS."
            )
        layers.append(Layer(name, block, attn))
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no block with a self-attention module named 'attn', as timm's vision "
            "transformers have: there are no attention maps to analyse."
        )
    return layers


class LayerView:
    """The tensors of one block during one forward pass, valid while the visitor runs."""

    def __init__(self, index: int, layer: Layer) -> None:
        self.index = index
        self.layer = layer
        self._input: Tensor | None = None
        self._branch: Tensor | None = None
        self._output: Tensor | None = None
        self._call: tuple[tuple, dict] = ((), {})

    @property
    def after_attention(self) -> Tensor:
        """What the attention branch adds to the residual stream, (B, N, C): after FeatScale and LayerScale."""
        return _as_sequence(self._branch)

    @property
    def after_residual(self) -> Tensor:
        """The residual stream after the attention branch was added to it, (B, N, C)."""
        return _as_sequence(self._input + self._branch)

    @property
    def after_mlp(self) -> Tensor:
        """The block's output, (B, N, C)."""
        return _as_sequence(self._output)

    def patch_tokens(self, num_patches: int) -> Tensor:
        """The block's output without the tokens in front of the patches, (B, num_patches, C).

        A hierarchical model's output, (B, H, W, C), holds patches only, at its own resolution: all of it is returned.
        """
        return self.after_mlp if self._output.dim() == 4 else self.after_mlp[:, -num_patches:]

    def attention_maps(self) -> AttentionMaps:
        """The maps of this layer, recomputed from its input."""
        args, kwargs = self._call
        return ATTENTION_MAPS[type(self.layer.attn)](self.layer.attn, *args, **kwargs)


def _as_sequence(x: Tensor) -> Tensor:
    return x.flatten(1, 2) if x.dim() == 4 else x  # Swin's blocks pass (B, H, W, C)


def patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches that a model cuts images of this size into.

    Args:
        model: A model with timm's ``patch_embed``.
        images: Shape (B, 3, H, W).

    Raises:
        UnsupportedModelError: If the model has no such module, so that patches and prefix tokens cannot be told apart.
    """
    patch_embed = getattr(model, "patch_embed", None)
    if not hasattr(patch_embed, "dynamic_feat_size"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no timm PatchEmbed named 'patch_embed', so its grid of patches is unknown"
        )
    return patch_embed.dynamic_feat_size(images.shape[-2:])


@contextmanager
def visiting(model: nn.Module, visit: Callable[[LayerView], None]) -> Iterator[list[Layer]]:
    """Within the context, every forward pass of ``model`` calls ``visit`` once per layer, as the layer ends.

    Works by hooks, which are removed on leaving; the model is not changed. One layer's tensors are held at a time. The
    attention branch is read at the block's drop-path, the last module before the residual sum (``drop_path1`` in timm's
    ViT, EVA and Swin, the first call of ``drop_path`` in CaiT).

    Args:
        model: Any model :func:`find_layers` accepts.
        visit: Receives a :class:`LayerView`.

    Yields:
        The layers.

    Raises:
        UnsupportedModelError: As :func:`find_layers`.
    """
    layers = find_layers(model)
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            for handle in _hook_layer(index, layer, visit):
                hooks.callback(handle.remove)
        yield layers


def _hook_layer(index: int, layer: Layer, visit: Callable[[LayerView], None]) -> list[Any]:
    view = LayerView(index, layer)

    def enter_block(block: nn.Module, args: tuple) -> None:
        view._input, view._branch = args[0], None

    def enter_attention(attn: nn.Module, args: tuple, kwargs: dict) -> None:
        view._call = args, kwargs

    def leave_branch(module: nn.Module, args: tuple, output: Tensor) -> None:
        if view._branch is None:  # CaiT calls one drop_path for both branches
            view._branch = output

    def leave_block(block: nn.Module, args: tuple, output: Tensor) -> None:
        view._output = output
        visit(view)
        view._input = view._branch = view._output = None
        view._call = (), {}

    branch_end = getattr(layer.block, "drop_path1", None) or getattr(layer.block, "drop_path", None) or layer.attn
    return [
        layer.block.register_forward_pre_hook(enter_block),
        layer.attn.register_forward_pre_hook(enter_attention, with_kwargs=True),
        branch_end.register_forward_hook(leave_branch),
        layer.block.register_forward_hook(leave_block),
    ]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients within the context; every module's own mode is put back after it."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def feature_statistics(view: LayerView, num_patches: int, patches_only: bool = False) -> dict[str, Tensor]:
    """Every feature quantity of one layer, one value (or row) per image.

    Args:
        view: A layer during a forward pass.
        num_patches: Patches of the image, without class, distillation and register tokens.
        patches_only: Leave those tokens out of every quantity, not only out of the 2-D spectrum.

    Returns:
        Shape (B,) each, but ``delta_log_amplitude`` of shape (B, G // 2 + 1), which a grid that is not square lacks.
    """

    def tokens(x: Tensor) -> Tensor:
        return x[:, -num_patches:] if patches_only else x

    output = tokens(view.after_mlp)
    dc, hc = spectrum.band_energies(output)
    statistics = {
        "hc_dc_attention": spectrum.high_frequency_ratio(tokens(view.after_attention)),
        "hc_dc_residual": spectrum.high_frequency_ratio(tokens(view.after_residual)),
        "hc_dc_mlp": (hc / dc).sqrt(),
        "dc_energy": dc,
        "hc_energy": hc,
        "token_similarity": spectrum.token_similarity(output),
        "token_similarity_published": spectrum.token_similarity_published(output),
        "effective_rank": spectrum.effective_rank(output),
    }
    patches = view.patch_tokens(num_patches)
    if round(patches.shape[1] ** 0.5) ** 2 == patches.shape[1]:
        statistics["delta_log_amplitude"] = spectrum.delta_log_amplitude(patches)
    return statistics


def map_statistics(maps: AttentionMaps, previous: Tensor | None = None) -> dict[str, Tensor]:
    """Every quantity of one layer's attention maps, one value (or array) per image, on Swin per window.

    Args:
        maps: The layer's maps, (B, num_heads, N, N).
        previous: ``applied`` maps of the layer before, averaged over their heads, (B, N, N); heads of different layers
            have no natural pairing.

    Returns:
        ``spectrum`` (B, num_heads, N); ``high_frequency_response``, ``dc_gain`` and ``attention_entropy``, each
        (B, num_heads); ``head_similarity`` (B,) unless there is one head; ``layer_similarity`` (B,) where ``previous``
        is given and has the same shape.
    """
    statistics = {
        "spectrum": spectrum.attention_spectrum(maps.applied),
        "high_frequency_response": spectrum.high_frequency_response(maps.applied),
        "dc_gain": spectrum.dc_gain(maps.applied),
        "attention_entropy": spectrum.attention_entropy(maps.softmax),
    }
    if maps.applied.shape[1] > 1:
        statistics["head_similarity"] = spectrum.head_similarity(maps.applied)
    mean_map = maps.applied.mean(dim=1)
    if previous is not None and previous.shape == mean_map.shape:
        statistics["layer_similarity"] = spectrum.map_similarity(previous, mean_map)
    return statistics


def layer_parameters(layer: Layer) -> dict[str, Tensor]:
    """The remedies' parameters of one layer: ``lamb`` (num_heads,), ``lamb1`` and ``lamb2`` (dim,), those it has."""
    owners = {"lamb": layer.attn, "lamb1": layer.block, "lamb2": layer.block}
    return {
        name: getattr(owner, name).detach()
        for name, owner in owners.items()
        if isinstance(getattr(owner, name, None), nn.Parameter)
    }


def layer_report(model: nn.Module, images: Tensor) -> dict[str, list[float]]:
    """How smooth a model's features are, layer by layer, on a small batch: cheap enough to call while training.

    One forward pass in evaluation mode without gradients (modes are put back), one synchronisation, no attention map,
    no random draw.

    Args:
        model: Any model :func:`find_layers` accepts, without data-parallel or ``torch.compile(model)`` wrappers. After
            an in-place ``model.compile()`` the plain code runs, as compiled code would not call the hooks.
        images: Shape (B, 3, H, W), on the model's device; the same batch every time, so that only the model changes.

    Returns:
        Lists with one number a layer, each a mean over the images: ``hc_dc_attention``, ``hc_dc_residual`` and
        ``hc_dc_mlp`` (:func:`spectrum.high_frequency_ratio` of the attention branch, after the residual sum and of the
        block's output) and ``token_similarity`` (of the output). Then the means over heads or channels of ``lamb``,
        ``lamb1`` and ``lamb2``, where the model has them.

    Raises:
        UnsupportedModelError: As :func:`find_layers`.
    """
    rows: dict[str, list[Tensor]] = {}

    def visit(view: LayerView) -> None:
        quantities = {
            "hc_dc_attention": spectrum.high_frequency_ratio(view.after_attention),
            "hc_dc_residual": spectrum.high_frequency_ratio(view.after_residual),
            "hc_dc_mlp": spectrum.high_frequency_ratio(view.after_mlp),
            "token_similarity": spectrum.token_similarity(view.after_mlp),
        }
        for name, values in (quantities | layer_parameters(view.layer)).items():
            rows.setdefault(name, []).append(values.float().mean())

    with evaluating(model), visiting(model, visit):
        model.forward(images)  # not model(images), which model.compile() replaces
    table = torch.stack([torch.stack(values) for values in rows.values()]).tolist()
    return dict(zip(rows, table, strict=True))
