"""The HTML page."""

from dataclasses import replace
from pathlib import Path

from subjects import SMALL, measured, write_photos

from oversmoothing.analysis import report as analysis_report
from scripts import analyze


def command(words: list) -> None:
    analyze.main(analyze.get_parser().parse_args([str(word) for word in words]))


def test_labels_are_escaped_in_the_report(tmp_path: Path) -> None:
    (result,) = measured(
        "--data-path", write_photos(tmp_path), "--num-images", 1, "--model", "vit_tiny_patch16_224", *SMALL
    )
    page = analysis_report.render_report([replace(result, label="<b>&")], [], tmp_path, {"command": "a <b>"})
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page


def test_an_analysis_leaves_no_file_of_an_earlier_one_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    photos = write_photos(tmp_path / "photos")
    model = ["--model", "vit_tiny_patch16_224", *SMALL]
    flags = ["--data-path", photos, "--num-images", 4, "--quantities", "maps", "tokens"]
    more = ["--image", photos / "0.png", "--cka"]
    reused, fresh = tmp_path / "reused", tmp_path / "fresh"
    command([*flags, *model, *model, *more, "--output_dir", reused])
    first = {path.name for path in reused.iterdir()}
    foreign = {"notes.png", "differences.txt", "spectrum_a.png", "my_image.png"}
    for name in foreign:
        (reused / name).touch()
    later = ["--data-path", photos, "--num-images", 4, *model, "--quantities", "maps", "--output_dir"]
    command([*later, reused])
    command([*later, fresh])
    written = {path.name for path in fresh.iterdir()}
    assert {path.name for path in reused.iterdir()} == written | foreign
    assert first - written >= {"cka.csv", "cka.png", "differences.csv", "spectrum_1.png", "tokens_image.csv"}
    command([*later, fresh, *more])  # what its own studies wrote stays
    assert (fresh / "cka.csv").exists() and (fresh / "token_map.csv").exists() and (fresh / "cka.png").exists()


def test_files_beside_a_page_of_another_kind_are_left_alone(tmp_path: Path) -> None:
    for name in ("cka.csv", "analysis.json"):
        (tmp_path / name).touch()
    analysis_report.remove_earlier(tmp_path, set())
    (tmp_path / "report.html").write_text("<title>Something else</title>")
    analysis_report.remove_earlier(tmp_path, set())
    assert (tmp_path / "cka.csv").exists() and (tmp_path / "analysis.json").exists()
