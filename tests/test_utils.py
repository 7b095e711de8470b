"""Process group, addressed seeds, meters, logs, folders."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import torch
import torch.distributed as dist
from runs import ROOT, environment, free_port

import checkpoints
import entry
import utils
from reporting import EpochLog
from utils import Meters, World

ALONE = World(0, 0, 1, torch.device("cpu"))
CPU = torch.device("cpu")


def run_ranks(code: str, processes: int = 2, timeout: float = 90) -> list[str]:
    """Runs a script in processes that form a group as ``world``; returns what each rank printed."""
    head = "import os, signal, sys, time, torch, utils\nfrom datetime import timedelta\n"
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    script = f"{head}with utils.process_group('cpu', timeout_s=30) as world:\n{body}"
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in range(processes)
    ]  # fmt: skip
    outputs = []
    try:
        for process in started:
            outputs.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(outputs)
    return outputs


# ---- the launcher's environment --------------------------------------------------------------------------------------
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [*LAUNCHER_VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that what the code sets is undone too
        monkeypatch.delenv(name)
    return monkeypatch


def test_without_a_launcher_this_is_a_single_process(no_launcher: pytest.MonkeyPatch) -> None:
    with utils.process_group("cpu") as world:
        assert world == World(0, 0, 1, CPU)
        assert world.is_main and not world.distributed


def test_torchrun_s_variables_win_over_slurm_s(no_launcher: pytest.MonkeyPatch) -> None:
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    for name, value in ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8"} | slurm).items():
        no_launcher.setenv(name, value)
    assert entry.launcher_rank() == "3"
    assert utils._launcher_environment() == (3, 1, 8)


def test_srun_gives_rank_and_rendezvous(no_launcher: pytest.MonkeyPatch) -> None:
    slurm = {"PROCID": "5", "NTASKS": "16", "LOCALID": "1", "JOB_ID": "123456", "STEP_NODELIST": "gpu[07-09,12]"}
    for name, value in slurm.items():
        no_launcher.setenv(f"SLURM_{name}", value)
    assert utils._launcher_environment() == (5, 1, 16)
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert 1024 < int(os.environ["MASTER_PORT"]) < 65536


def test_a_batch_script_s_single_task_is_a_single_process(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("SLURM_PROCID", "0")
    no_launcher.setenv("SLURM_NTASKS", "1")
    assert utils._launcher_environment() == (0, 0, 1)


@pytest.mark.parametrize(("hosts", "first"), [
    ("node03", "node03"),
    ("node03,node05", "node03"),
    ("node[03-07,12]", "node03"),
    ("node[3,5]", "node3"),
    ("node-a,node[1-2]", "node-a"),
    ("gpu[10-11]-ib,login1", "gpu10-ib"),
    ("r[1-2]n[4,6]", "r1n4"),
    ("n1.cluster.example.org", "n1.cluster.example.org"),
])  # fmt: skip
def test_first_host_of_a_slurm_list(hosts: str, first: str) -> None:
    assert utils.first_host(hosts) == first


def test_cuda_without_a_device_names_the_flag() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(utils.SetupError, match="--device cuda:1.*--device auto or --device cpu"):
        utils.resolve_device("cuda:1")
    assert utils.resolve_device("auto") == "cpu"


@pytest.mark.slow
def test_a_rank_that_waits_alone_gives_up_with_a_sentence(no_launcher: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    with pytest.raises(utils.SetupError, match="rank 1 of 2 could not join .* 127.0.0.1:.*every process was started"):
        with utils.process_group("cpu", timeout_s=2):
            pass


# ---- several processes -----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_ranks_agree_on_signals_means_errors_and_checks() -> None:
    """One start of two processes for all collectives: importing torch is what takes the time."""
    code = """
# A signal to rank 1 alone stops both after the same step: the one after next, as sums are read a step later.
stop = utils.StopSignal(world, 30)
steps = 0
while not stop.agreed():
    steps += 1
    if world.rank == 1 and steps == 5:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert steps < 100
print("stopped", steps, stop.received)

