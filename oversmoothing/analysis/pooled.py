"""One vector per image and layer: the mean of a block's patch tokens, or its class token."""

import math

from torch import Tensor, nn

from . import probe

POOLS = {"patches": "mean of the patch tokens", "class": "class token"}


def pooled_outputs(label: str, model: nn.Module, images: Tensor, pools: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """Runs a model and pools the output of every block.

    Args:
        label: The model's name, for messages.
        model: Any model :func:`probe.find_layers` accepts, in the mode in which to run it.
        images: Shape (B, 3, H, W), on the model's device.
        pools: Of ``POOLS``.

    Returns:
        For each layer, pool -> (B, C), float32; C differs between the stages of a hierarchical model. ``class`` is
        missing where a block has no class token: CaiT adds it after these blocks, Swin has none.

    Raises:
        NonFiniteError: If a block's output is not finite.
    """
    num_patches = math.prod(probe.patch_grid(model, images))
    has_class = probe.has_class_token(model)
    layers: list[dict[str, Tensor]] = []

    def visit(view: probe.LayerView) -> None:
        tokens, pooled = view.after_mlp, {}
        prefixed = view.grid is None and tokens.shape[1] > num_patches
        if "patches" in pools:
            pooled["patches"] = (tokens[:, -num_patches:] if prefixed else tokens).float().mean(dim=1)
        if "class" in pools and prefixed and has_class:
            pooled["class"] = tokens[:, 0].float().clone()
        layers.append(pooled)

    with probe.visiting(model, visit, finite=label):
        model(images)
    return layers
