"""The process group, addressed randomness, the logs and the meters. Knows nothing of models, data or checkpoints."""

import fcntl
import logging
import os
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

import joblib
import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader

_logger = logging.getLogger(__name__)
T = TypeVar("T")


class SetupError(RuntimeError):
    """The machine, not the code or the data, stands in the way: device, port, folder."""


class Preempted(Exception):
    """The run was asked to stop, has saved, and leaves."""


# ---- processes -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class World:
    """This process among its peers, and the device it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1


def resolve_device(name: str) -> str:
    """ "auto" becomes "cuda" where there is one, else "cpu".

    Raises:
        SetupError: If there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise SetupError(f"--device {name!r}: no such device to train on; give auto, cpu, cuda or cuda:<number>")
    backend = getattr(torch, device.type)
    if not (device.type == "cpu" or backend.is_available()):
        raise SetupError(
            f"--device {name}: torch sees no {device.type.upper()} device here; use --device auto or --device cpu"
        )
    number = 1 if device.type == "cpu" else backend.device_count()
    if (device.index or 0) >= number:
        raise SetupError(f"--device {name}: torch sees {number} {device.type} device(s) here, counted from 0")
    return name


def this_process(device: str = "auto") -> World:
    """This process among its peers, as the launcher's environment describes them, before they meet.

    Understands torchrun and torch.distributed.launch (RANK, WORLD_SIZE, LOCAL_RANK) and Slurm's srun (SLURM_PROCID,
    SLURM_NTASKS, SLURM_LOCALID); without either this is a single process.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:<index>" (the index counts for a single process only).

    Raises:
        SetupError: If the device does not exist, or the environment makes no sense.
    """
    rank, local_rank, world_size = _launcher_environment()
    if not (0 <= rank < world_size and local_rank >= 0):
        raise SetupError(
            f"RANK {rank}, LOCAL_RANK {local_rank}, WORLD_SIZE {world_size} (or Slurm's SLURM_PROCID, SLURM_LOCALID, "
            "SLURM_NTASKS): ranks count from 0 to below the world size; let torchrun or srun set them, or unset them"
        )
    device = resolve_device(device)
    if device == "cuda" or (device.startswith("cuda") and world_size > 1):
        device = f"cuda:{_own_gpu(local_rank)}"
    world = World(rank, local_rank, world_size, torch.device(device))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    return world


def _own_gpu(local_rank: int) -> int:
    """The GPU of this process: the one with its local rank, or the only one if Slurm shows each task its own."""
    gpus = torch.cuda.device_count()
    on_node = max(local_rank + 1, _number("LOCAL_WORLD_SIZE", 1))  # torchrun sets it; its processes see the same GPUs
    each_its_own = gpus == 1 and "LOCAL_WORLD_SIZE" not in os.environ
    if on_node > gpus and not each_its_own:
        raise SetupError(
            f"{on_node} processes on this node and {gpus} GPU(s): start no more processes than GPUs "
            f"(--nproc_per_node={gpus}, Slurm's --ntasks-per-node={gpus}), or give CUDA_VISIBLE_DEVICES more"
        )
    return 0 if each_its_own else local_rank


def cores_of_process() -> int:
    """CPU cores for this process: what the system, a container's limit and the launcher leave to it, at least one.

    The processes of a torchrun share the cores of their node equally; Slurm's tasks have ``--cpus-per-task`` each.
    """
    cores = joblib.cpu_count()  # looks at affinity and cgroups
    if "LOCAL_WORLD_SIZE" in os.environ:
        cores //= max(_number("LOCAL_WORLD_SIZE"), 1)
    elif "SLURM_PROCID" in os.environ:
        cores = min(cores, _number("SLURM_CPUS_PER_TASK", cores))
    return max(cores, 1)


def loader_processes(num_workers: int) -> int:
    """``--num_workers``, with -1 for all cores of this process."""
    return cores_of_process() if num_workers == -1 else num_workers


# An error's traceback holds DDP. In torch 2.11, freeing DDP may wait, with Python's lock, for a thread of gloo that
# waits for this lock. The process is about to end without freeing anything (`entry.run`), so the error is kept.
_unfreed: list[BaseException] = []