# Means are weighted by the samples of all ranks: 1 x 2.0 on rank 0, 3 x 6.0 on rank 1.
meters = utils.Meters(world.device)
meters.update((1, 3)[world.rank], loss=torch.tensor((2.0, 6.0)[world.rank]))
print("mean", meters.means()["loss"], meters.recent()["loss"][1])

# An error of rank 0 is raised everywhere, its result stays there.
print("result", utils.on_rank_zero(world, lambda: "written"))
def fail():
    raise utils.SetupError("disk")
try:
    utils.on_rank_zero(world, fail)
except utils.SetupError as error:
    print("raised", error)

# One that cannot be unpickled is still raised as it is where it happened.
class Odd(Exception):
    def __init__(self, a, b):
        super().__init__("odd")
def fail_oddly():
    raise Odd(1, 2)
try:
    utils.on_rank_zero(world, fail_oddly)
except Exception as error:
    print("oddly", type(error).__name__)

utils.check_agreement(world, "the epoch", 3)
try:
    utils.check_agreement(world, "the epoch", 3 + world.rank)
except utils.SetupError as error:
    print("differs", error)
"""
    outputs = run_ranks(code)
    for rank, output in enumerate(outputs):
        assert f"stopped 6 {rank == 1}" in output, outputs
        assert f"mean 5.0 {(2.0, 6.0)[rank]}" in output
        assert f"result {'written' if rank == 0 else None}" in output
        assert "raised disk" in output
        assert f"oddly {('Odd', 'TypeError')[rank]}" in output
        assert "differs the epoch differs between the processes: 3 on rank 0, 4 on rank 1" in output


def test_a_signal_stops_a_single_process_at_its_next_step() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        for number in before:
            stop = utils.StopSignal(ALONE)
            assert not stop.agreed()
            os.kill(os.getpid(), number)
            assert stop.agreed()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_errors_of_lost_peers_are_told_from_others() -> None:
    gloo = "[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer"
    assert utils.lost_peer(RuntimeError(gloo + "\nmore")) == gloo
    assert utils.lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert utils.lost_peer(RuntimeError("DataLoader timed out after 5 seconds")) is None


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:2021, "


@pytest.mark.parametrize(
    "text, lost",
    [
        (
            NCCL + "remote process exited or there was a network error, NCCL version 2.28.9\nncclRemoteError: A call",
            True,
        ),
        (NCCL + "unhandled system error\nLast error:\nsocketPollConnect: Connection closed by remote peer n3<4>", True),
        ("NCCL communicator was aborted on rank 1.", True),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9) ran for 60015 milliseconds", True),
        (NCCL + "invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 81000", False),
        (NCCL + "unhandled cuda error (run with NCCL_DEBUG=INFO for details)", False),
    ],
)
def test_nccls_errors_of_lost_peers_are_told_from_others(text: str, lost: bool) -> None:
    assert (utils.lost_peer(dist.DistBackendError(text)) is not None) == lost


@pytest.mark.parametrize(
    "environment, gpus, expected",
    [
        (dict(LOCAL_RANK=1, LOCAL_WORLD_SIZE=2), 2, 1),
        (dict(LOCAL_RANK=0, LOCAL_WORLD_SIZE=4), 2, "4 processes on this node and 2 GPU"),
        (dict(LOCAL_RANK=1, LOCAL_WORLD_SIZE=2), 1, "2 processes on this node and 1 GPU"),
        (dict(SLURM_LOCALID=3), 1, 0),  # each task sees its own
        (dict(SLURM_LOCALID=3), 4, 3),
        (dict(SLURM_LOCALID=3), 2, "4 processes on this node and 2 GPU"),
    ],
)
def test_every_process_has_a_gpu_of_its_own_or_is_refused(
    environment: dict[str, int], gpus: int, expected: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = "SLURM_PROCID=7 SLURM_NTASKS=8" if "SLURM_LOCALID" in environment else "RANK=7 WORLD_SIZE=8"
    for word in (*launcher.split(), *(f"{name}={value}" for name, value in environment.items())):
        monkeypatch.setenv(*word.split("="))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if isinstance(expected, int):
        assert utils.this_process("cuda").device == torch.device("cuda", expected)
        return
    with pytest.raises(utils.SetupError, match=expected):
        utils.this_process("cuda")


def test_two_processes_on_one_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    store = dist.HashStore()
    device = torch.device("cuda", 0)
    utils._claim_gpu(utils.World(0, 0, 3, device), store)
    utils._claim_gpu(utils.World(0, 0, 3, device), store)  # again the same process
    with pytest.raises(utils.SetupError, match="ranks 0 and 2 are both on GPU GPU-1"):
        utils._claim_gpu(utils.World(2, 0, 3, device), store)


def test_gloos_interface_problem_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: object) -> None:
        raise RuntimeError("[enforce fail at device.cc:113] Unable to find interface for: 10.0.0.1\nException raised")

    monkeypatch.setattr(dist, "new_group", refuse)
    with pytest.raises(utils.SetupError, match="GLOO_SOCKET_IFNAME"):
        utils.StopSignal(utils.World(0, 0, 2, torch.device("cpu")))


def test_an_error_is_told_before_nccls_group_is_aborted(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    told = []
    monkeypatch.setattr(dist, "is_initialized", lambda: not told)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("waits for the dead"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: told.append(capsys.readouterr().err))
    with pytest.raises(ValueError), utils.process_group("cpu"):
        raise ValueError("what happened\nand more")
    assert told == ["[rank 0] ValueError: what happened\n"]


# ---- seeds -----------------------------------------------------------------------------------------------------------
def draws() -> tuple:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_equal_addresses_give_equal_draws_and_others_do_not() -> None:
    found = {}
    for address in [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (2**40, 0, 0, 3)]:
        utils.seed_everything(*address)
        found[address] = draws()
        random.random(), np.random.rand(3), torch.rand(5)  # whatever came before
        utils.seed_everything(*address)
        assert draws() == found[address]
    for generator in zip(*found.values(), strict=True):
        assert len(set(generator)) == len(found)


# ---- meters ----------------------------------------------------------------------------------------------------------
def test_meters_weigh_by_samples() -> None:
    meters = Meters(CPU)
    meters.update(1, loss=torch.tensor(1.0), lr=0.5)
    meters.update(3, loss=torch.tensor(3.0), lr=0.5)
    assert meters.means() == {"loss": 2.5, "lr": 0.5}


def test_updates_of_meters_copy_no_numbers_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU such a copy waits for the device."""
    meters = Meters(CPU)
    monkeypatch.setattr(torch, "tensor", None)
    meters.update(1, loss=1.0)
    meters.update(1, loss=3.0)
    monkeypatch.undo()
    assert meters.means() == {"loss": 2.0}


