"""Shared by the tests of checkpoints and weights: a small model, the state of a training run of it, and bait."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models.swin_transformer import WindowAttention
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import checkpoints


def small_vit(name: str = "vit_tiny_patch16_224", img_size: int = 32, **kwargs: Any) -> torch.nn.Module:
    size = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 10, "patch_size": 8}
    return timm.create_model(name, img_size=img_size, **{**size, **kwargs})


def training_state(epoch: int = 0, step: int = 0) -> dict[str, Any]:
    """A checkpoint of a model that made one optimizer step."""
    torch.manual_seed(epoch)
    model = small_vit()
    ema = ModelEmaV3(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="tiny", data_path=Path("/data"), opt_betas=(0.9, 0.99), dtype=torch.float32)
    return checkpoints.assemble(
        model=torch.nn.DataParallel(model),
        model_ema=ema,
        optimizer=optimizer,
        scaler=None,
        epoch=epoch,
        step=step,
        meters={"0": {"loss": [np.float32(0.5), np.int64(3)]}},
        max_accuracy={"acc1": 12.5},
        args=args,
    )


class Hostile:
    """Its unpickling would create a file."""

    def __init__(self, marker: Path, function: Any = os.system) -> None:
        self.marker, self.function = marker, function

    def __reduce__(self) -> Any:
        if self.function is eval:
            return eval, (f"open({str(self.marker)!r}, 'w')",)
        return os.system, (f"touch {self.marker}",)


def swin_code_state(plain: nn.Module) -> dict[str, Tensor]:
    """The state dict of a plain model in the layout of Swin's own code: its names, its buffers."""
    state = {}
    for key, tensor in plain.state_dict().items():
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", key)
        state[re.sub(r"^head\.fc\.", "head.", key)] = tensor
    for name, module in plain.named_modules():
        if isinstance(module, WindowAttention):
            state[f"{name}.relative_position_index"] = module.relative_position_index
        if getattr(module, "attn_mask", None) is not None:
            state[f"{name}.attn_mask"] = module.attn_mask
    return state