@contextmanager
def process_group(device: str = "auto", dist_url: str = "env://", timeout_s: int = 600) -> Iterator[World]:
    """Joins the process group of :func:`this_process`, and leaves it at the end. NCCL on CUDA, gloo on CPU.

    From here on torch has threads that enter Python at any time: no process may be forked any more.

    Args:
        device: As in ``this_process``.
        dist_url: Rendezvous of the processes.
        timeout_s: Seconds after which a collective with a silent peer fails.

    Raises:
        SetupError: If the device does not exist, or the processes cannot find each other.
    """
    world = this_process(device)
    if world.distributed:
        _join(world, dist_url, timeout_s)
    try:
        yield world
    except BaseException as error:
        if world.distributed:
            _unfreed.append(error)
        if isinstance(error, Exception) and dist.is_initialized() and dist.get_backend() == "nccl":
            # Destroying NCCL's group waits for its collectives, and so for a process that may be dead. The error is
            # reported first: NCCL's watchdog may end this process at any time.
            first_line = str(error).partition("\n")[0]
            print(f"[rank {world.rank}] {type(error).__name__}: {first_line}", file=sys.stderr, flush=True)
            dist.distributed_c10d._abort_process_group()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _launcher_environment() -> tuple[int, int, int]:
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return _number("RANK"), _number("LOCAL_RANK", 0), _number("WORLD_SIZE")
    if "SLURM_PROCID" in env and _number("SLURM_NTASKS", 1) != 1:
        hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", env.get("SLURM_NODELIST", "localhost")))
        env.setdefault("MASTER_ADDR", first_host(hosts))  # the rendezvous runs there
        env.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID", 0) % 20000))
        return _number("SLURM_PROCID"), _number("SLURM_LOCALID", 0), _number("SLURM_NTASKS")
    return 0, 0, 1


def _number(variable: str, default: int | None = None) -> int:
    text = os.environ.get(variable, default)
    try:
        return int(text)
    except ValueError as error:
        raise SetupError(
            f"{variable}={text} in the environment is no whole number; let torchrun or srun set it, or unset it"
        ) from error


