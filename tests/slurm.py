"""A Slurm of one machine: ``sbatch``, ``srun``, ``scontrol``, ``sacct`` as far as this repository's scripts use them.

An emulation of Slurm, not of anything here: it reads the ``#SBATCH`` lines, gives processes Slurm's variables, and
takes the job down and starts it again on ``scontrol requeue``. An option it does not know is an error, as with Slurm.
A node may be a network namespace with its own host name and address, joined to the other by a cable.

Run under the name of a command, this file is that command; imported, it has what tests need.
"""

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STATE = "EMULATED_SLURM"  # variable: the folder in which the commands find each other


# ---- for tests -------------------------------------------------------------------------------------------------------
class NoNamespaces(Exception):
    """This process may not make network namespaces; the message says why."""


class Nodes:
    """Two machines, ``node1`` and ``node2`` at 10.77.0.1 and .2: namespaces for network, host name and mounts.

    They have no names outside and live as long as one process each, so nothing is left behind, whatever happens.
    """

    names = ("node1", "node2")

    def __init__(self, folder: Path) -> None:
        hosts = folder / "hosts"
        addresses = "".join(f"10.77.0.{number} {name}\n" for number, name in enumerate(self.names, 1))
        hosts.write_text(f"127.0.0.1 localhost\n{addresses}")
        self.holders = []
        for name in self.names:
            script = f"mount --bind {hosts} /etc/hosts && hostname {name} && ip link set lo up && echo up && exec cat"
            self.holders.append(
                subprocess.Popen(
                    ["unshare", "--net", "--uts", "--mount", "sh", "-c", script], text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        try:
            for holder in self.holders:  # `cat` ends with this process: its standard input is closed then
                if (said := holder.stdout.readline()) != "up\n":
                    raise NoNamespaces(said.strip())
            first, second = (str(holder.pid) for holder in self.holders)
            self._call("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "eth0", "netns", second)
            for number in (1, 2):
                enter = self.enter(number - 1)
                self._call(*enter, "ip", "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
                self._call(*enter, "ip", "link", "set", "eth0", "up")
        except (NoNamespaces, OSError):
            self.__exit__()
            raise

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *error: object) -> None:
        for holder in self.holders:
            holder.kill()
            holder.wait()

    def enter(self, node: int) -> list[str]:
        """The words before a command that let it run on a node; the command replaces them, so its pid is the same."""
        return ["nsenter", f"--target={self.holders[node].pid}", "--net", "--uts", "--mount", "--wd=."]

    @staticmethod
    def _call(*words: str) -> None:
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise NoNamespaces(f"{shlex.join(words)}: {done.stderr.strip()}")


def free_job_id() -> str:
    """A job whose port, 20000 + job id % 20000, is free."""
    for job in range(os.getpid() % 10_000, 20_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20_000 + job)) != 0:
                return str(job)
    raise AssertionError("no free port between 20000 and 40000")


class Slurm:
    """The commands on a PATH, and jobs.

    Args:
        folder: For the commands and their state.
        nodes: Machines; None: both nodes are this machine.
        restart: Whether a job that is queued again is started again; otherwise it stays in the queue.
    """

    def __init__(self, folder: Path, nodes: Nodes | None = None, restart: bool = True) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in ("sbatch", "srun", "scontrol", "sacct"):
            command = folder / "bin" / name
            command.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).resolve()} {name} "$@"\n')
            command.chmod(0o755)
        names = nodes.names if nodes else ("localhost", "localhost")
        enter = [nodes.enter(0), nodes.enter(1)] if nodes else [[], []]
        hosts = "node[1-2]" if nodes else "localhost"
        state = {"job_id": free_job_id(), "names": names, "enter": enter, "list": hosts, "restart": restart}
        (folder / "cluster.json").write_text(json.dumps(state))
        path = f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.variables = {STATE: str(folder), "PATH": path}

    def __enter__(self) -> "Slurm":
        return self

    def __exit__(self, *error: object) -> None:
        if (self.folder / "job.pid").exists() and not self.ended():
            for name in ("job", "batch", "srun", "tasks"):
                for pid in _pids(self.folder / f"{name}.pid"):
                    _signal(pid, signal.SIGKILL)

    def warn(self) -> None:
        """What Slurm does ahead of the time limit: the signal of ``--signal``."""
        _signal(int((self.folder / "job.pid").read_text()), signal.SIGALRM)

    def finish(self, timeout: float = 120) -> tuple[int, list[str]]:
        """Waits for the job's end; its exit code, and what happened to it.

        Raises:
            AssertionError: After ``timeout``.
        """
        deadline = time.monotonic() + timeout
        while not self.ended():
            assert time.monotonic() < deadline, f"the job still runs after {timeout} s: {self.events()}"
            time.sleep(0.1)
        return int((self.folder / "code").read_text()), self.events()

    def ended(self) -> bool:
        return (self.folder / "code").exists()

    def events(self) -> list[str]:
        """What has happened to the job so far: ``started``, ``warned``, ``requeued``, ``ended <code>``."""
        return (self.folder / "events").read_text().splitlines()


