"""What runs of one seed share, whatever the model: initial weights, images, and the draws of a step."""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import tiny_tree
from studies import ARMS, FLAGS, study_of
from timm.layers import DropPath
from torch import Tensor

import build
import models
import oversmoothing
import utils
from datasets import DataOptions
from options import get_args_parser
from scripts.comparison.flags import as_words, merged, parse
from scripts.comparison.pairing import IMAGES, compare_starts

VARIANTS = [
    name for name in models.list_models() if "scale" in name and "_small_12" in name or "_cait_XXS24_224" in name
]
CPU = utils.World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("data"))


def plain_of(name: str) -> str:
    return "cait_XXS24_224" if "cait" in name else "deit_small_12"


def start(name: str, seed: int = 0, **flags: object) -> torch.nn.Module:
    """A model as ``main.py`` builds it."""
    args = parse(as_words(merged(FLAGS, {"model": name}, flags)))
    utils.seed_everything(seed)
    return build.build_model(args, 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_remedy_shifts_no_draw_of_the_other_parameters(name: str) -> None:
    plain, variant = (dict(start(which).named_parameters()) for which in (plain_of(name), name))
    assert plain.keys() < variant.keys()
    for parameter, values in plain.items():
        assert torch.equal(values, variant[parameter]), parameter
    other_seed = dict(start(name, seed=1).named_parameters())
    assert not torch.equal(other_seed["head.weight"], variant["head.weight"])


@pytest.mark.parametrize("remedy", oversmoothing.list_remedies())
def test_neither_does_one_that_is_added_by_name(remedy: str) -> None:
    plain, variant = start("deit_small_12"), start("deit_small_12", remedy=remedy)
    with_remedy = dict(variant.named_parameters())
    for parameter, values in plain.named_parameters():
        assert torch.equal(values, with_remedy[parameter]), parameter


@pytest.mark.parametrize("name", VARIANTS)
def test_drop_path_drops_the_same_branches(name: str) -> None:
    """In training mode, through the paths that training takes."""
    kept = {}
    for which in (plain_of(name), name):
        model = start(which, drop_path=0.5, model_kwargs={"depth": 4}).train()
        masks: list[Tensor] = []

        def note(module: DropPath, args: tuple, output: Tensor, masks: list[Tensor]) -> None:
            masks.append(output.flatten(1).any(dim=1))

        for module in model.modules():
            if isinstance(module, DropPath):
                module.register_forward_hook(partial(note, masks=masks))
        utils.seed_everything(0, 0, 3, 5)
        model(torch.ones(6, 3, 32, 32))
        kept[which] = masks
    first, second = kept.values()
    assert len(first) == len(second) >= 6 and not torch.stack(first).all()
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


def test_arms_get_the_same_images_in_the_same_order_with_the_same_augmentation(data: Path) -> None:
    flags = {**FLAGS, "data-path": str(data), "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "repeated-aug": True}
    batches = {}
    for name in ("deit_small_12", "attnscale_small_12", "featscale_small_12"):
        for seed in (0, 1):
            args = get_args_parser().parse_args([*as_words(merged(flags, {"model": name})), "--seed", str(seed)])
            utils.seed_everything(seed)
            loaders = build.build_loaders(args, build.build_model(args, 3), CPU)
            loaders.train.sampler.set_epoch(2)
            torch.rand(3 * seed)  # what a model has drawn before makes no difference
            images, labels = next(iter(loaders.train))
            utils.seed_everything(seed, 0, 2, 0)
            batches[name, seed] = loaders.prepare(images), labels
    for name in ("attnscale_small_12", "featscale_small_12"):
        for seed in (0, 1):
            for ours, theirs in zip(batches[name, seed], batches["deit_small_12", seed], strict=True):
                assert torch.equal(ours, theirs)
    # Another seed: the same images, augmented otherwise.
    assert torch.equal(batches["deit_small_12", 0][1], batches["deit_small_12", 1][1])
    assert not torch.equal(batches["deit_small_12", 0][0], batches["deit_small_12", 1][0])


def test_every_option_of_a_training_image_is_compared() -> None:
    of_evaluation = {"eval_crop_ratio", "real_labels"}
    of_storage = {"download", "shard_cache", "shard_cache_gb"}
    options = {field.name for field in fields(DataOptions)} - of_evaluation - of_storage
    assert options - IMAGES == {"num_classes"}  # which images there are is the data's business
    assert set(build.ORDER_FLAGS) - IMAGES == {"seed"}  # which a pair has in common


def test_the_page_s_account_of_a_pair_is_measured() -> None:
    arms = ARMS | {
        "wider": {"model": "attnscale_small_12", "model-kwargs": {"embed_dim": 48}},
        "tuned": {"model": "attnscale_small_12", "lr": 1e-3, "batch-size": 8},
    }
    plain, attnscale, wider, tuned = study_of(arms=arms, seeds=1).runs()
    parameters = sum(p.numel() for p in start("deit_small_12").parameters())
    pairing = compare_starts(attnscale, plain, classes=3)
    assert (pairing.equal, pairing.of, pairing.own) == (parameters, parameters, 4)  # two layers of two heads
    assert pairing.same_images and pairing.differing == {}
    assert (
        compare_starts(wider, plain, classes=3).equal < parameters / 10
    )  # the biases that are zero, of no shape that differs
    assert compare_starts(wider, plain, classes=3).differing == {"model_kwargs embed_dim": (48, 32)}
    pairing = compare_starts(tuned, plain, classes=3)
    assert pairing.equal == parameters and not pairing.same_images
    assert pairing.differing == {"batch_size": (8, 4), "lr": (1e-3, 5e-4)}
    assert compare_starts(replace(attnscale, seed=1), plain, classes=3).equal < parameters / 4