def first_host(hosts: str) -> str:
    """The first host of Slurm's short form: ``node03`` of ``node[03-07,12],node20``, ``r1n4`` of ``r[1-2]n[4,6]``."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", hosts).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def on_rank_zero(world: World, action: Callable[[], T]) -> T | None:
    """Runs ``action`` on rank 0 while the others wait; its errors are raised on all ranks, so that none hangs.

    Returns:
        What ``action`` returned on rank 0, None on the others.
    """
    result = failure = None
    if world.is_main:
        try:
            result = action()
        except Exception as error:  # whatever it is, it is raised again below
            failure = error
    if world.distributed:
        # Not a broadcast, in which rank 0 only sends: in about one of 150 tries, gloo's send to a process that had died
        # while it waited took until the timeout. A receive from it fails at once.
        failures = [None] * world.world_size
        try:
            dist.all_gather_object(failures, failure)
        except Exception as error:  # a process is gone, or the failure cannot be pickled: rank 0 still tells its own
            if failure is not None:
                raise failure from error
            raise
        if failure is None:
            failure = failures[0]
    if failure is not None:
        raise failure
    return result


def check_agreement(world: World, what: str, mine: Any, flags: str = "--output_dir and --resume") -> None:
    """Checks that a value is the same on all ranks, which would otherwise hang or diverge silently.

    Args:
        world: The ranks; a collective.
        what: Name of the value, for the message.
        mine: This rank's value.
        flags: Flags that must give the same on all ranks, for the message.

    Raises:
        SetupError: On all ranks, if they differ.
    """
    values = [mine] * world.world_size
    if world.distributed:
        dist.all_gather_object(values, mine)
    for rank, value in enumerate(values):
        if value != values[0]:
            raise SetupError(
                f"{what} differs between the processes: {values[0]} on rank 0, {value} on rank {rank}; "
                f"{flags} must be on storage that all of them share"
            )


_SIGNS_OF_LOSS = (
    *("Connection closed by", "Connection reset by peer", "Broken pipe", "Timed out waiting", "timed out", "timeout"),
    *("remote process exit", "ncclRemoteError", "communicator was aborted", "timing out"),  # NCCL's
)


def lost_peer(error: RuntimeError) -> str | None:
    """The line in which a failed collective reports a process that died or fell silent; None for other errors."""
    text = str(error)
    lost = isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text or "nccl" in text
    return text.split("\n")[0].strip() if lost and any(sign in text for sign in _SIGNS_OF_LOSS) else None


def _join(world: World, dist_url: str, timeout_s: int) -> None:
    timeout = timedelta(seconds=timeout_s)
    try:
        store = _meet(world, dist_url, timeout)
        # torchrun may keep its store from one restart to the next, with the addresses of dead processes: so every
        # restart gets a prefix. Without a kept store there is none, since the restart counts of the nodes differ once
        # one node's torchrun was replaced.
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else "0"
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        if world.device.type == "cuda":
            _claim_gpu(world, store)
        dist.init_process_group(
            "nccl" if world.device.type == "cuda" else "gloo",
            store=store,
            world_size=world.world_size,
            rank=world.rank,
            timeout=timeout,
            device_id=world.device if world.device.type == "cuda" else None,
        )
    except SetupError:
        raise
    except (RuntimeError, ValueError) as error:  # torch's DistNetworkError and DistStoreError are RuntimeErrors
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        another = "give the launcher another --master_port, or set MASTER_PORT where srun starts the run"
        if "EADDRINUSE" in str(error):
            hint = f"the port is taken: {another}"
        elif "Ping failed" in str(error) or ("no answer" in str(error) and _somebody_listens()):
            hint = f"what listens there does not answer as rank 0 does; if it is another program, {another}"
        else:
            hint = "check that every process was started and can reach that address"
        raise SetupError(
            f"rank {world.rank} of {world.world_size} could not join the process group at {where} "
            f"(--dist_url {dist_url}): {hint}"
        ) from error


def _somebody_listens() -> bool:
    """Whether anything accepts connections at the rendezvous."""
    try:
        with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5):
            return True
    except (OSError, KeyError, ValueError):
        return False


def _claim_gpu(world: World, store: dist.Store) -> None:
    """Refuses a GPU that another process of this run has; NCCL would only say that it failed.

    Raises:
        SetupError: With the other process's rank.
    """
    gpu = str(torch.cuda.get_device_properties(world.device).uuid)
    owner = int(store.compare_set(f"gpu/{platform.node()}/{gpu}", "", str(world.rank)))
    if owner != world.rank:
        raise SetupError(
            f"ranks {owner} and {world.rank} are both on GPU {gpu} of {platform.node()}: start no more processes than "
            "GPUs, or show each task its own (Slurm's --gpus-per-task=1)"
        )


def _meet(world: World, dist_url: str, timeout: timedelta) -> dist.Store:
    """The store of the rendezvous.

    torch waits without limit for an answer from the address, even if another program listens there and never answers.
    So a thread does the waiting, which can be abandoned.

    Raises:
        RuntimeError: If rank 0 cannot be reached within ``timeout``, or something else listens in its place.
    """
    outcome: list[dist.Store | Exception] = []

    def meet() -> None:
        try:
            outcome.append(next(dist.rendezvous(dist_url, world.rank, world.world_size, timeout=timeout))[0])
        except Exception as error:  # whatever it is, it is raised again below
            outcome.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(timeout.total_seconds() + 5)  # torch's own limit, which names the reason, comes first
    if not outcome:
        raise RuntimeError("no answer")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _gloo_group(timeout_s: int) -> dist.ProcessGroup:
    """A gloo group of all ranks, beside that of NCCL.

    Raises:
        SetupError: If gloo finds no network interface over which the nodes reach each other.
    """
    try:
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("connectFullMesh", "Unable to find", "resolve hostname")):
            raise
        first_line = str(error).split("\n")[0].strip()
        raise SetupError(
            "the processes cannot reach each other over gloo, which agrees on stopping: set GLOO_SOCKET_IFNAME to the "
            f"network interface that the nodes share, such as eth0 or ib0 (ip -br addr lists them): {first_line}"
        ) from error


class StopSignal:
    """Lets all ranks stop after the same step when any of them gets SIGTERM or SIGUSR1 (what Slurm and clouds send).

    The ranks agree through one integer, summed over a gloo group of its own: no device is synchronised. The sum of a
    step is read at the next one, so the exchange overlaps with the step's work. A launcher that is gone counts as a
    signal: under torchrun nobody else would ever stop its processes, and a second run may start in the same folder.

    Args:
        world: The processes that agree.
        timeout_s: Seconds after which a silent process is an error.
    """

    def __init__(self, world: World, timeout_s: int = 600) -> None:
        self.received = False
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.group = _gloo_group(timeout_s) if world.distributed else None
        self._pending: tuple[Tensor, dist.Work] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether to stop now; call it once a step on every rank, it answers the same on all of them."""
        if self.launcher not in (None, os.getppid()):
            self.received = True
        if self.group is None:
            return self.received
        stop = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            stop = bool(flag.item())
        flag = torch.tensor([int(self.received)])
        self._pending = flag, dist.all_reduce(flag, group=self.group, async_op=True)
        return stop


# ---- randomness ------------------------------------------------------------------------------------------------------
def seed_everything(*address: int) -> None:
    """Seeds python, numpy and torch from an address such as (seed, rank, epoch, step) alone.

    Args:
        *address: Non-negative integers. Equal addresses give equal draws, however the run got there.
    """
    # The spawn key keeps a step's draws apart from those of the sample with the same address (samplers.sample_seed).
    state = np.random.SeedSequence(address, spawn_key=(1,)).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(state[1])
    torch.manual_seed(int(state[2]))


