"""Batches in memory that is used again: what arrives, when memory may be written again, and when it may not."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, default_collate

from readers.archives import DataError
from readers.loader import build_loader
from readers.slots import SLOTS, BatchMemory

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux"),
]
IMAGES, SIZE, BATCH = 30, 40, 4


class Numbered(Dataset):
    """Image i is full of i; its target is i, or with ReaL labels a row."""

    def __init__(self, dtype: torch.dtype = torch.uint8, *, rows: bool = False, images: int = IMAGES) -> None:
        self.dtype, self.rows, self.images = dtype, rows, images

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | int]:
        image = torch.full((SIZE, SIZE, 3), index, dtype=self.dtype)
        return image, torch.tensor([index, -1]) if self.rows else index

    def __len__(self) -> int:
        return self.images


def loader_of(dataset: Numbered, workers: int = 2, image_bytes: int = 3 * SIZE**2) -> DataLoader:
    loading = dict(batch_size=BATCH, num_workers=workers, pin_memory=False, drop_last=False)
    return build_loader(dataset, SequentialSampler(dataset), **loading, image_bytes=image_bytes)


def memory_of(loader: DataLoader) -> BatchMemory:
    return loader.collate_fn.__self__


def in_slots(loader: DataLoader, images: Tensor) -> bool:
    """Whether a batch lies in the loader's memory."""
    memory = memory_of(loader)
    starts = [torch.frombuffer(pixels, dtype=torch.uint8).data_ptr() for pixels in memory.pixels]
    return any(start <= images.data_ptr() < start + SLOTS * memory.slot_bytes for start in starts)


def expected(dataset: Numbered) -> Iterator[list[Tensor]]:
    for start in range(0, len(dataset), BATCH):
        yield default_collate([dataset[i] for i in range(start, min(start + BATCH, len(dataset)))])


def assert_expected(batches: list[list[Tensor]], dataset: Numbered) -> None:
    for (images, targets), (want_images, want_targets) in zip(batches, expected(dataset), strict=True):
        assert torch.equal(images, want_images) and images.dtype == want_images.dtype
        assert torch.equal(targets, want_targets) and targets.dtype == want_targets.dtype


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("rows", [False, True], ids=["labels", "rows"])
def test_batches_are_those_of_torchs_own_exchange(workers: int, rows: bool) -> None:
    dataset = Numbered(rows=rows)
    loader = loader_of(dataset, workers)
    for _ in range(3):
        assert_expected([[images.clone(), targets] for images, targets in loader], dataset)


def test_batches_that_are_let_go_share_a_few_slots() -> None:
    loader = loader_of(Numbered(images=100), workers=1)
    places = set()
    for _ in range(2):
        for images, _ in loader:
            assert in_slots(loader, images)
            places.add(images.data_ptr())
    assert len(places) <= SLOTS


@pytest.mark.parametrize("part", [lambda images: images, lambda images: images[-1, :2]], ids=["batch", "view"])
def test_what_somebody_keeps_is_never_written_again(part: Callable[[Tensor], Tensor]) -> None:
    """Nobody has to copy: once the slots are all taken, batches come in new memory."""
    dataset = Numbered(images=100)
    loader = loader_of(dataset)
    kept = [part(images) for _ in range(2) for images, _ in loader]
    wanted = [part(images) for images, _ in expected(dataset)] * 2
    assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))
    assert memory_of(loader).taken.all()
    del kept
    assert not memory_of(loader).taken.any()
    assert in_slots(loader, next(iter(loader))[0])


def test_batches_survive_their_loader() -> None:
    dataset = Numbered()
    loader = loader_of(dataset)
    batches = list(loader)
    del loader
    assert_expected(batches, dataset)


def test_an_epoch_that_is_left_early_keeps_no_slot() -> None:
    dataset = Numbered()
    loader = loader_of(dataset)
    for _ in range(5):
        next(iter(loader))
    assert_expected([[images.clone(), targets] for images, targets in loader], dataset)
    assert not memory_of(loader).taken.any()


class Sometimes(Numbered):
    """One image cannot be read for as long as a file is there."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | int]:
        if index == 9 and self.file.exists():
            raise DataError("cannot read image 9")
        return super().__getitem__(index)


def test_an_epoch_after_a_workers_error_loads(tmp_path: Path) -> None:
    file = tmp_path / "damaged"
    file.touch()
    dataset = Sometimes(file)
    loader = loader_of(dataset)
    for _ in range(3):
        with pytest.raises(DataError, match="cannot read image 9"):
            list(loader)
    file.unlink()
    assert_expected([[images.clone(), targets] for images, targets in loader], dataset)
    assert not memory_of(loader).taken.any()


@pytest.mark.parametrize(
    ("dtype", "image_bytes"), [(torch.float32, 12 * SIZE**2), (torch.uint8, 1)], ids=["floats", "larger"]
)
def test_other_batches_come_in_new_memory(dtype: torch.dtype, image_bytes: int) -> None:
    dataset = Numbered(dtype)
    loader = loader_of(dataset, image_bytes=image_bytes)
    batches = list(loader)
    assert_expected(batches, dataset)
    assert not any(in_slots(loader, images) for images, _ in batches)


def test_a_forked_process_frees_no_slot_of_the_main_process() -> None:
    loader = loader_of(Numbered(images=BATCH), workers=1)
    images, _ = next(iter(loader))
    child = os.fork()
    if child == 0:
        del images
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert memory_of(loader).taken.sum() == 1
    del images
    assert memory_of(loader).taken.sum() == 0


def test_memory_that_nobody_has_is_refused_with_the_flags_to_change() -> None:
    with pytest.raises(DataError, match="--num_workers 3: no memory for 4 batches .* lower --num_workers or --batch"):
        BatchMemory(3, 2**58)


SMALL_SHM = """
import torch
from torch.utils.data import Dataset, SequentialSampler
from readers.loader import build_loader

class Large(Dataset):
    def __getitem__(self, index):
        return torch.full((224, 224, 3), index, dtype=torch.uint8), index

    def __len__(self):
        return 96

dataset = Large()
loading = dict(batch_size=32, num_workers=2, pin_memory=False, drop_last=True, image_bytes=3 * 224**2)
loader = build_loader(dataset, SequentialSampler(dataset), **loading)
assert sum(images.float().mean((1, 2, 3)).sum().item() for images, _ in loader) == sum(range(96))
print("loaded")
"""


def test_no_shared_memory_of_the_container_is_needed() -> None:
    """Docker's default is 64 MB in /dev/shm; here are 2, of which one batch would take 4.8."""
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no right to mount a small /dev/shm")
    words = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", SMALL_SHM]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "loaded", done.stderr
