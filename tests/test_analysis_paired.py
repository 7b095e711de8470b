"""Differences between models, paired by image: closed forms, and the sentences that are made of them."""

import re
from dataclasses import replace

import pytest
import torch
from scipy import stats
from subjects import subject_of
from torch import Tensor

from oversmoothing import add_remedy, set_fused
from oversmoothing.analysis.figures.differences import difference_pictures
from oversmoothing.analysis.measurement import measure
from oversmoothing.analysis.paired import Differences, PairedDifferences
from oversmoothing.analysis.report import comparison

IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differences(ours: list[Tensor], theirs: list[Tensor], arriving: int = 8) -> Differences:
    """Of one quantity, a tensor (images,) a layer."""
    pairs = PairedDifferences()
    for start in range(0, len(ours[0]), arriving):
        rows = slice(start, start + arriving)
        batch = [[{"token_similarity": x[rows]} for x in layers] for layers in (ours, theirs)]
        pairs.update(*batch, len(ours[0][rows]))
    return pairs.result("attnscale", "plain", [f"blocks.{index}" for index in range(len(ours))])


def test_means_and_intervals_are_those_of_a_paired_t_test() -> None:
    theirs = [draw(30, seed=layer) for layer in range(3)]
    ours = [x + 0.2 * layer + 0.3 * draw(30, seed=10 + layer) for layer, x in enumerate(theirs)]
    found = differences(ours, theirs)
    assert found.count == 30
    for layer, difference in found.quantities["token_similarity"].items():
        test = stats.ttest_rel(ours[layer], theirs[layer])
        low, high = test.confidence_interval(1 - 0.05 / 3)  # three layers
        assert (difference.low, difference.high) == pytest.approx((low, high))
        assert difference.p == pytest.approx(min(1, 3 * test.pvalue))
        assert difference.mean == pytest.approx((ours[layer] - theirs[layer]).mean().item())
        assert difference.std == pytest.approx((ours[layer] - theirs[layer]).std().item())
        assert difference.found == (difference.p < 0.05)


def test_the_sentence_names_the_layer_the_size_and_the_interval() -> None:
    theirs = [draw(400, seed=layer) for layer in range(12)]
    ours = [x + 0.01 * draw(400, seed=20 + layer) for layer, x in enumerate(theirs)]
    ours[9] = ours[9] - 0.12
    ours[4] = ours[4] + 0.05
    (sentence,) = differences(ours, theirs).sentences()
    pattern = (
        r"In layer 9 \(of 0 to 11\) the token similarity of attnscale is 0\.1[12]\d? lower than plain's \(95% interval "
        r"0\.11\d to 0\.12\d, over 400 images, corrected for 12 layers\); it differs in 2 of 12 layers, and most in "
        r"this one\."
    )
    assert re.fullmatch(pattern, sentence), sentence


def test_where_nothing_differs_the_sentence_says_so() -> None:
    theirs = [draw(40, seed=layer) for layer in range(6)]
    ours = [x + draw(40, seed=20 + layer) for layer, x in enumerate(theirs)]
    (sentence,) = differences(ours, theirs).sentences()
    assert "does not differ detectably in any layer; the largest difference, in layer" in sentence
    assert re.search(r"is [+-]0\.\d+ \(95% interval -0\.\d+ to \+0\.\d+, over 40 images", sentence), sentence
    (same,) = differences(theirs, theirs).sentences()
    assert same == "The token similarity of attnscale is the same as plain's in every layer, on each of 40 images."


def test_of_a_hundred_comparisons_of_equal_models_about_five_find_a_layer() -> None:
    found = 0
    for number in range(100):
        theirs = [draw(40, seed=1000 * number + layer) for layer in range(12)]
        ours = [x + draw(40, seed=1000 * number + 50 + layer) for layer, x in enumerate(theirs)]
        layers = differences(ours, theirs, arriving=40).quantities["token_similarity"].values()
        found += any(difference.found for difference in layers)
    assert found <= 12  # 13 or more of 100 at 5% have a probability of 0.2%; without the correction 46 are expected


def test_a_ratio_that_is_not_finite_leaves_its_layer_out() -> None:
    theirs = [draw(20, seed=layer) for layer in range(3)]
    ours = [x + draw(20, seed=9) for x in theirs]
    ours[1] = ours[1].clone()
    ours[1][5] = torch.inf
    assert list(differences(ours, theirs).quantities["token_similarity"]) == [0, 2]
    with pytest.raises(ValueError, match="two images or more, got 1"):
        differences([theirs[0][:1]], [theirs[0][:1]])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_models_are_compared_image_by_image(name: str) -> None:
    kwargs = dict(depths=(1, 2), num_heads=(3, 3), window_size=4, depth=None) if "swin" in name else {}
    first, second, third = (subject_of(name, **kwargs) for _ in range(3))
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    set_fused(add_remedy(third.model, "attnscale"), False)  # the identity, by other operations
    subjects = [first, replace(second, label="other"), replace(third, label="same")]
    none, other, same = measure(subjects, [[IMAGES[:7]] * 3, [IMAGES[7:]] * 3])
    assert none.differences is None and other.differences.count == 12
    for quantity, layers in other.differences.quantities.items():
        assert quantity not in ("spectrum", "delta_log_amplitude", "singular_values")
        for layer, difference in layers.items():
            means = [result.layers[layer][quantity].mean.mean().item() for result in (other, none)]
            assert difference.mean == pytest.approx(means[0] - means[1], rel=1e-4, abs=1e-6)
            assert difference.low < difference.mean < difference.high or difference.std == 0
    assert len(other.differences.quantities["token_similarity"]) == 3
    assert len(other.differences.quantities["attention_entropy"]) == 3  # heads, on Swin windows too
    assert all("in every layer, on each of 12 images" in sentence for sentence in same.differences.sentences())


def test_the_page_says_what_differs_and_that_it_is_about_images() -> None:
    name = "vit_tiny_patch16_224"
    subjects = [subject_of(name), subject_of("deit_small_12"), subject_of(name, depth=4)]
    subjects = [replace(subject, label=label) for subject, label in zip(subjects, ("one", "two", "deep"), strict=True)]
    results = measure(subjects, [[IMAGES[:4]] * 3], quantities=["features"])
    (text,) = comparison(results)
    for part in ("What differs", "of two", "scripts/compare.py trains several seeds"):
        assert part in text
    assert "deep has 4 layers and one 3: they are not compared layer by layer." in text
    assert comparison(results[:1]) == []
    (picture,) = difference_pictures(results)
    assert picture.file == "differences.png" and len(picture.figure.axes) == 3
    assert all(ax.get_ylabel() and ax.get_title() for ax in picture.figure.axes)
    assert all(2 < ax.get_xlim()[1] < 3 for ax in picture.figure.axes)  # as deep as what is compared
    assert not difference_pictures(results[:1])
