"""The analysis command, end to end on small models and real image files."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from subjects import KWARGS, NUM_IMAGES, SMALL, assert_equal_results, dense_maps, measured, subject_of, write_photos
from test_scripts import refused

import options
from datasets import DataOptions, build_transform
from oversmoothing.analysis import spectrum
from oversmoothing.analysis.measurement import Measurement
from oversmoothing.analysis.pooled import pooled_outputs
from oversmoothing.analysis.probe import NonFiniteError
from oversmoothing.analysis.quantities import DEFAULT, GROUPS
from oversmoothing.weights import load_weights, read_checkpoint
from scripts import analysis_images, analyze

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_QUANTITIES = [name for group in DEFAULT for name in GROUPS[group].quantities]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def attnscale_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with lamb away from zero, as main.py saves it: it knows how to build its model."""
    torch.manual_seed(0)
    kwargs = {key: value for key, value in KWARGS.items() if key != "img_size"}
    model = timm.create_model("attnscale_small_12", num_classes=7, img_size=32, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lamb"):
                parameter.copy_(torch.tensor([-0.2, 0.3, 0.9]))
    path = tmp_path_factory.mktemp("weights") / "attnscale.pth"
    torch.save({"model": model.state_dict(), "args": {"model_kwargs": kwargs, "input_size": 32}}, path)
    return path


def run(*argv: object) -> Path:
    return analyze.main(analyze.get_parser().parse_args([str(value) for value in argv])).parent


@pytest.fixture(scope="module")
def output(photos: Path, attnscale_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(
        "--data-path",
        photos,
        "--batch-size",
        2,
        "--output_dir",
        tmp_path_factory.mktemp("out") / "new",
        "--model",
        "attnscale_small_12",
        "--resume",
        attnscale_file,
        "--label",
        "ours",
        "--model",
        "featscale_small_24",
        *SMALL,
        "--image",
        photos / "0.png",
        "--layer",
        1,
    )


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_flags_belong_to_the_model_before_them() -> None:
    first, second, third = (
        analyze.get_parser()
        .parse_args(
            [
                "--model",
                "a",
                "--resume",
                "a.pth",
                "--label",
                "mine",
                "--model",
                "b",
                "--pretrained",
                "--model",
                "c",
                "--model-kwargs",
                "depth=24",
                "gain=1.0",
            ]
        )
        .models
    )
    assert (first.name, first.resume, first.label, first.pretrained) == ("a", "a.pth", "mine", False)
    assert (second.name, second.resume, second.label, second.pretrained) == ("b", None, None, True)
    assert third.kwargs == {"depth": 24, "gain": 1.0} and not first.kwargs


def test_a_flag_before_any_model_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        analyze.get_parser().parse_args(["--resume", "a.pth", "--model", "a"])
    assert "--resume belongs to the --model before it" in capsys.readouterr().err


def test_all_wrong_flags_are_named_at_once() -> None:
    args = analyze.get_parser().parse_args(["--model", "vit_tinny", "--batch-size", "0"])
    with pytest.raises(ValueError) as error:
        analyze.check_args(args)
    for flag in ("--model vit_tinny", "--batch-size", "--data-path"):
        assert flag in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), 1e25])
def test_a_model_whose_features_are_not_finite_is_refused_before_any_image_is_read(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **KWARGS)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] = value
    torch.save({"model": model.state_dict()}, tmp_path / "bad.pth")
    given = ("--model", "vit_tiny_patch16_224", *SMALL, "--resume", tmp_path / "bad.pth", "--label", "mine")
    line = refused(
        analyze.cli, (*given, "--data-path", tmp_path, "--output_dir", tmp_path / "out"), monkeypatch, capsys
    )
    assert "mine: the features are not finite" in line and "from blocks.1 on" in line


