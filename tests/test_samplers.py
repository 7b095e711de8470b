"""Order of the images: parity with DeiT's sampler, addressed seeds, exact evaluation."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.task import ClassificationEvaluator
from timm.task.evaluator import evaluation_sample_limit
from torch.utils.data import DataLoader, TensorDataset

from samplers import AddressedSampler, LocalRASampler, RASampler, build_samplers, sample_seed

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "public" / "sampler.json"


def build(size: int = 300, val_size: int = 7, **kwargs: object) -> tuple:
    settings = {"world_size": 1, "rank": 0, "repeated_aug": True, "seed": 0} | kwargs
    return build_samplers(range(size), range(val_size), **settings)


def test_repeated_augmentation_draws_the_indices_of_deit() -> None:
    if not GOLDEN.is_file():
        pytest.skip(f"golden numbers are not here: {GOLDEN}")
    records = [record for record in json.loads(GOLDEN.read_text()) if record["len_dataset"] >= 256]
    assert len(records) >= 10
    for record in records:
        sampler = RASampler(range(record["len_dataset"]), record["replicas"], record["rank"], shuffle=record["shuffle"])
        sampler.set_epoch(record["epoch"])
        indices = list(sampler)
        assert len(sampler) == len(indices) == record["len"] == record["n_indices"]
        assert len(set(indices)) == record["unique"]
        digest = hashlib.sha256(np.asarray(indices, dtype="<i8").tobytes()).hexdigest()
        assert digest == record["sha256_int64_le"]
        if "indices" in record:
            assert indices[: len(record["indices"])] == record["indices"]


@pytest.mark.parametrize("size", [1, 7, 200, 255])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("local", [False, True])
def test_fewer_than_256_images_still_make_an_epoch(size: int, world_size: int, local: bool) -> None:
    for rank in range(world_size):
        sampler, _ = build(size, world_size=world_size, rank=rank, repeats_on_one_rank=local)
        assert len(list(sampler)) == len(sampler) == -(-size // world_size)


@pytest.mark.parametrize("repeated_aug", [True, False])
def test_single_process_has_another_order_each_epoch(repeated_aug: bool) -> None:
    sampler, _ = build(repeated_aug=repeated_aug)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    sampler.set_epoch(1)
    assert list(sampler) == orders[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_comes_once_without_repeated_augmentation(world_size: int) -> None:
    indices = []
    for rank in range(world_size):
        sampler, _ = build(300, world_size=world_size, rank=rank, repeated_aug=False)
        indices += [index for index, _ in sampler]
    assert sorted(indices) == list(range(300))


@pytest.mark.parametrize("size", [48, 255, 700])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_local_repeats_keep_the_images_of_each_step(size: int, world_size: int) -> None:
    def steps(sampler_class: type[RASampler]) -> list[list[int]]:
        ranks = [sampler_class(range(size), world_size, rank) for rank in range(world_size)]
        for sampler in ranks:
            sampler.set_epoch(2)
        orders = [list(sampler) for sampler in ranks]
        assert all(len(order) == len(ranks[0]) for order in orders)
        return [sorted(sum((order[i : i + 6] for order in orders), [])) for i in range(0, len(orders[0]) - 5, 6)]

    assert steps(LocalRASampler) == steps(RASampler) != []


def test_local_repeats_are_in_a_row_on_one_rank() -> None:
    orders = [list(LocalRASampler(range(700), 4, rank)) for rank in range(4)]
    for order in orders:
        views = np.array(order[: len(order) // 3 * 3]).reshape(-1, 3)
        assert (views == views[:, :1]).all() and len(set(views[:, 0])) == len(views)
    assert sum(len(set(order)) for order in orders) == len(set().union(*orders))
    alone, local = RASampler(range(700), 1, 0), LocalRASampler(range(700), 1, 0)
    assert list(alone) == list(local)


@pytest.mark.parametrize("repeated_aug", [True, False])
@pytest.mark.parametrize("start", [0, 1, 130, 256])
def test_resumed_epoch_is_the_tail_of_the_whole_one(repeated_aug: bool, start: int) -> None:
    sampler, _ = build(repeated_aug=repeated_aug)
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.set_epoch(4, start=start)
    assert len(sampler) == len(whole) - start
    assert list(sampler) == whole[start:]
    sampler.set_epoch(5)
    assert len(sampler) == len(whole)


def test_seeds_are_distinct_and_within_32_bit() -> None:
    seeds = {
        sample_seed(seed, rank, epoch, position)
        for seed in range(3)
        for rank in range(3)
        for epoch in range(3)
        for position in range(50)
    }
    assert len(seeds) == 3 * 3 * 3 * 50
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_seeds_never_change_between_versions() -> None:
    # A run that is resumed under a newer numpy must go on as it began.
    assert [sample_seed(0, 0, 0, 0), sample_seed(1, 2, 3, 4)] == [2968811710, 4251844491]


def test_repeats_of_an_image_get_different_seeds() -> None:
    sampler, _ = build()
    keys = list(sampler)
    assert keys[0][0] == keys[1][0]
    assert len({seed for _, seed in keys}) == len(keys)


@pytest.mark.parametrize("name", ["seed", "rank"])
def test_negative_seed_or_rank_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        AddressedSampler(range(3), **({"seed": 0, "rank": 0} | {name: -1}))


@pytest.mark.parametrize("start", [-1, 257])
def test_start_outside_the_epoch_is_refused(start: int) -> None:
    sampler, _ = build()
    with pytest.raises(ValueError, match="within the 256 samples"):
        sampler.set_epoch(0, start=start)


def test_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\)"):
        build(world_size=2, rank=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 3, 7, 31])
def test_evaluation_covers_each_image_exactly_once(world_size: int, size: int) -> None:
    valid, lengths = [], set()
    for rank in range(world_size):
        _, sampler = build(val_size=size, world_size=world_size, rank=rank)
        lengths.add(len(sampler))
        valid += list(sampler)[: sampler.num_valid_samples]
    assert sorted(valid) == list(range(size))
    assert len(lengths) == 1  # equal numbers of batches: collectives in the loop cannot hang


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_sharded_evaluation_gives_the_numbers_of_one_process(world_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(31, 10, generator=generator), torch.randint(10, (31,), generator=generator)
    dataset = TensorDataset(logits, labels)
    loss_sum, counts = 0.0, torch.zeros(3, dtype=torch.int64)
    for rank in range(world_size):
        _, sampler = build_samplers(dataset, dataset, world_size=world_size, rank=rank, repeated_aug=False, seed=0)
        loader = DataLoader(dataset, batch_size=4, sampler=sampler)
        evaluator = ClassificationEvaluator(max_samples=evaluation_sample_limit(loader))
        for batch in loader:
            evaluator.update(*batch)
        loss_sum += evaluator.loss_sum.item()
        counts += evaluator.counts
    assert counts[0] == 31
    assert counts[1] == (logits.argmax(dim=1) == labels).sum()
    assert loss_sum / 31 == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


def test_unsharded_evaluation_gives_every_rank_everything() -> None:
    for rank in range(3):
        _, sampler = build(val_size=7, world_size=3, rank=rank, shard_eval=False)
        assert list(sampler) == list(range(7))
        assert sampler.num_valid_samples == 7