# ---- meters ----------------------------------------------------------------------------------------------------------
class WatchedLoader:
    """A loader that adds up the seconds this process waits for its batches, over one pass.

    A GPU may work on queued kernels meanwhile, so the sum is an upper bound of the time that loading costs.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self.loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield batch


class Meters:
    """Weighted means over an epoch, summed on the device in float64; only reading them waits for the device."""

    def __init__(self, device: torch.device, sums: dict[str, list[float]] | None = None) -> None:
        self._kind = dict(dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self.sums = {name: torch.tensor(value, **self._kind) for name, value in (sums or {}).items()}
        self._last = dict.fromkeys(self.sums, (0.0, 0.0))

    def update(self, n: int, **values: Tensor | float) -> None:
        """Adds ``n`` samples whose mean is ``value`` to each named meter."""
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(2, **self._kind)  # torch.tensor would wait for the device
            total = self.sums[name]
            total[0] += value * n
            total[1] += n

    def state(self) -> dict[str, list[float]]:
        """The sums as plain numbers, exact: what a checkpoint within an epoch needs."""
        return {name: total.tolist() for name, total in self.sums.items()}

    def recent(self) -> dict[str, tuple[float, float]]:
        """Name -> (mean since the last call, mean so far), of this process."""
        means = {}
        for name, (total, count) in self.state().items():
            last_total, last_count = self._last.get(name, (0.0, 0.0))
            means[name] = ((total - last_total) / max(count - last_count, 1e-12), total / max(count, 1e-12))
            self._last[name] = (total, count)
        return means

    def means(self) -> dict[str, float]:
        """Name -> mean so far over all processes; a collective."""
        if not self.sums:
            return {}
        totals = torch.stack(list(self.sums.values()))
        if dist.is_initialized():
            dist.all_reduce(totals)
        return {
            name: total / max(count, 1e-12) for name, (total, count) in zip(self.sums, totals.tolist(), strict=True)
        }


# ---- logs ------------------------------------------------------------------------------------------------------------
def setup_logging(rank: int) -> None:
    """Shows rank 0's log lines on the console as they are; of other ranks only warnings, with their rank."""
    logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stdout)
    if rank == 0:
        handler.setFormatter(_PlainInfo())
    else:
        handler.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s: %(message)s"))
        handler.setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for client in ("httpx", "httpx2"):  # the Hub library's client, by its version: a line for each request
        logging.getLogger(client).setLevel(logging.WARNING)


class _PlainInfo(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"


def describe_environment(world: World) -> str:
    """Versions, revision and device: the first line of a run."""
    if world.device.type == "cuda":
        where = f"{world.world_size} x {torch.cuda.get_device_name(world.device)}"
    else:
        where = f"{world.world_size} process(es) on CPU, {torch.get_num_threads()} thread(s) each"
    return (
        f"python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"timm {timm.__version__}; revision {git_revision()}; {where}"
    )


def git_revision() -> str:
    """Short commit id of this folder, with "+" where files differ from it; "unknown" outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changed.strip() else "")


def make_folder(folder: Path) -> None:
    """Makes ``folder`` and checks that files can be written there.

    Raises:
        SetupError: If not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SetupError(
            f"--output_dir {folder}: nothing can be written there ({error.strerror}); give another folder"
        ) from error


@contextmanager
def claimed_folder(folder: str | None, world: World, timeout_s: float = 60) -> Iterator[None]:
    """Makes ``folder``, checks that files can be written there, and keeps other runs out of it within the context.

    The claim is a POSIX lock: it vanishes with its process, however that ends, and workers do not inherit it. On file
    systems without locks there is no claim.

    Args:
        folder: Where this run writes; None or empty: nowhere.
        world: A collective; rank 0 holds the lock.
        timeout_s: Seconds to wait for a run that is just leaving.

    Raises:
        SetupError: On all ranks, if files cannot be written there or another run goes on writing there.
    """
    if not folder:
        yield
        return
    lock = on_rank_zero(world, lambda: _lock(Path(folder), timeout_s))
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _lock(folder: Path, timeout_s: float) -> IO:
    make_folder(folder)
    file = (folder / ".lock").open("a")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() > deadline:
                raise SetupError(
                    f"--output_dir {folder}: another run is writing there; end that one, or give another folder"
                ) from error
            time.sleep(0.2)
        except OSError:  # no locks on this file system
            return file