def test_files_that_are_not_there_or_cannot_be_written_are_refused_before_a_model_is_built(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(analyze, "build_subjects", lambda *args: pytest.fail("a model was built"))
    given = ("--model", "vit_tiny_patch16_224", *SMALL, "--data-path", photos, "--output_dir")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "out", "/proc"):
        assert f"--output_dir {folder} cannot be written (" in refused(
            analyze.cli, (*given, folder), monkeypatch, capsys
        )
    line = refused(analyze.cli, (*given, tmp_path, "--image", tmp_path / "none.jpg"), monkeypatch, capsys)
    assert line == f"error: --image {tmp_path / 'none.jpg'}: there is no such file"
    line = refused(analyze.cli, (*given, tmp_path, "--image", tmp_path / "file"), monkeypatch, capsys)
    assert line.startswith(f"error: cannot read image {tmp_path / 'file'}") and line.endswith(": repair or remove it")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_sentence_without_flags_of_other_commands(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    damaged = write_photos(tmp_path) / "0.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    given = ("--model", "vit_tiny_patch16_224", *SMALL, "--data-path", tmp_path, "--num_workers", workers)
    line = refused(analyze.cli, (*given, "--output_dir", tmp_path / "out"), monkeypatch, capsys)
    assert line.startswith(f"error: cannot read image {damaged} (") and line.endswith("): repair or remove it")


def test_images_that_make_the_features_infinite_are_refused() -> None:
    subject = subject_of("vit_tiny_patch16_224")
    images = torch.full((2, 3, 32, 32), float("inf"))
    with pytest.raises(NonFiniteError, match="not finite.* from blocks.0 on"):
        Measurement(subject).update(images)
    with pytest.raises(NonFiniteError, match="ours: .* from blocks.0 on"):
        pooled_outputs("ours", subject.model, images, ("patches",))


def test_numbers_equal_those_of_the_dense_attention_maps(output: Path, photos: Path, attnscale_file: Path) -> None:
    model = timm.create_model("attnscale_small_12", num_classes=7, **KWARGS).eval()
    load_weights(model, read_checkpoint(attnscale_file)["model"], source="test")
    transform = build_transform(False, DataOptions(input_size=32), None)
    images = torch.stack([image for image, _ in analysis_images.ImageFiles(photos, transform)])
    features = model.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
    maps = dense_maps(model, images)

    data = json.loads((output / "analysis.json").read_text())
    ours = next(entry for entry in data["models"] if entry["label"] == "ours")
    assert len(ours["layers"]) == 3 and data["settings"]["images"] == NUM_IMAGES
    for layer, attn, (patches, prefix) in zip(ours["layers"], maps, features, strict=True):
        assert layer["spectrum"]["count"] == NUM_IMAGES and len(layer["spectrum"]["frequency_pi"]) == 17
        expected = spectrum.attention_spectrum(attn).mean(dim=0)
        torch.testing.assert_close(torch.tensor(layer["spectrum"]["mean"]), expected, rtol=1e-4, atol=1e-6)
        tokens = torch.cat([prefix, patches], dim=1)
        ratio = spectrum.high_frequency_ratio(tokens)
        assert layer["hc_dc_mlp"]["mean"] == pytest.approx(ratio.mean().item(), rel=1e-4)
        assert layer["hc_dc_mlp"]["std"] == pytest.approx(ratio.std(unbiased=False).item(), rel=1e-3)
        assert layer["lamb"]["mean"] == pytest.approx([-0.2, 0.3, 0.9])
    similarity = spectrum.map_similarity(maps[0].mean(dim=1), maps[1].mean(dim=1)).mean().item()
    assert ours["layers"][1]["layer_similarity"]["mean"] == pytest.approx(similarity, rel=1e-4)
    assert "layer_similarity" not in ours["layers"][0]


def test_csv_holds_the_same_numbers_as_json(output: Path) -> None:
    rows = read_rows(output / "analysis.csv")
    models = {entry["label"]: entry["layers"] for entry in json.loads((output / "analysis.json").read_text())["models"]}
    assert {row["model"] for row in rows} == set(models) == {"ours", "featscale_small_24"}
    assert {row["quantity"] for row in rows} == {*DEFAULT_QUANTITIES, "lamb", "lamb1", "lamb2"}
    counted = 0
    for row in rows:
        entry = models[row["model"]][int(row["layer"])][row["quantity"]]
        value = entry["mean"]
        if row["unit"]:
            value = value[int(row["unit"])]
        if row["frequency_pi"]:
            position = [f"{frequency:.6g}" for frequency in entry["frequency_pi"]].index(row["frequency_pi"])
            value = value[position]
        if row["index"]:
            value = value[int(row["index"])]
        assert float(row["mean"]) == pytest.approx(value, rel=1e-6)
        counted += 1
    assert counted == sum(
        np.size(entry["mean"])
        for layers in models.values()
        for layer in layers
        for name, entry in layer.items()
        if name != "block"
    )


def test_the_result_does_not_depend_on_the_batch_size_and_the_processes(photos: Path) -> None:
    flags = ["--data-path", photos, "--model", "featscale_small_24", *SMALL, "--batch-size"]
    (one,), (four,) = measured(*flags, 1, "--num_workers", 0), measured(*flags, 4, "--num_workers", -1)
    assert_equal_results(one, four)


def test_a_measurement_does_not_grow_with_the_images() -> None:
    measurement = Measurement(subject_of("vit_tiny_patch16_224"), quantities=["all"])

    def size() -> int:
        running = [running for layer in measurement.layers for running in layer.values()]
        return sum(r._sum.numel() + r._sum_of_squares.numel() for r in running)

    generator = torch.Generator().manual_seed(0)
    measurement.update(torch.randn(2, 3, 32, 32, generator=generator))
    before = size()
    for _ in range(3):
        measurement.update(torch.randn(2, 3, 32, 32, generator=generator))
    assert size() == before
    assert measurement.layers[0]["spectrum"].count == 8


def test_prefix_tokens_can_be_left_out_of_the_features(photos: Path) -> None:
    flags = ["--data-path", photos, "--num-images", 2, "--model", "vit_tiny_patch16_224", *SMALL, "--tokens"]
    everything, patches = (measured(*flags, tokens)[0].layers[1] for tokens in ("all", "patches"))
    assert abs(everything["hc_dc_mlp"].mean - patches["hc_dc_mlp"].mean) > 1e-3
    torch.testing.assert_close(everything["spectrum"].mean, patches["spectrum"].mean)


def test_models_with_different_inputs_share_one_pass(photos: Path) -> None:
    larger = [value.replace("img_size=32", "img_size=48") for value in SMALL]
    name = "vit_tiny_patch16_224"
    results = measured("--data-path", photos, "--num-images", 2, "--model", name, *SMALL, "--model", name, *larger)
    assert [result.input_size for result in results] == [32, 48]
    assert [len(result.layers[0]["spectrum"].frequencies) for result in results] == [17, 37]


def test_the_report_needs_no_other_file(output: Path) -> None:
    page = (output / "report.html").read_text(encoding="utf-8")
    figures = sorted(path.name for path in output.glob("*.png"))
    assert figures == [
        "attention.png",
        "differences.png",
        "hc_dc.png",
        "heads.png",
        "log_amplitude.png",
        "overview.png",
        "parameters.png",
        "similarity.png",
        "singular_values.png",
        "spectrum_0.png",
        "spectrum_1.png",
        "token_map.png",
    ]
    assert page.count("data:image/png;base64,") == len(figures)
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert all(source.startswith("data:") for source in sources) and len(sources) == len(figures)
    for text in ("ours", "featscale_small_24", "blocks.2", "no curve here has to fall", "What differs"):
        assert text in page
    rows = read_rows(output / "differences.csv")
    assert {(row["model"], row["baseline"]) for row in rows} == {("featscale_small_24", "ours")}
    assert {row["quantity"] for row in rows} > {"token_similarity", "hc_dc_mlp", "attention_entropy"}


def test_every_group_with_one_picture(photos: Path, attnscale_file: Path, tmp_path: Path) -> None:
    model = ["--model", "attnscale_small_12", "--resume", attnscale_file]
    folder = run("--quantities", "all", "--image", photos / "0.png", *model, "--output_dir", tmp_path)
    # Without --data-path: what needs no images, and the picture.
    assert {path.name for path in folder.glob("*.png")} == {
        "eigenvalue_summary.png",
        "eigenvalues_0.png",
        "parameters.png",
        "rollout_image.png",
        "token_map.png",
        "tokens_image.png",
    }
    for group in ("rollout", "tokens"):
        rows = read_rows(folder / f"{group}_image.csv")
        assert len(rows) == 3 * 16 and all(float(row[group]) > 0 for row in rows)
    rows = read_rows(folder / "analysis.csv")
    assert len([row for row in rows if row["quantity"] == "vo_real"]) == 3 * 3 * 8
    assert {row["index"] for row in rows if row["quantity"] == "vo_real"} == set("01234567")


def test_token_map_file_has_every_patch(output: Path) -> None:
    rows = read_rows(output / "token_map.csv")
    assert len(rows) == 2 * 16 and {row["block"] for row in rows} == {"blocks.1"}
    changes = {row["model"]: row["change_times_n"] for row in rows}
    assert changes["ours"] and not changes["featscale_small_24"]


@pytest.mark.slow
def test_the_command_runs_from_anywhere_and_refuses_in_one_sentence(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "analyze.py"), "--data-path", str(photos), "--model", "resnet18"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "ResNet has no block with a self-attention module" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "depth", "tokens"),
    [
        ("vit_base_patch16_224", 12, 197),
        ("deit_small_distilled_patch16_224", 12, 198),
        ("cait_xxs24_224", 24, 196),
        ("swin_tiny_patch4_window7_224", 12, 49),
        ("eva02_tiny_patch14_224", 12, 257),
    ],
)
def test_timms_models_at_full_size(name: str, depth: int, tokens: int, photos: Path) -> None:
    (result,) = measured("--data-path", photos, "--num-images", 1, "--model", name)
    assert len(result.layers) == depth
    assert len(result.layers[0]["spectrum"].frequencies) == tokens  # class token and all; CaiT's patches; a Swin window


def test_the_commands_of_the_page_are_understood() -> None:
    page = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("python ")]
    assert len(commands) >= 3
    for _, script, *words in commands:
        if script == "main.py":
            options.check_args(options.get_args_parser().parse_args(words))
        else:
            assert script == "scripts/analyze.py"
            analyze.check_args(analyze.get_parser().parse_args(words))
