"""The zoo. Importing this package registers every variant with timm::

    import models, timm
    timm.create_model("attnscale_small_12", num_classes=10, img_size=32, patch_size=4)

In an installed library this package is ``oversmoothing.zoo``. The remedies are in ``oversmoothing/remedies/``; how to
add one: ``docs/add_a_remedy.md``.

How to add a backbone: one file beside ``deit.py`` with a size table, the table of variants, ``default_cfgs`` and a
call of ``register_variants`` with timm's model class; then import it here.
"""

from . import cait, deit, swin

__all__ = ["cait", "deit", "list_models", "swin"]


def list_models() -> list[str]:
    """Names of this zoo, smallest first within a family."""
    return [name for module in (deit, cait, swin) for name in module.default_cfgs]
