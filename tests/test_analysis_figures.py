"""The figures: every layer has its panel, every axis its label."""

import torch
from subjects import subject_of

from oversmoothing.analysis import figures as analysis_figures
from oversmoothing.analysis import results as analysis_results
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
