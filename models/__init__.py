"""The zoo. Importing this package registers every variant with timm::

    import models, timm
    timm.create_model("attnscale_small_12", num_classes=10, img_size=32, patch_size=4)

How to add a remedy: one file beside ``attnscale.py`` with the equation, a pure function on tensors and a subclass of
the timm layer it changes; then one constructor-argument dict and its rows in ``deit.py`` and ``cait.py``. Its new
parameters' names go into ``REMEDY_PARAMETERS``: a plain checkpoint may lack exactly these. A worked example:
``docs/add_a_remedy.md``.

How to add a backbone: one file beside ``deit.py`` with a size table, the table of variants, ``default_cfgs`` and a
call of ``register_variants`` with timm's model class; then import it here.
"""

from . import cait, deit
from .attnscale import AttnScaleAttention, AttnScaleTalkingHeadAttn
from .featscale import FeatScaleBlock, FeatScaleLayerScaleBlock
from .folding import set_fused
from .published import REMEDY_PARAMETERS, is_remedy_parameter

__all__ = [
    "AttnScaleAttention",
    "AttnScaleTalkingHeadAttn",
    "FeatScaleBlock",
    "FeatScaleLayerScaleBlock",
    "REMEDY_PARAMETERS",
    "cait",
    "deit",
    "is_remedy_parameter",
    "list_models",
    "set_fused",
]


def list_models() -> list[str]:
    """Names of this zoo, smallest first within a family."""
    return [name for module in (deit, cait) for name in module.default_cfgs]
