"""Loads weights from anywhere: from an address to a file, to tensors, to a model, with every key checked."""

from .load import load_weights, number_of_classes, problems
from .model import (
    ModelError,
    check_model_name,
    create_model,
    model_from_checkpoint,
    near_models,
    published_model,
    trained_with,
)
from .read import CheckpointError, read_checkpoint

__all__ = [
    "CheckpointError",
    "ModelError",
    "check_model_name",
    "create_model",
    "load_weights",
    "model_from_checkpoint",
    "near_models",
    "number_of_classes",
    "problems",
    "published_model",
    "read_checkpoint",
    "trained_with",
]
