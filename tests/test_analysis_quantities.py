"""Groups of quantities: chosen by name, each with its figures."""

import pytest
import torch
from subjects import subject_of

from oversmoothing.analysis import analyze, figures
from oversmoothing.analysis.measurement import measure
from oversmoothing.analysis.quantities import DEFAULT, GROUPS, QUANTITIES, choose


def test_each_group_measures_what_it_says_and_its_figures_need_no_more() -> None:
    assert list(figures.DRAWINGS) == list(GROUPS) and set(DEFAULT) <= set(GROUPS)
    assert len(QUANTITIES) == sum(len(group.quantities) for group in GROUPS.values())  # no name twice
    for name, drawings in figures.DRAWINGS.items():
        for drawing in drawings:
            assert set(drawing.needs) & set(GROUPS[name].quantities) and set(drawing.needs) <= set(QUANTITIES)


def test_groups_are_chosen_by_name() -> None:
    subject, images = subject_of("vit_tiny_patch16_224"), torch.randn(2, 3, 32, 32)
    (everything,) = measure([subject], [[images]])
    assert set(everything.layers[1]) == {name for group in DEFAULT for name in GROUPS[group].quantities}
    for group in DEFAULT:
        (result,) = measure([subject], [[images]], quantities=[group])
        for layer, both in zip(result.layers, everything.layers, strict=True):
            assert set(layer) == set(both) & set(GROUPS[group].quantities) and result.num_images == 2
            assert all(torch.equal(values.mean, both[name].mean) for name, values in layer.items())
    assert choose("all") == list(GROUPS.values()) and choose(["maps", "maps"]) == [GROUPS["maps"]]


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(ValueError, match="quantities spektrum: choose of features, maps.*, or all"):
        analyze(subject_of("vit_tiny_patch16_224").model, [torch.zeros(1, 3, 32, 32)], quantities=("maps", "spektrum"))
