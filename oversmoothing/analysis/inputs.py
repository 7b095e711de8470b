"""Brings users' batches, models and outputs into one form."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Models = nn.Module | Mapping[str, nn.Module]


def by_label(models: Models) -> dict[str, nn.Module]:
    """Models by their labels; of a single one the name of its class.

    Raises:
        TypeError: If it is neither a model nor models by their labels.
        ValueError: If there is none.
    """
    if isinstance(models, nn.Module):
        return {type(models).__name__: models}
    if not isinstance(models, Mapping) or not all(isinstance(model, nn.Module) for model in models.values()):
        found = type(models).__name__
        if isinstance(models, Mapping):
            found += " of " + ", ".join(dict.fromkeys(type(model).__name__ for model in models.values()))
        raise TypeError(f'models: give a model, or several by their labels as {{"plain": model}}, not a {found}')
    found = dict(models)
    if not found:
        raise ValueError("no models to analyse: give one, or several by their labels")
    return found


def inputs_and_labels(
    batches: Iterable[Any], models: Sequence[nn.Module], labelled: str = ""
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """For each batch, the input of every model on the model's device, and the labels (B,), if there are any.

    Args:
        batches: Images (B, 3, H, W); or tuples of images and labels; or, if the models need different inputs, tuples of
            a list with one input per model, and labels.
        models: In the order of such lists.
        labelled: What needs labels, for the message; empty: nothing does.

    Raises:
        TypeError: If a batch has no tensor of images.
        ValueError: If there are no batches, labels are needed but missing, or labels are not class indices.
    """
    devices = [next(model.parameters()).device for model in models]
    empty = True
    for batch in batches:
        empty = False
        several = isinstance(batch, tuple | list) and batch and isinstance(batch[0], tuple | list)
        images = batch[0] if several else images_of(batch)
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
        images = [images] * len(models) if isinstance(images, Tensor) else images
        if labelled:
            _check_labels(labels, len(images[0]), labelled)
        yield [x.to(device) for x, device in zip(images, devices, strict=True)], labels
    if empty:
        raise ValueError("no batches to analyse: give images, or a loader of a data set that is not empty")


def images_of(batch: Any) -> Tensor:
    """The images (B, 3, H, W) of a batch: the batch itself, or the first of a tuple or list.

    Raises:
        TypeError: If there are none.
    """
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or images.dim() != 4:
        found = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise TypeError(
            "batches: give images as tensors (B, 3, H, W), or tuples that begin with them (of a dictionary, its "
            f"images alone: batch['pixel_values']), not {found}{keys}"
        )
    return images


def _check_labels(labels: Any, count: int, labelled: str) -> None:
    if labels is None:
        raise ValueError(f"{labelled} needs labels: give batches of (images, labels)")
    if not isinstance(labels, Tensor) or labels.shape != (count,) or labels.is_floating_point():
        found = f"a tensor {tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else type(labels)
        raise ValueError(f"{labelled} needs labels as a tensor ({count},) of class indices, got {found}")


def logits_of(output: Any, label: str) -> Tensor:
    """The logits (B, classes) in a model's output: a tensor, a tuple that begins with it, or an object's ``.logits``.

    Raises:
        ValueError: If the output has none.
    """
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple) else logits
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(f"{label} returns no logits (B, classes), so it has no accuracy: give a model with a head")
    return logits
