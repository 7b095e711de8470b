"""Groups of quantities: chosen by name, each with its figures."""

import re
from pathlib import Path

import architectures
import pytest
import torch
from subjects import subject_of

from oversmoothing.analysis import analyze, figures
from oversmoothing.analysis.measurement import measure
from oversmoothing.analysis.quantities import DEFAULT, GROUPS, QUANTITIES, choose
from oversmoothing.analysis.subject import subject_of as subject_of_model


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


FAMILIES = {  # what is left out of a family, and only that
    "beit": set(),
    "hf_dinov2_registers": set(),
    "siglip": {"sink_first", "sink_first_value", "prefix_norm"},
    "volo": {"sink_first", "sink_first_value", "prefix_norm"},
    "swinv2": {"sink_first", "sink_first_value", "prefix_norm", "rollout_entropy", "rollout_high_frequency_response"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_group_on_families_of_models(name: str) -> None:
    is_theirs = name in architectures.TRANSFORMERS
    model = (architectures.build_transformers if is_theirs else architectures.build)(name)
    (result,) = measure([subject_of_model(model, name, 32)], [[architectures.images(name)]], quantities=["all"])
    measured = {quantity for layer in result.layers for quantity in layer}
    assert set(QUANTITIES) - measured == FAMILIES[name] | {"layer_similarity"} - measured
    for layer in result.layers:
        assert all(values.mean.isfinite().all() for values in layer.values())
    missing = FAMILIES[name] - {"prefix_norm"}  # a model without prefix tokens has nothing to leave out
    assert {group for group in GROUPS if set(GROUPS[group].quantities) & missing} == set(result.left_out)


def test_a_model_of_which_a_group_can_tell_nothing_gets_a_page_that_says_why(tmp_path: Path) -> None:
    analysis = analyze(architectures.build("swin"), [architectures.images("swin")], tmp_path, quantities=["rollout"])
    assert "its attention is in windows" in analysis.report.read_text(encoding="utf-8")
    assert (tmp_path / "analysis.csv").read_text() == ""


def test_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no models to analyse"):
        analyze({}, [torch.zeros(1, 3, 32, 32)], tmp_path)


def test_the_page_explains_every_quantity_and_group() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "analysis.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {*QUANTITIES, *GROUPS} <= explained
