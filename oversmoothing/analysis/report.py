"""The analysis as one self-contained HTML page."""

import base64
import html
import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from .figures import DRAWINGS, Picture, draw_all
from .quantities import GROUPS
from .results import Result, as_json, quantities_of, tidy_rows, write_csv

TITLE = "Attention and over-smoothing, layer by layer"
# The other files that an analysis may write beside analysis.csv, analysis.json and report.html, without suffix.
STEMS = (
    "differences",
    "parameters",
    "cka",
    "linear_probe",
    "token_map",
    *(f"{name}_image" for name in GROUPS),
    r"sweep_[\w.]+",
)

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
img {{ max-width: 100%; height: auto; }}
figure {{ margin: 2em 0; }} figcaption {{ color: #555; }}
table {{ border-collapse: collapse; font-size: 14px; }}
th, td {{ padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
.text th, .text td {{ text-align: left; }}
.scroll {{ overflow-x: auto; }} summary {{ cursor: pointer; margin: 0.5em 0; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


READING = (
    "Over-smoothing is an asymptotic statement: powers of one softmax map tend to their DC part. Residual branches, "
    "MLPs and a new map in every layer intervene, so no curve here has to fall, or rise, from layer to layer; and a "
    "model with random weights says something about its initialisation only."
)


PAIRED = (
    "Every image went through both models, and the intervals are about images: these models, on other images of the "
    "same kind. They say nothing of other training runs: with other seeds, models of one recipe can differ as much. "
    "scripts/compare.py trains several seeds and compares those. The intervals hold for all layers of a quantity "
    "together (Bonferroni), since the largest difference is picked, but not for all quantities together. "
    "differences.csv has every quantity."
)


def write_analysis(
    results: Sequence[Result], folder: str | Path, settings: dict[str, Any], pictures: Sequence[Picture] = ()
) -> Path:
    """Writes analysis.csv and analysis.json (every number in a figure), the figures and report.html.

    Also writes differences.csv if models were compared with the first one. Where the folder holds an earlier analysis,
    its files that this one does not have are removed (:func:`remove_earlier`).

    Args:
        results: May be empty, if only the maps of one image were drawn.
        folder: Made if needed.
        settings: What a reader needs to reproduce the numbers.
        pictures: Further figures, after those of the results; a file of numbers has the same name with ``.csv``.

    Returns:
        The path of the page.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [*(draw_all(results) if results else ()), *pictures]
    remove_earlier(folder, {Path(picture.file).stem for picture in pictures} | ({"analysis"} if results else set()))
    if results:
        write_csv(folder / "analysis.csv", tidy_rows(results))
        text = json.dumps(as_json(results, settings), indent=1, allow_nan=False)
        (folder / "analysis.json").write_text(text, encoding="utf-8")
        if differences := [row for result in results if result.differences for row in result.differences.rows()]:
            write_csv(folder / "differences.csv", differences)
    for item in pictures:
        item.figure.savefig(folder / item.file, dpi=130, bbox_inches="tight")  # or long names would be cut
    report = folder / "report.html"
    report.write_text(render_report(results, pictures, folder, settings), encoding="utf-8")
    return report


def remove_earlier(folder: Path, keep: Collection[str]) -> None:
    """Removes what an earlier analysis wrote to a folder; without an analysis's report.html there, nothing.

    Args:
        folder: Of the analysis.
        keep: Names without suffix that stay, since this analysis writes them.
    """
    report = folder / "report.html"
    if not report.is_file() or f"<title>{TITLE}</title>" not in report.read_text("utf-8", errors="replace")[:1000]:
        return
    drawings = [
        drawing.name + (r"_\d+" if drawing.per_model else "") for drawings in DRAWINGS.values() for drawing in drawings
    ]
    known = re.compile(rf"(analysis\.(csv|json))|(({'|'.join((*drawings, *STEMS))})\.(csv|png))")
    for path in folder.iterdir():
        if known.fullmatch(path.name) and path.stem not in keep and path.is_file():
            path.unlink()


def render_report(
    results: Sequence[Result], pictures: Sequence[Picture], folder: Path, settings: dict[str, Any]
) -> str:
    """The page, with the pictures in ``folder`` embedded.

    Args:
        results: May be empty, if only the maps of one image were drawn.
        pictures: Figures whose files lie in ``folder``.
        folder: ``--output_dir``.
        settings: Shown as they are.
    """
    parts = [f"<p>{html.escape(READING)}</p>"] if results else []
    if results:
        rows = [
            [
                result.label,
                result.name,
                result.weights,
                f"{result.num_parameters:,}",
                f"{result.input_size} px",
                len(result.layers),
            ]
            for result in results
        ]
        parts.append(html_table(["model", "timm name", "weights", "parameters", "input", "layers"], rows))
        parts += comparison(results)
    for picture in pictures:
        parts.append(html_picture(picture, folder))
    if results:
        parts.append("<h2>Numbers</h2><p>Means over the images; analysis.csv has all, with their spread.</p>")
        parts += [f"<details><summary>{html.escape(r.label)}</summary>{layer_table(r)}</details>" for r in results]
        left_out = [[result.label, *row] for result in results for row in left_out_rows(result)]
        if left_out:
            parts.append("<h2>Left out</h2>" + html_table(["model", "quantities", "blocks", "why"], left_out, "text"))
        parts.append(
            "<h2>Quantities</h2>" + html_table(["quantity", "what it is"], quantities_of(results).items(), "text")
        )
    parts.append("<h2>Settings</h2>" + html_table(["setting", "value"], settings.items(), "text"))
    return html_page(TITLE, parts)


def html_page(title: str, parts: Iterable[str]) -> str:
    """A self-contained page made of parts in HTML."""
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


def html_picture(picture: Picture, folder: Path) -> str:
    """A picture as part of the page, embedded from its file in ``folder``, with title and caption."""
    data = base64.b64encode((folder / picture.file).read_bytes()).decode()
    return (
        f'<figure><h2>{html.escape(picture.title)}</h2><img alt="{html.escape(picture.title)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{html.escape(picture.caption)}</figcaption></figure>'
    )


def comparison(results: Sequence[Result]) -> list[str]:
    """Differences of each other model from the first one, in sentences; empty for one model."""
    first, *others = results
    sentences = []
    for result in others:
        if result.differences is not None:
            sentences += result.differences.sentences()
        elif len(result.layers) != len(first.layers):
            depths = f"{len(result.layers)} layers and {first.label} {len(first.layers)}"
            sentences.append(f"{result.label} has {depths}: they are not compared layer by layer.")
    if not sentences:
        return []
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return [f"<h2>What differs</h2><ul>{items}</ul><p>{html.escape(PAIRED)}</p>"]


def left_out_rows(result: Result) -> list[list[str]]:
    """Group of quantities, blocks, reason: one row for all blocks of a group that share a reason."""
    rows: dict[tuple[str, str], list[str]] = {}
    for group, blocks in result.left_out.items():
        for block, reason in blocks.items():
            rows.setdefault((group, reason), []).append(block)
    return [[group, ", ".join(blocks), reason] for (group, reason), blocks in rows.items()]


def layer_table(result: Result) -> str:
    """One row per layer with its quantities as single numbers, averaged over heads or channels."""
    names = [
        name
        for name in quantities_of([result])
        if any(name in layer and layer[name].is_table_entry for layer in result.layers)
    ]
    rows = [
        [block, *(f"{layer[name].mean.mean().item():.4g}" if name in layer else "" for name in names)]
        for block, layer in zip(result.layer_names, result.layers, strict=True)
    ]
    return html_table(["block", *names], rows)


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "numbers") -> str:
    """A table as wide as it needs to be: of ``numbers``, aligned to the right, or of ``text``."""

    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table class="{kind}">{line(header, "th")}\n{body}</table></div>'
