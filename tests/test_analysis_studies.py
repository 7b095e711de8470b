"""--cka, --probe and --sweep of the analysis command."""

import csv
from pathlib import Path

import pytest
from runs import tiny_tree
from subjects import SMALL

from scripts import analyze

TWO = ("--model", "deit_small_12", *SMALL, "--label", "plain", "--model", "attnscale_small_12", *SMALL)


def run(*words: object) -> Path:
    return analyze.main(analyze.get_parser().parse_args([str(word) for word in words])).parent


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
def test_each_study_adds_its_numbers_and_its_figure(tmp_path: Path) -> None:
    data = tiny_tree(tmp_path / "data", train=3, val=24)
    flags = ("--data-set", "FOLDER", "--data-path", data, "--num-images", 0, "--quantities", "features")
    studies = ("--cka", "--probe", "--sweep", "attnscale", "--sweep-values", -1, 0.5, "--sweep-layers", "each")
    folder = run(*flags, *studies, *TWO, "--output_dir", tmp_path / "out")
    cka, probes, sweep = (rows_of(folder / f"{name}.csv") for name in ("cka", "linear_probe", "sweep_attnscale"))
    assert len(cka) == 3 * 9 and {row["other_model"] for row in cka} == {"plain", "attnscale_small_12"}
    assert len(probes) == 2 * 3 * 2 and {row["features"] for row in probes} == {"patches", "class"}
    assert len(sweep) == 2 * (1 + 3 * 2) and {row["value"] for row in sweep} == {"", "-1", "0.5"}
    page = (folder / "report.html").read_text()
    for name in ("cka", "linear_probe", "sweep_attnscale"):
        assert (folder / f"{name}.png").is_file()
    for title in ("Similarity of layers (linear CKA)", "Class information by layer", "attnscale: lamb set by hand"):
        assert title in page
    assert cka[0]["count"] == sweep[0]["count"] == "24" and probes[0]["held_out_images"] == "12"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "gfsa"], "attnscale_small_12 cannot be swept over gfsa"),
        (["--cka", "class", "--model", "cait_xxs24_224", *SMALL], "cait_xxs24_224 has no class token in its blocks"),
    ],
)
def test_models_that_a_study_does_not_fit_are_refused_before_anything_is_measured(
    words: list[str], message: str, tmp_path: Path
) -> None:
    flags = ("--data-set", "FOLDER", "--data-path", tmp_path / "not there", "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run(*flags, *TWO, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--probe", "--data-path", "photos"], "--probe needs labels: give --data-set"),
        (["--sweep", "attnscale", "--data-path", "photos"], "--sweep needs labels: give --data-set"),
        (["--cka", "--image", "cat.jpg"], "--cka needs --data-path"),
        (["--sweep", "attnscal"], "--sweep attnscal: there is no remedy 'attnscal'; did you mean attnscale"),
        (["--sweep", "featscale.lamb"], "--sweep featscale.lamb: featscale has featscale.lamb1, featscale.lamb2"),
        (["--sweep-values", "0"], "--sweep-values without --sweep"),
        (["--sweep", "attnscale", "--sweep-values", "nan"], "--sweep-values nan: give finite numbers"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused_before_anything_is_read(words: list[str], message: str) -> None:
    args = analyze.get_parser().parse_args(["--model", "deit_small_12", *words])
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        analyze.check_args(args)


def test_too_few_images_for_a_probe_are_refused(tmp_path: Path) -> None:
    data = tiny_tree(tmp_path / "data", train=3, val=4)
    words = ("--data-set", "FOLDER", "--data-path", data, "--quantities", "features", "--probe", *TWO[:-1])
    with pytest.raises(ValueError, match=r"give more images \(--num-images\)"):
        run(*words, "depth=1", "--output_dir", tmp_path / "out")
