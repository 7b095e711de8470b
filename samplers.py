"""Which image comes at which position of an epoch, and the seed that position has.

Training samplers yield ``(index, sample_seed)``: the random draws of a sample belong to its position in the epoch, not
to the worker that happens to load it, so neither the number of workers nor a restart changes them.
"""

from collections.abc import Iterator, Sequence, Sized

import numpy as np
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler

__all__ = [
    "AddressedSampler",
    "LocalRASampler",
    "OrderedDistributedSampler",
    "RASampler",
    "ShardSampler",
    "build_samplers",
    "sample_seed",
]

# timm's sampler gives the indices of DeiT's RASampler, and a whole epoch instead of none below 256 images.
RASampler = RepeatAugSampler


class LocalRASampler(RASampler):
    """``RASampler`` that deals out images instead of their views: all views of an image go to one rank, in a row.

    That rank decodes the image once. If the batch size is a multiple of the number of views, all ranks together see the
    same images in every step as with ``RASampler``. Arguments as timm's ``RepeatAugSampler``.
    """

    def __iter__(self) -> Iterator[int]:
        once = RASampler(self.dataset, num_replicas=1, rank=0, shuffle=self.shuffle, num_repeats=1, selected_round=0)
        once.set_epoch(self.epoch)
        images = list(once)
        mine = (self.rank + view // self.num_repeats * self.num_replicas for view in range(len(self)))
        return iter([images[place % len(images)] for place in mine])


# For remote shards, in images of one process: how far shuffling may move an image from its place in the shard. With
# readers.loader.LOOK_AHEAD it takes 1.4 GB of the cache at 110 kB an image.
SHUFFLE_WINDOW = 8192


def sample_seed(seed: int, rank: int, epoch: int, position: int) -> int:
    """Seed of one sample's random draws.

    Args:
        seed: Seed of the run, not negative.
        rank: Rank of the process, not negative.
        epoch: Epoch, counted from 0.
        position: Position of the sample among this rank's samples of the epoch, counted from 0.

    Returns:
        An integer in [0, 2**32), the range that ``numpy.random.seed`` takes.
    """
    return int(np.random.SeedSequence((seed, rank, epoch, position)).generate_state(1, np.uint32)[0])


class AddressedSampler(Sampler[tuple[int, int]]):
    """Pairs every index of a sampler with the seed of its position, and can begin inside an epoch.

    Args:
        sampler: Sampler of one rank's indices, with ``set_epoch`` where its order changes from epoch to epoch.
        seed: Seed of the run.
        rank: Rank of this process.

    Raises:
        ValueError: If ``seed`` or ``rank`` is negative.
    """

    def __init__(self, sampler: Sampler[int], *, seed: int, rank: int) -> None:
        if seed < 0 or rank < 0:
            raise ValueError(f"seed and rank must not be negative, got --seed {seed} and rank {rank}")
        self.sampler = sampler
        self.seed = seed
        self.rank = rank
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Selects the epoch to iterate.

        Args:
            epoch: Epoch, counted from 0.
            start: Number of this rank's samples that are already done and are left out.

        Raises:
            ValueError: If ``epoch`` is negative or ``start`` lies outside the epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        if not 0 <= start <= len(self.sampler):
            raise ValueError(f"start must lie within the {len(self.sampler)} samples of an epoch, got {start}")
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        self.epoch = epoch
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(self.sampler):
            if position >= self.start:
                yield index, sample_seed(self.seed, self.rank, self.epoch, position)

    def __len__(self) -> int:
        return len(self.sampler) - self.start


class ShardSampler(Sampler[int]):
    """One rank's images of an epoch, shard after shard, so that each shard is fetched once and by few ranks.

    The shards of an epoch come in a random order, which is the same on all ranks and cut into equal parts, one for each
    rank. Within its part an image comes up to ``window`` places later than in its shard.

    Args:
        lengths: Images of each shard.
        num_samples: Images of each rank in an epoch. If all ranks' together are not all images, some are left out
            (another set each epoch) or come twice.
        rank: Rank of this process.
        seed: Seed of the order; the same on all ranks. None: images in their own order, for evaluation.
        repeats: How often an image comes in a row, on the same rank.
        window: Largest shift of the shuffling, in images.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        num_samples: int,
        rank: int,
        seed: int | None = None,
        repeats: int = 1,
        window: int = SHUFFLE_WINDOW,
    ) -> None:
        self.lengths = np.array(lengths)
        self.num_samples, self.rank, self.seed, self.repeats, self.window = num_samples, rank, seed, repeats, window
        self.different = -(-num_samples // repeats)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch to iterate."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        images = np.split(np.arange(self.lengths.sum()), self.lengths.cumsum()[:-1])
        mine = np.arange(self.rank * self.different, (self.rank + 1) * self.different) % self.lengths.sum()
        if self.seed is None:
            return iter(mine.tolist())
        # Not Generator: the numbers of RandomState are the same in every version of numpy.
        rng = np.random.RandomState(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint32)[0])
        mine = np.concatenate([images[shard] for shard in rng.permutation(len(images))])[mine]
        mine = mine[np.argsort(np.arange(len(mine)) + rng.uniform(0, self.window, len(mine)), kind="stable")]
        return iter(mine.repeat(self.repeats)[: self.num_samples].tolist())

    def __len__(self) -> int:
        return self.num_samples

    @property
    def num_valid_samples(self) -> int:
        """For evaluation: how many of this rank's first samples are not padding."""
        return int(np.clip(self.lengths.sum() - self.rank * self.num_samples, 0, self.num_samples))


def build_samplers(
    dataset_train: Sized | None,
    dataset_val: Sized,
    *,
    world_size: int,
    rank: int,
    repeated_aug: bool,
    seed: int,
    shard_eval: bool = True,
    repeats_on_one_rank: bool = False,
) -> tuple[AddressedSampler | None, OrderedDistributedSampler | ShardSampler]:
    """Samplers of one rank. No process group is needed.

    Remote shards (a data set with ``remote``) get a :class:`ShardSampler` with the same number of samples.

    Args:
        dataset_train: Training images; None for evaluation only.
        dataset_val: Evaluation images.
        world_size: Number of processes.
        rank: Rank of this process.
        repeated_aug: Whether an image comes three times in a row (Hoffer et al., "Augment your batch", CVPR 2020); an
            epoch then shows about a third of the images. Otherwise every image comes once.
        seed: Seed of the samples' random draws. The order of the images depends on the epoch alone, as in DeiT: it has
            to be the same on all ranks. For remote shards it depends on the seed too.
        shard_eval: Whether the ranks share the evaluation images; otherwise each evaluates all of them.
        repeats_on_one_rank: With ``repeated_aug``: see :class:`LocalRASampler`. Remote shards are always read so.

    Returns:
        The training sampler (None without training images), and the evaluation sampler. The latter pads the ranks to
        the same length; its ``num_valid_samples`` is how many of its first samples are not padding.

    Raises:
        ValueError: If ``seed`` is negative or ``rank`` is not within ``world_size``.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
    eval_replicas, eval_rank = (world_size, rank) if shard_eval else (1, 0)
    val_sampler = OrderedDistributedSampler(dataset_val, num_replicas=eval_replicas, rank=eval_rank)
    if remote := getattr(dataset_val, "remote", None):
        val_sampler = ShardSampler(remote.shards.lengths, num_samples=len(val_sampler), rank=eval_rank)
    if dataset_train is None:
        return None, val_sampler
    repeating = LocalRASampler if repeats_on_one_rank else RASampler
    sampler_class = repeating if repeated_aug else DistributedSampler
    train_sampler = sampler_class(dataset_train, num_replicas=world_size, rank=rank, shuffle=True)
    if remote := getattr(dataset_train, "remote", None):
        repeats = getattr(train_sampler, "num_repeats", 1)
        train_sampler = ShardSampler(
            remote.shards.lengths, num_samples=len(train_sampler), rank=rank, seed=seed, repeats=repeats
        )
    return AddressedSampler(train_sampler, seed=seed, rank=rank), val_sampler