# ---- the commands ----------------------------------------------------------------------------------------------------
def sbatch(folder: Path, words: list[str]) -> int:
    """Starts the job in the background, as it has no queue, and says its number."""
    cluster = json.loads((folder / "cluster.json").read_text())
    job = subprocess.Popen(
        [sys.executable, "-S", __file__, "job", *words], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=(folder / "job.log").open("a"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    (folder / "job.pid").write_text(str(job.pid))
    print(f"Submitted batch job {cluster['job_id']}")
    return 0


def job(folder: Path, words: list[str]) -> int:
    """Runs the batch script until it ends without having been queued again."""
    cluster = json.loads((folder / "cluster.json").read_text())
    number = next(i for i, word in enumerate(words) if not word.startswith("-"))
    script = Path(words[number])
    lines = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
    known = ("job-name", "gpus-per-node", "cpus-per-task", "time", "error", "wckey", "mem")
    parser = argparse.ArgumentParser("sbatch", allow_abbrev=False)
    for option in (*known, "nodes", "ntasks-per-node", "signal", "output", "open-mode"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--requeue", action="store_true")
    options = parser.parse_args([word for line in lines for word in shlex.split(line)] + words[:number])
    if not options.requeue or options.open_mode != "append":
        parser.error("--requeue and --open-mode=append are what lets a job come back and keep its log")
    nodes, tasks = int(options.nodes or 1), int(options.ntasks_per_node or 1)
    env = os.environ | {
        "SLURM_JOB_ID": cluster["job_id"], "SLURM_JOB_NODELIST": cluster["list"], "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(nodes * tasks), "SLURM_NTASKS_PER_NODE": str(tasks),
    }  # fmt: skip
    log = (options.output or "slurm-%j.out").replace("%j", cluster["job_id"])
    to_batch, _, name = (options.signal or "USR1").partition("@")[0].rpartition("B:")
    warnings = []
    signal.signal(signal.SIGALRM, lambda *_: warnings.append(signal.Signals[f"SIG{name}"]))
    for attempt in range(10):
        env["SLURM_RESTART_COUNT"] = str(attempt)
        _note(folder, "started")
        with open(log, "a") as output:
            batch = subprocess.Popen(["bash", script, *words[number + 1 :]], env=env, stdout=output, stderr=output)
        (folder / "batch.pid").write_text(str(batch.pid))
        while batch.poll() is None and not (folder / "requeue").exists():
            if warnings:
                _note(folder, "warned")
                for pid in [batch.pid] if ":" in options.signal else _pids(folder / "tasks.pid"):
                    _signal(pid, warnings[0])
                warnings.clear()
            time.sleep(0.02)
        time.sleep(0.1)
        if not (folder / "requeue").exists():
            break
        for pid in (*_pids(folder / "tasks.pid"), *_pids(folder / "srun.pid"), batch.pid):
            _signal(pid, signal.SIGKILL)  # as Slurm does to what is left of a job that it queues again
        batch.wait()
        (folder / "requeue").unlink()
        _note(folder, "requeued")
        if not cluster["restart"]:
            (folder / "code").write_text("0")
            return 0
    _note(folder, f"ended {batch.returncode}")
    (folder / "code").write_text(str(batch.returncode))
    return 0


def srun(folder: Path, words: list[str]) -> int:
    """Starts the tasks of a step, one after the other on each node; the highest of their codes is its own."""
    parser = argparse.ArgumentParser("srun", allow_abbrev=False)
    for option in ("--output", "--error", "--kill-on-bad-exit", "--wait", "--cpus-per-task"):
        parser.add_argument(option)
    parser.add_argument("--unbuffered", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(words)
    cluster = json.loads((folder / "cluster.json").read_text())
    nodes, total = int(os.environ["SLURM_JOB_NUM_NODES"]), int(os.environ["SLURM_NTASKS"])
    each = total // nodes
    tasks = []
    for rank in range(total):
        names = {"PROCID": rank, "LOCALID": rank % each, "NODEID": rank // each, "STEP_NODELIST": cluster["list"]}
        env = os.environ | {f"SLURM_{name}": str(value) for name, value in names.items()}
        path = (options.output or "").replace("%j", cluster["job_id"]).replace("%t", str(rank))
        with open(path, "a") if path else os.fdopen(os.dup(1), "w") as output:
            words = [*cluster["enter"][rank // each], *options.command]
            tasks.append(subprocess.Popen(words, env=env, stdout=output, stderr=output))
    (folder / "tasks.pid").write_text(" ".join(str(task.pid) for task in tasks))
    (folder / "srun.pid").write_text(str(os.getpid()))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
    first = None
    while None in (codes := [task.poll() for task in tasks]):
        first = first or (time.monotonic() if any(code is not None for code in codes) else None)
        failed = options.kill_on_bad_exit == "1" and any(codes)
        if failed or (first and time.monotonic() > first + float(options.wait or "inf")):
            for task in tasks:
                task.kill()
        time.sleep(0.01)
    for name in ("tasks.pid", "srun.pid"):
        (folder / name).unlink()
    return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(folder: Path, words: list[str]) -> int:
    """``show hostnames <list>`` and ``requeue <job>``."""
    cluster = json.loads((folder / "cluster.json").read_text())
    if words[:2] == ["show", "hostnames"] and words[2:] == [cluster["list"]]:
        print("\n".join(cluster["names"]))
    elif words == ["requeue", cluster["job_id"]]:
        (folder / "requeue").touch()
    else:
        sys.exit(f"scontrol: invalid {words}")
    return 0


def sacct(folder: Path, words: list[str]) -> int:
    """The state of the job, in the form that submitit asks for."""
    cluster = json.loads((folder / "cluster.json").read_text())
    if words[:3] != ["-o", "JobID,State,NodeList", "--parsable2"]:
        sys.exit(f"sacct: invalid {words}")
    code = folder / "code"
    state = "RUNNING" if not code.exists() else "COMPLETED" if code.read_text() == "0" else "FAILED"
    print(f"JobID|State|NodeList\n{cluster['job_id']}|{state}|{cluster['list']}")
    return 0


def _note(folder: Path, event: str) -> None:
    with (folder / "events").open("a") as file:
        file.write(f"{event}\n")


def _pids(path: Path) -> list[int]:
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # scontrol show hostnames … | head -n 1
    commands = {"sbatch": sbatch, "job": job, "srun": srun, "scontrol": scontrol, "sacct": sacct}
    sys.exit(commands[sys.argv[1]](Path(os.environ[STATE]), sys.argv[2:]))
