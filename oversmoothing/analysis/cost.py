"""The cost of a forward pass."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .probe import evaluating


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of one forward pass, matrix products and convolutions only, without any fast path.

    This makes them comparable with published numbers ("FLOPs" in the papers of this field). The counter cannot count
    inside fused attention either.

    Args:
        model: The model; its mode and its fast paths are restored.
        image: Shape (1, 3, H, W), on the model's device.
    """
    switches = [(module, module.fused_attn) for module in model.modules() if hasattr(module, "fused_attn")]
    for module, _ in switches:
        module.fused_attn = False
    try:
        # With gradients: without them the counter's hooks fail on a view of a parameter, such as CaiT's class token.
        with evaluating(model), torch.enable_grad(), FlopCounterMode(display=False) as counter:
            model(image)
    finally:
        for module, fused in switches:
            module.fused_attn = fused
    return counter.get_total_flops() // 2
