"""Reads a model's forward pass: one layer at a time, its tokens and its attention maps.

Attention maps are recomputed from the layer's input by its kind (``oversmoothing.attention``), because fused attention
never makes them. ``visiting`` passes each layer to a visitor by hooks, which are removed afterwards; ``layer_report``
is the summary that a training run logs. Models are not changed. While hooks are registered, the zoo's models take no
fast path that bypasses a layer's module or skips tokens of the last block.
The quantities themselves, and the conventions on B, N, C and DC, are in ``spectrum.py``.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import AttentionLayer, Heads, UnsupportedModelError, attention_layers
from ..remedies import is_remedy_parameter
from . import spectrum

CLASS_TOKENS = ("cls_token", "class_embedding")  # first parts of the parameters' names in timm and transformers


class NonFiniteError(ValueError):
    """A model whose features cannot be measured, because they are not finite; the message names model and block."""


class AttentionMaps(NamedTuple):
    """The maps of one layer, each of shape (B, num_heads, N, N); on Swin, B counts windows and N their tokens."""

    softmax: Tensor  # rows sum to one
    mixed: Tensor  # after CaiT's second head mixing; elsewhere the softmax
    applied: Tensor  # multiplies the values: ``mixed`` after the layer's remedies, if it has any


def find_layers(model: nn.Module) -> list[AttentionLayer]:
    """The self-attention blocks of a model, in the order of registration, which in timm is the order of execution.

    Attention without a square map has no spectrum and is left out: class attention (CaiT), layers that pool their
    queries or keys (Hiera at the head of a stage), and classes that :mod:`oversmoothing.attention` refuses.

    Args:
        model: A model without compile or data-parallel wrappers.

    Raises:
        UnsupportedModelError: If a block's attention is of a class without a kind, if no attention has square maps, or
            if a block holds several attention layers.
    """
    layers = [layer for layer in attention_layers(model) if layer.kind.is_square(layer.attn)]
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__}: no attention layer has as many queries as keys")
    owners = Counter(layer.name for layer in layers)
    for layer in layers:
        if owners[layer.name] > 1 or isinstance(layer.block, nn.Sequential):
            raise UnsupportedModelError(
                f"{type(model).__name__}: {layer.attn_name} is one of several attention layers in one block, so there "
                "is no residual stream after it alone"
            )
    return layers


class LayerView:
    """The tensors of one block during one forward pass, valid while the visitor runs."""

    def __init__(self, index: int, layer: AttentionLayer) -> None:
        self.index = index
        self.layer = layer
        self._input: Tensor | None = None
        self._branch: Tensor | None = None
        self._stream: Tensor | None = None
        self._output: Tensor | None = None
        self._call: tuple[tuple, dict] = ((), {})
        self._heads: Heads | None = None
        self._maps: AttentionMaps | None = None

    @property
    def after_attention(self) -> Tensor:
        """What the attention branch adds to the residual stream, (B, N, C): after FeatScale and LayerScale."""
        branch, stream = self._sequence(self._branch), self.after_residual
        return branch if branch.shape == stream.shape else stream - self._sequence(self._input)  # else in windows

    @property
    def after_residual(self) -> Tensor:
        """The residual stream after the attention branch was added to it, (B, N, C)."""
        if self._stream is not None:
            return self._sequence(self._stream)
        return self._sequence(self._input) + self._sequence(self._branch)

    @property
    def after_mlp(self) -> Tensor:
        """The block's output, (B, N, C)."""
        return self._sequence(self._output)

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the block's output if it is a feature map; None for a sequence."""
        if self._output.dim() == 3:
            return None
        return tuple(self._output.shape[1:3] if self.layer.kind.block_channels_last else self._output.shape[2:])

    def patch_tokens(self, num_patches: int) -> Tensor | None:
        """The block's output without the prefix tokens, (B, num_patches, C).

        A hierarchical model's output, (B, H, W, C), holds patches only, at its own resolution: all of it is returned.
        None if the tokens are not in the order of the image's rows (Hiera, NesT).
        """
        if not self.layer.kind.raster:
            return None
        return self.after_mlp if self.grid is not None else self.after_mlp[:, -num_patches:]

    def heads(self) -> Heads:
        """Queries, keys and values of this layer, recomputed from its input once."""
        if self._heads is None:
            args, kwargs = self._call
            self._heads = self.layer.kind.split(self.layer.attn, *args, **kwargs)
        return self._heads

    def attention_maps(self) -> AttentionMaps:
        """The maps of this layer, recomputed from its input once."""
        if self._maps is None:
            attn, kind, heads = self.layer.attn, self.layer.kind, self.heads()
            self._maps = AttentionMaps(heads.softmax_maps(), heads.maps(), kind.applied_maps(attn, heads))
        return self._maps

    def _sequence(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return x
        return x.flatten(1, 2) if self.layer.kind.block_channels_last else x.flatten(2).mT


def has_class_token(model: nn.Module) -> bool:
    """Whether a model has a class token; where one is in the blocks, it is the first token.

    Tokens in front of the patches may also be registers alone.
    """
    return any(name.rpartition(".")[2].startswith(CLASS_TOKENS) for name, _ in model.named_parameters())


def patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Rows and columns of a model's patches for images of this size; those of the first stage, if it has stages.

    Args:
        model: A model of timm, or of transformers with ``patch_size`` in its configuration.
        images: Shape (B, 3, H, W).

    Raises:
        UnsupportedModelError: If the patch size is unknown, so that patches and prefix tokens cannot be told apart.
    """
    patch_embed = getattr(model, "patch_embed", None)
    if hasattr(patch_embed, "dynamic_feat_size"):
        return patch_embed.dynamic_feat_size(images.shape[-2:])
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if size is None and getattr(model, "feature_info", None):
        size = model.feature_info[0]["reduction"]
    if not isinstance(size, int):
        raise UnsupportedModelError(
            f"{type(model).__name__} has neither timm's PatchEmbed as 'patch_embed', nor 'feature_info', nor a "
            "configuration with 'patch_size', so its grid of patches is unknown"
        )
    return images.shape[-2] // size, images.shape[-1] // size


def check_finite(view: LayerView, label: str) -> None:
    """Refuses features that no quantity can be computed of: not finite, or their squares exceed float32.

    Args:
        view: A layer during a forward pass.
        label: The model's name in the message.

    Raises:
        NonFiniteError: If the block's output is such.
    """
    if view.after_mlp.float().square().sum().isfinite():
        return
    raise NonFiniteError(
        f"{label}: the features are not finite, or too large for float32, from {view.layer.name} on: its weights (or "
        "the images) hold such numbers, as after a training run that diverged: give another checkpoint"
    )


@contextmanager
def visiting(
    model: nn.Module, visit: Callable[[LayerView], None], finite: str | None = None
) -> Iterator[list[AttentionLayer]]:
    """Within the context, every forward pass of ``model`` calls ``visit`` once per layer, as the layer ends.

    It uses hooks, which are removed at the end; the model is not changed. One layer's tensors are held at a time. The
    attention branch is read at the block's drop-path, the last module before the residual sum (``drop_path1`` in timm's
    ViT, EVA and Swin, the first call of ``drop_path`` in CaiT).

    Args:
        model: Any model :func:`find_layers` accepts.
        visit: Receives a :class:`LayerView`.
        finite: The model's name, to refuse features that are not finite before they are visited; None: no check.

    Yields:
        The layers.

    Raises:
        UnsupportedModelError: As :func:`find_layers`.
        NonFiniteError: With ``finite``, within the context, by the forward pass.
    """
    layers = find_layers(model)

    def visit_finite(view: LayerView) -> None:
        check_finite(view, finite)
        visit(view)

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            for handle in _hook_layer(index, layer, visit if finite is None else visit_finite):
                hooks.callback(handle.remove)
        yield layers


def _hook_layer(index: int, layer: AttentionLayer, visit: Callable[[LayerView], None]) -> list[Any]:
    view = LayerView(index, layer)

    def enter_block(block: nn.Module, args: tuple) -> None:
        view._input, view._branch, view._stream = args[0], None, None

    def enter_attention(attn: nn.Module, args: tuple, kwargs: dict) -> None:
        view._call = args, kwargs

    def leave_branch(module: nn.Module, args: tuple, output: Tensor) -> None:
        if view._branch is None:  # CaiT calls one drop_path for both branches
            view._branch = output[0] if isinstance(output, tuple) else output  # transformers adds the maps

    def enter_stream_reader(module: nn.Module, args: tuple) -> None:
        view._stream = args[0]

    def leave_block(block: nn.Module, args: tuple, output: Tensor) -> None:
        view._output = output
        visit(view)
        view._input = view._branch = view._stream = view._output = view._heads = view._maps = None
        view._call = (), {}

    branch_end = getattr(layer.block, "drop_path1", None) or getattr(layer.block, "drop_path", None) or layer.attn
    handles = [
        layer.block.register_forward_pre_hook(enter_block),
        layer.attn.register_forward_pre_hook(enter_attention, with_kwargs=True),
        branch_end.register_forward_hook(leave_branch),
        layer.block.register_forward_hook(leave_block),
    ]
    if layer.kind.stream is not None:
        reader = getattr(layer.block, layer.kind.stream)
        handles.append(reader.register_forward_pre_hook(enter_stream_reader))
    return handles


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients within the context; afterwards every module's mode is restored."""
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
        Shape (B,) each, except ``singular_values`` of shape (B, min(N, C)), and ``delta_log_amplitude`` of shape
        (B, G // 2 + 1), which is missing unless the patches form a square grid in row order.
    """

    def tokens(x: Tensor) -> Tensor:
        return x[:, -num_patches:] if patches_only else x

    output = tokens(view.after_mlp)
    dc, hc = spectrum.band_energies(output)
    singular = spectrum.singular_values(output)
    statistics = {
        "hc_dc_attention": spectrum.high_frequency_ratio(tokens(view.after_attention)),
        "hc_dc_residual": spectrum.high_frequency_ratio(tokens(view.after_residual)),
        "hc_dc_mlp": (hc / dc).sqrt(),
        "dc_energy": dc,
        "hc_energy": hc,
        "token_similarity": spectrum.token_similarity(output),
        "token_similarity_published": spectrum.token_similarity_published(output),
        "effective_rank": spectrum.rank_of_singular_values(singular),
        "singular_values": singular,
    }
    patches = view.patch_tokens(num_patches)
    if patches is not None and round(patches.shape[1] ** 0.5) ** 2 == patches.shape[1]:
        statistics["delta_log_amplitude"] = spectrum.delta_log_amplitude(patches)
    return statistics


def map_statistics(maps: AttentionMaps, previous: Tensor | None = None) -> dict[str, Tensor]:
    """Every quantity of one layer's attention maps, one value (or array) per image, on Swin per window.

    Args:
        maps: The layer's maps, (B, num_heads, N, N).
        previous: ``applied`` maps of the previous layer, averaged over heads, (B, N, N): heads of different layers have
            no natural pairing.

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


def layer_parameters(layer: AttentionLayer) -> dict[str, Tensor]:
    """The remedies' parameters of one layer that are vectors over heads or channels, such as ``lamb`` (num_heads,).

    Names are relative to the attention module (``lamb``), else to the block (``lamb1``, ``norm1.contranorm_scale``).
    """
    own = f"{layer.attn_name.removeprefix(layer.name).lstrip('.')}."
    return {
        name.removeprefix(own): parameter.detach()
        for name, parameter in layer.block.named_parameters()
        if is_remedy_parameter(name) and parameter.dim() == 1
    }


def layer_report(model: nn.Module, images: Tensor) -> dict[str, list[float]]:
    """How smooth a model's features are, layer by layer, on a small batch: cheap enough to call while training.

    One forward pass in evaluation mode without gradients (modes are restored), one synchronisation, no attention map,
    no random draw.

    Args:
        model: Any model :func:`find_layers` accepts, without data-parallel or ``torch.compile(model)`` wrappers. After
            an in-place ``model.compile()`` the plain code runs here: compiled code would not call the hooks.
        images: Shape (B, 3, H, W), on the model's device; the same batch every time, so that only the model changes.

    Returns:
        Lists with one number per layer, each a mean over the images: ``hc_dc_attention``, ``hc_dc_residual`` and
        ``hc_dc_mlp`` (:func:`spectrum.high_frequency_ratio` of the attention branch, of the residual stream after it
        and of the block's output), ``token_similarity`` and ``effective_rank`` (of the output). Then the remedies'
        parameters (:func:`layer_parameters`), as means over heads or channels; NaN in layers that lack one.

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
            "effective_rank": spectrum.effective_rank(view.after_mlp),
        }
        for name, values in (quantities | layer_parameters(view.layer)).items():
            row = rows.setdefault(name, [torch.full((), math.nan, device=images.device)] * len(layers))
            row[view.index] = values.float().mean()

    with evaluating(model), visiting(model, visit) as layers:
        model.forward(images)  # model(images) would run the code that model.compile() made
    table = torch.stack([torch.stack(values) for values in rows.values()]).tolist()
    return dict(zip(rows, table, strict=True))
