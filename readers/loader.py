"""From a data set to batches: samples that draw by their own seeds, workers that leave signals to the main process.

Workers are forked: they share the data set's memory with the main process and start in milliseconds (measured with
100,000 files and 10 workers: 0.6 s and 0.55 GB in all, against 2 s, 1.2 GB and 7 s of imports by a fork server). A fork
copies the locks that other threads hold at that moment, and the ends of their pipes; the copies are never released. So
``start_workers`` starts workers before the main process has any thread that enters Python: before the process group,
the writers of logs and the threads that fetch shards.
"""

import atexit
import errno
import os
import pickle
import random
import resource
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from .archives import DataError
from .shards import FetchAhead, RemoteMembers
from .slots import BatchMemory

LOOK_AHEAD = 4096  # images: how early a remote shard is requested before its image is needed
FILES_OF_A_WORKER, OTHER_FILES = 8, 64  # open in the main process: pipes and batches of a worker; everything else
_workers: WeakKeyDictionary[DataLoader, list] = WeakKeyDictionary()  # of the loaders that are running


class AddressedDataset(Dataset):
    """Takes the keys of ``AddressedSampler``: a sample's random draws follow from its key.

    Python's, numpy's and torch's CPU generator are seeded for the sample (timm's augmentations use all three). Loading
    in the main process leaves their state alone.

    Args:
        dataset: Data set with integer indices.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        if not isinstance(key, tuple):
            return self.dataset[key]
        index, sample_seed = key
        with seeded(sample_seed):
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the three CPU generators within the context; those of the accelerators are left alone."""
    in_main = get_worker_info() is None  # workers draw nothing else, so they save the 0.1 ms of restoring
    states = (random.getstate(), np.random.get_state(), torch.default_generator.get_state()) if in_main else ()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if in_main:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.default_generator.set_state(states[2])


def build_loader(
    dataset: Dataset,
    sampler: Sampler,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    drop_last: bool,
    image_bytes: int = 0,
) -> DataLoader:
    """Loader of batches (images of shape (B, 3, H, W), labels of shape (B,)).

    Args:
        dataset: Data set with integer indices.
        sampler: ``samplers.AddressedSampler`` for training, whose ``set_epoch`` is to be called before each epoch; for
            evaluation any sampler of integers.
        batch_size: Images a batch of this process.
        num_workers: Worker processes, kept from epoch to epoch; 0 loads in the main process.
        pin_memory: Whether batches are copied to page-locked memory, for faster transfers to a GPU.
        drop_last: Whether an incomplete last batch is left out.
        image_bytes: Size of an image of uint8, where all have the same: batches then travel in memory that is used
            again (``slots.py``; on Linux, from worker processes). 0: each in new shared memory.

    Raises:
        DataError: If ``drop_last`` leaves no batch at all.
    """
    epoch_size = len(getattr(sampler, "sampler", sampler))  # of a whole epoch, wherever an AddressedSampler begins
    if drop_last and epoch_size < batch_size:
        raise DataError(
            f"--batch-size {batch_size} is larger than the {epoch_size} training samples "
            f"this process has in an epoch: use --batch-size {max(epoch_size, 1)} or less"
        )
    if remote := getattr(dataset, "remote", None):
        sampler = _Fetching(sampler, remote)
    forked = num_workers > 0 and sys.platform == "linux"
    reuse = forked and image_bytes > 0
    return DataLoader(
        AddressedDataset(dataset),
        batch_size=batch_size,
        sampler=_Pausable(sampler),
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
        # Every batch waiting takes memory: 39 MB for 256 images of 224 pixels, four times as much if they are floats.
        prefetch_factor=2 if num_workers > 0 else None,
        worker_init_fn=_leave_signals_to_main,
        multiprocessing_context="fork" if forked else None,  # Python 3.14 has another default
        collate_fn=BatchMemory(num_workers, batch_size * image_bytes).collate if reuse else None,
    )


