"""Translates parameter names of other codebases to timm's names."""

import re
from collections.abc import Mapping

from torch import Tensor

# Constants of the window, its shift and the image size, which Swin's code saves and timm computes.
SWIN_BUFFERS = ("relative_position_index", "attn_mask")


def timm_names(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames a state dict of Swin's own code to timm's names; returns any other unchanged.

    ==============================  ==================================  =========================================
    Swin's code                     timm
    ==============================  ==================================  =========================================
    ``layers.<i>.downsample.*``     ``layers.<i + 1>.downsample.*``     the end of a stage, the start of the next
    ``head.*``                      ``head.fc.*``                       the classifier
    ``*.relative_position_index``   --                                  a constant
    ``*.attn_mask``                 --                                  a constant
    ==============================  ==================================  =========================================

    Args:
        wanted: State dict of the model.
        given: State dict of a file.

    Returns:
        The state dict, and a list with a note on what was done, empty if it is unchanged.
    """
    first = "layers.0.downsample.reduction.weight"  # only Swin's code has this name: timm's first stage has none
    if first in wanted or first not in given:
        return dict(given), []
    renamed = {_swin_name(name): tensor for name, tensor in given.items()}
    kept = {n: t for n, t in renamed.items() if n in wanted or not n.endswith(SWIN_BUFFERS)}
    buffers = f"; left out {len(renamed) - len(kept)} constants ({', '.join(SWIN_BUFFERS)})"
    return kept, ["renamed layers.i.downsample to layers.i+1.downsample and head to head.fc" + buffers]


def _swin_name(name: str) -> str:
    name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)
    return re.sub(r"^head\.", "head.fc.", name)