def test_meters_state_restores_the_exact_sums() -> None:
    """Stopped after any update and restored, the means have the same bits: the sums travel, not the means."""
    values = [torch.rand(1, generator=torch.Generator().manual_seed(i)).squeeze() / 3 for i in range(20)]
    whole = Meters(CPU)
    for value in values:
        whole.update(7, loss=value)
    for stop in range(len(values)):
        first = Meters(CPU)
        for value in values[:stop]:
            first.update(7, loss=value)
        second = Meters(CPU, first.state())
        for value in values[stop:]:
            second.update(7, loss=value)
        assert second.state() == whole.state()
        assert second.means() == whole.means()


def test_recent_means_are_those_since_the_last_call() -> None:
    meters = Meters(CPU)
    meters.update(2, loss=1.0)
    assert meters.recent() == {"loss": (1.0, 1.0)}
    meters.update(2, loss=3.0)
    assert meters.recent() == {"loss": (3.0, 2.0)}


def test_no_updates_give_no_means() -> None:
    assert Meters(CPU).means() == {}


# ---- log.txt ---------------------------------------------------------------------------------------------------------
def test_epoch_log_drops_the_epochs_that_run_again(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    log = EpochLog(path, 0)
    for epoch in range(4):
        log.append({"epoch": epoch, "loss": 1 / (epoch + 3)})
    kept = path.read_text().splitlines()[:2]
    log = EpochLog(path, 2)
    assert path.read_text().splitlines() == kept
    log.append({"epoch": 2, "loss": 0.5})
    assert [line["epoch"] for line in EpochLog.read(path)] == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_epoch_log_survives_a_line_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    whole = '{"epoch": 0, "loss": 0.25}\n{"epoch": 1, "loss": 0.125}\n'
    first = whole.index("\n") + 1
    for length in range(len(whole) + 1):
        path.write_text(whole[:length])
        EpochLog(path, 5)
        complete = 2 if length >= len(whole) - 1 else 1 if length >= first - 1 else 0
        assert [line["epoch"] for line in EpochLog.read(path)] == list(range(complete)), length
        assert path.read_text() == "".join(whole.splitlines(keepends=True)[:complete])


def test_epoch_log_keeps_every_bit_of_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    lines = [{"epoch": epoch, "loss": float(np.random.default_rng(epoch).standard_normal())} for epoch in range(50)]
    log = EpochLog(path, 0)
    for line in lines:
        log.append(line)
    EpochLog(path, 50)
    assert EpochLog.read(path) == lines


# ---- folders ---------------------------------------------------------------------------------------------------------
def test_set_aside_moves_files_and_folders_to_new_places(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "log.txt").write_text(str(number))
        (tmp_path / "tensorboard").mkdir()
        (tmp_path / "tensorboard" / "events").write_text(str(number))
        target = checkpoints.set_aside(tmp_path, ["log.txt", "tensorboard", "absent"])
        assert target == tmp_path / f"earlier-{number}"
        assert (target / "log.txt").read_text() == (target / "tensorboard" / "events").read_text() == str(number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-1", "earlier-2"]


def test_set_aside_of_nothing_makes_nothing(tmp_path: Path) -> None:
    assert checkpoints.set_aside(tmp_path, ["log.txt"]) is None
    assert list(tmp_path.iterdir()) == []


def test_make_folder_names_the_folder_and_the_way_out(tmp_path: Path) -> None:
    utils.make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(utils.SetupError, match=r"--output_dir .*/file/out: .*give another folder"):
        utils.make_folder(tmp_path / "file" / "out")


@pytest.mark.slow
def test_a_claimed_folder_is_free_again_when_its_process_is_killed(tmp_path: Path) -> None:
    code = f"import utils, torch, time\nwith utils.claimed_folder({str(tmp_path)!r}, utils.World(0, 0, 1, 'cpu')):\n"
    code += "    print('claimed', flush=True)\n    time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "claimed\n"
            with pytest.raises(utils.SetupError, match="another run is writing there"):
                with utils.claimed_folder(str(tmp_path), ALONE, timeout_s=0.3):
                    pass
        finally:
            holder.kill()
        holder.wait()
        with utils.claimed_folder(str(tmp_path), ALONE, timeout_s=5):
            pass


def test_no_folder_is_claimed_where_nothing_is_written() -> None:
    with utils.claimed_folder("", ALONE), utils.claimed_folder(None, ALONE):
        pass


def test_write_errors_become_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(utils.SetupError, match="writing failed .No space left on device.*free some space"):
        with checkpoints.explain_write_errors(tmp_path), Path("/dev/full").open("w") as full:
            full.write("x" * 100_000)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 48),
        ({"LOCAL_WORLD_SIZE": "4"}, 12),
        ({"LOCAL_WORLD_SIZE": "100"}, 1),
        ({"SLURM_PROCID": "3", "SLURM_CPUS_PER_TASK": "10"}, 10),
        ({"SLURM_PROCID": "3"}, 48),
        ({"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "40", "LOCAL_WORLD_SIZE": "4"}, 12),  # torchrun in a job
    ],
)
def test_cores_are_those_the_launcher_leaves_to_a_process(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 48)
    assert utils.cores_of_process() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_cores_are_no_more_than_the_system_lets_this_process_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert utils.cores_of_process() == 1
    finally:
        os.sched_setaffinity(0, allowed)