class _Pausable(Sampler):
    """A sampler that yields nothing while it is paused, and otherwise passes on the wrapped one."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.paused = False

    def __iter__(self) -> Iterator[Any]:
        return iter(()) if self.paused else iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:  # set_epoch, num_valid_samples: as the sampler has them
        return getattr(self.sampler, name)


class _Fetching(Sampler):
    """Passes on the keys of a sampler while threads fetch the shards of the next ones.

    Args:
        sampler: Yields indices, or tuples that begin with one.
        remote: The shards.
    """

    def __init__(self, sampler: Sampler, remote: RemoteMembers) -> None:
        self.sampler = sampler
        self.remote = remote

    def __iter__(self) -> Iterator[Any]:
        with FetchAhead(self.remote) as shards:
            waiting = deque()
            for key in self.sampler:
                shards.ask(key[0] if isinstance(key, tuple) else key)
                waiting.append(key)
                if len(waiting) > LOOK_AHEAD:
                    yield waiting.popleft()
            yield from waiting

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:  # set_epoch, num_valid_samples: as the sampler has them
        return getattr(self.sampler, name)


def start_workers(loader: DataLoader) -> None:
    """Forks the workers of a loader from :func:`build_loader` now, without work; they get it with the first epoch.

    Raises:
        DataError: If this process may not open enough files.
    """
    if loader.num_workers == 0:
        return
    running = sum(map(len, _workers.values()))
    _allow_open_files(OTHER_FILES + FILES_OF_A_WORKER * (running + loader.num_workers), loader.num_workers)
    loader.sampler.paused = True
    try:
        iterator = iter(loader)  # the loader keeps it: its workers are persistent
    finally:
        loader.sampler.paused = False
    _workers[loader] = iterator._workers
    if iterator._pin_memory:
        # If the loader is alive when the process ends (an error's traceback may hold it), torch 2.11 waits five seconds
        # for each worker before it tells it to end. What was registered last is called first.
        atexit.register(_shut_down, weakref.WeakMethod(iterator._shutdown_workers))


def _shut_down(workers: weakref.WeakMethod) -> None:
    if (shut_down := workers()) is not None:
        shut_down()


def _allow_open_files(number: int, workers: int) -> None:
    """Raises the limit of open files to ``number``, as far as the system lets this user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        raise DataError(
            f"--num_workers {workers}: about {number} open files are needed, the limit is {hard}: raise it "
            "(ulimit -n 4096), or lower --num_workers"
        )
    if soft != resource.RLIM_INFINITY and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


def _leave_signals_to_main(worker_id: int) -> None:
    """Lets only the main process end this worker.

    Ctrl-C reaches the whole process group, and so does the SIGTERM of torchrun, Slurm and clouds. The main process
    still needs batches until it has saved, and would take a worker's death for an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.excepthook = _report_unless_main_has_left
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_main_asks, args=(os.getppid(),), daemon=True).start()


def _report_unless_main_has_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A worker's ``sys.excepthook``; silent if the error only means that the main process left during a hand-over.

    Python hands the file descriptor of new shared memory over a socket, in a thread of the worker
    (``multiprocessing.resource_sharer``) that reports a closed socket here. The main process reports why it left.
    """
    in_thread = threading.current_thread() is not threading.main_thread()
    if not (in_thread and issubclass(kind, ConnectionError | EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_when_main_asks(main: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)


@contextmanager
def explain_loader_errors() -> Iterator[None]:
    """Around a loop over a loader: says what to do when workers die, or shared memory or open files run out.

    Raises:
        DataError: In place of torch's ``RuntimeError``, or of the pipe's or socket's error if a worker died while it
            handed over a batch.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        try:
            advice = _advice(error)
        except RuntimeError as named:  # meanwhile torch's handler of SIGCHLD says which worker it was
            error, advice = named, _advice(named)
        if advice is None:
            raise
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise DataError(f"loading images failed, {advice}: {reason}") from error


def sentence_of(error: Exception) -> str:
    """The message of an error. From a worker it starts with the worker's traceback; its last line is the sentence."""
    return str(error).rpartition(f"{type(error).__name__}: ")[2].strip()


def _advice(error: Exception) -> str | None:
    # torch reports "exited unexpectedly" and names the signal in the cause.
    text = str(error.__cause__ or error)
    if getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in text:
        return "too many files are open: raise the limit (ulimit -n 4096), or lower --num_workers"
    of_worker = "DataLoader worker" in text
    handed_over = not isinstance(error, RuntimeError) or "Pin memory thread" in text  # which reads from the workers
    full = any(sign in text for sign in ("Bus error", "shared memory", "shm", "No space left on device"))
    if (of_worker and full) or (handed_over and _died() == signal.SIGBUS):
        return (
            "shared memory (/dev/shm) is full: make it bigger (docker run --shm-size=16g), or lower --num_workers "
            "(0 needs none)"
        )
    if of_worker and ("killed by" in text or "exited unexp" in text):
        return "a worker process was killed, often because memory ran out: lower --num_workers"
    if handed_over and _died():
        return "a worker process was killed during a hand-over, often because memory ran out: lower --num_workers"
    return None


def _died() -> int | None:
    """The signal that killed a worker, None if there is none; waits up to a second for one that is just dying."""
    processes = [process for workers in _workers.values() for process in workers]
    ending = wait([process.sentinel for process in processes], timeout=1) if processes else []
    for process in processes:
        if process.sentinel in ending:  # closed a moment before the exit code is there
            process.join(1)
    return next((-process.exitcode for process in processes if (process.exitcode or 0) < 0), None)
