"""Saving and loading of Hugging Face models with remedies.

``add_remedy`` notes the remedies in the model's configuration, so ``model.save_pretrained`` and ``push_to_hub`` write
them beside the weights. ``from_pretrained`` here reads them::

    model = add_remedy(Dinov2Model.from_pretrained("facebook/dinov2-small"), "attnscale")
    model.save_pretrained("here")
    model = oversmoothing.from_pretrained(Dinov2Model, "here")
"""

from typing import Any

from torch import nn

from .convert import add_remedy
from .remedies import RemedyError


def from_pretrained(model_class: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """``model_class.from_pretrained(...)`` for a model that was saved with remedies; every weight is accounted for.

    Args:
        model_class: A model class of transformers, not one of its ``Auto`` classes.
        *args: As ``model_class.from_pretrained``.
        **kwargs: As ``model_class.from_pretrained``.

    Raises:
        RemedyError: If ``model_class`` is no model class, the configuration names no remedies, or weights are missing
            or left over.
    """
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise RemedyError(
            f"{getattr(model_class, '__name__', model_class)!r} is no model class: give that of the saved model, which "
            "its config.json names under architectures, such as ViTForImageClassification"
        )

    def with_remedies(model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(model, config, *args, **kwargs)
        if not getattr(config, "remedies", None):
            raise RemedyError(
                f"{config.name_or_path or 'this model'} was saved without remedies: load it with "
                f"{model_class.__name__}.from_pretrained, then call add_remedy"
            )
        add_remedy(model, dict(config.remedies))

    # transformers renames old files' weights for its own classes only, which it knows by their module.
    names = {"__init__": with_remedies, "__module__": model_class.__module__}
    converted = type(model_class.__name__, (model_class,), names)
    model, account = converted.from_pretrained(*args, **kwargs | {"output_loading_info": True})
    wrong = {what: sorted(account[what]) for what in ("missing_keys", "unexpected_keys") if account[what]}
    if wrong:
        raise RemedyError(f"{model_class.__name__}: the weights are not those of the model and its remedies: {wrong}")
    model.__class__ = model_class
    return model
