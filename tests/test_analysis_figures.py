"""The figures: every layer has its panel, every axis its label."""

import io

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from subjects import subject_of

from oversmoothing.analysis import figures as analysis_figures
from oversmoothing.analysis import results as analysis_results
from oversmoothing.analysis.layer_maps import LayerMaps, draw_layer_maps
from oversmoothing.analysis.measurement import Measurement
from oversmoothing.analysis.values import Values


def test_figures_cover_every_layer_of_12_and_of_24() -> None:
    for depth, shape in ((12, (3, 4)), (24, (4, 6))):
        subject = subject_of("attnscale_small_12", depth=depth)
        measurement = Measurement(subject)
        measurement.update(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        result = analysis_results.Result(
            "label", "name", "weights", 1, 32, [layer.name for layer in subject.layers], measurement.results()
        )
        pictures = analysis_figures.draw_all([result])
        figure = next(picture.figure for picture in pictures if picture.file == "spectrum_0.png")
        assert len(figure.axes) == depth and figure.axes[0].get_gridspec().get_geometry() == shape
        assert [ax.get_title() for ax in figure.axes] == [f"blocks.{index}" for index in range(depth)]
        for picture in pictures:
            for ax in picture.figure.axes:
                has_axis_label = ax.get_xlabel() or ax.get_ylabel() or picture.figure.get_supxlabel()
                assert has_axis_label, (picture.file, ax.get_title())
            assert picture.title and picture.caption


def test_a_wide_spread_does_not_stretch_a_logarithmic_axis() -> None:
    layers = [{"hc_dc_mlp": Values(torch.tensor(2.0 + index), torch.tensor(50.0), 9)} for index in range(4)]
    result = analysis_results.Result("label", "name", "weights", 1, 32, list("abcd"), layers)
    low, high = analysis_figures.features.draw_ratios([result]).axes[2].get_ylim()
    assert 0.01 < low < 2 and 50 < high < 500


@pytest.mark.parametrize("text", ["a $5^$", "$x$", "one $", r"a \$b$", "$" * 50])
def test_a_name_with_dollar_signs_is_no_formula(text: str) -> None:
    layers = [{"hc_dc_mlp": Values(torch.tensor(2.0), torch.tensor(1.0), 9)}] * 2
    result = analysis_results.Result(text, "name", "weights", 1, 32, list("ab"), layers)
    figure = analysis_figures.features.draw_overview([result])
    analysis_figures.panel_title(figure.axes[0], text)
    analysis_figures.figure_title(figure, text)
    figure.savefig(io.BytesIO())  # a formula that cannot be read is an error of this line
    drawn = figure.findobj(lambda artist: isinstance(artist, Text) and "$" in artist.get_text())
    assert len(drawn) == 3 and all(not item._preprocess_math(item.get_text())[1] for item in drawn)


def test_folded_lines_hold_the_whole_name_within_the_width() -> None:
    name = "vit_base_patch16_clip_quickgelu_224"
    lines = analysis_figures.fold(name, inches=1.3, fontsize=9).splitlines()
    assert lines == ["vit_base_", "patch16_clip_", "quickgelu_224"]
    assert "".join(analysis_figures.fold("x" * 40, inches=1.0).splitlines()) == "x" * 40
    assert analysis_figures.fold("plain", inches=4.0) == "plain" and analysis_figures.fold("", inches=1.0) == ""


def texts_outside(figure: Figure) -> list[str]:
    """Titles, axis labels and legends that the figure cuts, once it is drawn."""
    figure.savefig(io.BytesIO(), dpi=figure.dpi)
    names = [text for ax in figure.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label) if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in names]
    boxes += [("legend", legend.get_window_extent()) for legend in figure.legends]
    edge = figure.bbox.padded(1)
    return [name for name, box in boxes if box.x0 < edge.x0 or box.x1 > edge.x1 or box.y0 < edge.y0 or box.y1 > edge.y1]


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_quickgelu_224", "a run with a long name, " * 3, "x" * 120])
def test_long_names_are_not_cut(name: str) -> None:
    layers = [{"hc_dc_mlp": Values(torch.tensor(2.0), torch.tensor(1.0), 9)}] * 2
    results = [
        analysis_results.Result(f"{index} {name}", "name", "weights", 1, 32, list("ab"), layers) for index in range(4)
    ]
    for draw in (analysis_figures.features.draw_overview, analysis_figures.features.draw_similarity):
        figure = draw(results)
        shown = "".join(text.get_text() for text in figure.legends[0].get_texts()).replace("\n", "")
        assert shown.replace(" ", "") == "".join(result.label for result in results).replace(" ", "")
        assert not texts_outside(figure)
    maps = [
        LayerMaps(f"{index} {name}", torch.zeros(8, 8, 3), {f"blocks.{i}": torch.rand(2, 2) for i in range(3)})
        for index in range(2)
    ]
    figure = draw_layer_maps(maps, "token norm / median norm of the patches")
    assert not texts_outside(figure)
    bars = [ax.yaxis.label.get_window_extent() for ax in figure.axes if ax.get_ylabel()]
    assert len(bars) == 2 and bars[1].y1 < bars[0].y0
