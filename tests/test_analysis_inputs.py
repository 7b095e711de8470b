"""The models and images of an analysis: labels, weights, folders, data sets."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from subjects import KWARGS, SMALL, assert_equal_results, measured, subject_of, write_photos

from datasets import DataError
from oversmoothing.analysis import probe
from oversmoothing.analysis.subject import ModelSpec, unique_labels
from oversmoothing.remedies.attnscale import AttnScaleAttention
from oversmoothing.weights import CheckpointError


def test_models_of_one_name_get_distinct_labels() -> None:
    specs = [ModelSpec("a"), ModelSpec("b", label="a"), ModelSpec("b")]
    assert unique_labels(specs) == ["a #1", "a #2", "b"]


def test_a_data_set_of_main_is_evaluated_on_its_validation_images(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 40), (index * 40, 90, 20)).save(tmp_path / split / label / f"{index}.png")
    flags = ["--data-path", tmp_path, "--num-images", 0, "--model", "vit_tiny_patch16_224", *SMALL]
    (loose,), (labelled,) = measured(*flags), measured(*flags, "--data-set", "FOLDER")
    assert loose.layers[0]["hc_dc_mlp"].count == labelled.layers[0]["hc_dc_mlp"].count == 4
    assert_equal_results(loose, labelled)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        measured("--data-path", tmp_path, "--model", "vit_tiny_patch16_224", *SMALL)


def test_a_folder_that_is_not_there_is_said_not_to_exist(tmp_path: Path) -> None:
    model = ("--model", "vit_tiny_patch16_224", *SMALL)
    with pytest.raises(DataError, match="--data-path .*nowhere does not exist"):
        measured("--data-path", tmp_path / "nowhere", *model)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--data-path .*file is a file"):
        measured("--data-path", tmp_path / "file", *model)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "attnscale.pth"
    torch.save({"model": timm.create_model("attnscale_small_12", num_classes=7, **KWARGS).state_dict()}, file)
    with pytest.raises(CheckpointError, match="lamb"):
        measured("--data-path", write_photos(tmp_path), "--model", "deit_small_12", *SMALL, "--resume", file)


def test_a_remedys_class_in_a_model_of_timm_is_analysed() -> None:
    subject = subject_of("vit_base_patch16_224", attn_layer=AttnScaleAttention)
    assert all("lamb" in probe.layer_parameters(layer) for layer in subject.layers)
