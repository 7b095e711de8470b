"""The models and images of an analysis: labels, weights, folders, data sets."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from subjects import KWARGS, SMALL, assert_equal_results, measured, subject_of, write_photos

from datasets import DataError
from oversmoothing.analysis import analyze, probe
from oversmoothing.analysis.cka import compare_layers
from oversmoothing.analysis.subject import ModelSpec, build_subject, unique_labels
from oversmoothing.remedies.attnscale import AttnScaleAttention
from oversmoothing.weights import CheckpointError, ModelError


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


def test_weights_that_cannot_be_downloaded_are_not_blamed_on_the_models_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(timm, "create_model", offline)
    spec = ModelSpec("vit_tiny_patch16_224", pretrained=True)
    with pytest.raises(ModelError, match=r"--pretrained: .* cannot be downloaded \(no connection\): .*--resume FILE"):
        build_subject(spec, "label", device=torch.device("cpu"))


def test_models_and_batches_of_another_form_are_refused_with_what_is_taken(tmp_path: Path) -> None:
    model = subject_of("vit_tiny_patch16_224").model
    images = torch.zeros(1, 3, 32, 32)
    for models in ([model], "vit", {"mine": "vit"}):
        with pytest.raises(TypeError, match=r'a model, or several by their labels as \{"plain": model\}, not a '):
            analyze(models, [images], tmp_path)
        with pytest.raises(TypeError, match="not a "):
            compare_layers(models, [images])
    for batch, found in (
        ({"pixel_values": images}, "dict with pixel_values"),
        (images[0], r"tensor \(3, 32, 32\)"),
        ("x", "str"),
    ):
        with pytest.raises(TypeError, match=rf"images as tensors \(B, 3, H, W\).*, not a {found}"):
            analyze(model, [batch], tmp_path)
        with pytest.raises(TypeError, match=f"not a {found}"):
            compare_layers(model, [batch])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "attnscale.pth"
    torch.save({"model": timm.create_model("attnscale_small_12", num_classes=7, **KWARGS).state_dict()}, file)
    with pytest.raises(CheckpointError, match="lamb"):
        measured("--data-path", write_photos(tmp_path), "--model", "deit_small_12", *SMALL, "--resume", file)


def test_a_remedys_class_in_a_model_of_timm_is_analysed() -> None:
    subject = subject_of("vit_base_patch16_224", attn_layer=AttnScaleAttention)
    assert all("lamb" in probe.layer_parameters(layer) for layer in subject.layers)
