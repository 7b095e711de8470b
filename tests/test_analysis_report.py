"""The HTML page."""

from dataclasses import replace
from pathlib import Path

from subjects import SMALL, measured, write_photos

from oversmoothing.analysis import report as analysis_report


def test_labels_are_escaped_in_the_report(tmp_path: Path) -> None:
    (result,) = measured(
        "--data-path", write_photos(tmp_path), "--num-images", 1, "--model", "vit_tiny_patch16_224", *SMALL
    )
    page = analysis_report.render_report([replace(result, label="<b>&")], [], tmp_path, {"command": "a <b>"})
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page
