"""Batches in shared memory that worker processes fill again and again.

torch's loader hands a batch over in new shared memory: its pages are first touched, and its descriptors sent, for every
batch. Here the memory is mapped before the workers are forked, and a message only says where in it a batch lies. It is
no part of ``/dev/shm``, which containers often limit to 64 MB. What was written to once is kept while the workers live.
"""

import itertools
import math
import mmap
import os
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from .archives import DataError

# Of each worker: two batches that wait (the loader's prefetch_factor), one that the main process works on, and one that
# it has not let go of yet when it asks for the next.
SLOTS = 4

_memories: "weakref.WeakValueDictionary[int, BatchMemory]" = weakref.WeakValueDictionary()
_keys = itertools.count()


class BatchMemory:
    """Memory of the images of one loader's batches, shared with its forked workers.

    :meth:`collate` is the ``collate_fn`` of that loader alone: the workers of two would write to the same slots. A slot
    is free again once the main process has let go of the batch's storage, views of it included. Whoever keeps batches
    gets the next ones in new shared memory, as from torch's own loader; so does a batch larger than a slot.

    Args:
        workers: Worker processes.
        batch_bytes: Bytes of a batch's images.

    Raises:
        DataError: If the system grants no more memory.
    """

    def __init__(self, workers: int, batch_bytes: int) -> None:
        self.slot_bytes = -(-batch_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self.pixels = [mmap.mmap(-1, SLOTS * self.slot_bytes) for _ in range(workers)]  # taken up when written to
        except OSError as error:
            size = f"{batch_bytes / 2**20:.0f} MB"
            raise DataError(
                f"--num_workers {workers}: no memory for {SLOTS} batches of {size} in each worker ({error.strerror}): "
                "lower --num_workers or --batch-size"
            ) from error
        # A worker marks its slots as taken, the main process marks them as free.
        self.taken = np.frombuffer(mmap.mmap(-1, workers * SLOTS), np.uint8).reshape(workers, SLOTS)
        self.key = next(_keys)
        _memories[self.key] = self

    def collate(self, samples: list[tuple[Tensor, Any]]) -> Any:
        """Makes a batch in a worker.

        Args:
            samples: Images of equal shape, uint8, with their targets: numbers, or tensors of equal shape.

        Returns:
            What arrives in the main process as the list of images (B, ...) and targets (B, ...).
        """
        images, targets = zip(*samples, strict=True)
        shape, worker = (len(images), *images[0].shape), get_worker_info().id
        free = np.flatnonzero(self.taken[worker] == 0)
        if not len(free) or images[0].dtype != torch.uint8 or math.prod(shape) > self.slot_bytes:
            return default_collate(samples)
        slot = int(free[0])
        torch.stack(images, out=torch.from_numpy(self._array(worker, slot, shape)))
        batch = _Filled(self.key, worker, slot, shape, default_collate(targets).numpy())
        self.taken[worker, slot] = 1
        return batch

    def receive(self, worker: int, slot: int, shape: tuple[int, ...]) -> Tensor:
        """The images of a slot that a worker has filled; it stays taken for as long as their storage is in use."""
        array = self._array(worker, slot, shape)
        weakref.finalize(array, self._release, os.getpid(), worker, slot).atexit = False
        return torch.from_numpy(array)

    def _array(self, worker: int, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        flat = np.frombuffer(self.pixels[worker], np.uint8, math.prod(shape), offset=slot * self.slot_bytes)
        return flat.reshape(shape)

    def _release(self, receiver: int, worker: int, slot: int) -> None:
        if os.getpid() == receiver:  # a process that is forked meanwhile has copies of its tensors
            self.taken[worker, slot] = 0


class _Filled:
    """A worker's message: where the images are, and the targets themselves. It is unpickled as the batch."""

    def __init__(self, key: int, worker: int, slot: int, shape: tuple[int, ...], targets: np.ndarray) -> None:
        self.content = key, worker, slot, shape, targets

    def __reduce__(self) -> tuple:
        return _receive, self.content


def _receive(key: int, worker: int, slot: int, shape: tuple[int, ...], targets: np.ndarray) -> list[Tensor]:
    return [_memories[key].receive(worker, slot, shape), torch.from_numpy(targets)]
