"""Checkpoints: what is read and refused, and what survives kills and full disks."""

import argparse
import contextlib
import io
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from states import Hostile, small_vit, training_state

import checkpoints
from oversmoothing.weights import CheckpointError, read_checkpoint

ROOT = Path(checkpoints.__file__).resolve().parent
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mount and setuid need root")


@pytest.fixture(scope="module")
def good() -> bytes:
    """The bytes of one real file."""
    with io.BytesIO() as buffer:
        torch.save(training_state(), buffer)
        return buffer.getvalue()


@pytest.fixture
def state() -> dict[str, Any]:
    return training_state()


def read_saved(content: Any, path: Path, **kwargs: Any) -> dict[str, Any]:
    torch.save(content, path, **kwargs)
    return read_checkpoint(str(path))


# ---- assemble, write, read back ----


def test_a_checkpoint_is_read_by_plain_torch_with_and_without_mmap(state: dict[str, Any], tmp_path: Path) -> None:
    checkpoints.save(state, tmp_path)
    path = tmp_path / "checkpoint.pth"
    for loaded in (torch.load(path, weights_only=True), torch.load(path, mmap=True), read_checkpoint(str(path))):
        tensors = ("model", "model_ema", "optimizer")
        for key in tensors:
            torch.testing.assert_close(loaded[key], state[key], rtol=0, atol=0)
        assert {key: loaded[key] for key in loaded if key not in tensors} == {
            key: state[key] for key in state if key not in tensors
        }
    assert zipfile.ZipFile(path).testzip() is None
    assert path.read_bytes()[-71:-64] == b"sha256="


def test_names_carry_no_prefix_and_arguments_are_json_types(state: dict[str, Any]) -> None:
    assert list(state["model"]) == list(state["model_ema"]) == list(small_vit().state_dict())
    assert state["args"] == {"model": "tiny", "data_path": "/data", "opt_betas": [0.9, 0.99], "dtype": "torch.float32"}
    assert state["meters"] == {"0": {"loss": [0.5, 3]}} and type(state["meters"]["0"]["loss"][1]) is int


def test_previous_best_and_numbered_files(tmp_path: Path) -> None:
    for epoch in range(4):
        checkpoints.save(training_state(epoch), tmp_path, is_best=epoch == 1, keep=2)
    checkpoints.save(training_state(3, step=7), tmp_path, keep=2)  # within epoch 4: not numbered
    epochs = {path.name: read_checkpoint(path)["epoch"] for path in tmp_path.iterdir()}
    assert epochs == {
        "checkpoint.pth": 3, "checkpoint_prev.pth": 3, "best_checkpoint.pth": 1,
        "checkpoint_0002.pth": 2, "checkpoint_0003.pth": 3,
    }  # fmt: skip
    assert checkpoints.latest(tmp_path)[1]["step"] == 7


def test_a_new_short_run_keeps_its_own_numbered_files_not_those_of_an_old_long_one(tmp_path: Path) -> None:
    for epoch in (300, 301, 5):
        checkpoints.save(training_state(epoch), tmp_path, keep=2)
    assert {path.name for path in tmp_path.glob("checkpoint_0*")} == {"checkpoint_0005.pth", "checkpoint_0301.pth"}


def test_numbered_files_go_by_their_names_whatever_the_clock_says(tmp_path: Path) -> None:
    """The clock went back between two saves; a copy of an old file is new."""
    for epoch in range(3):
        checkpoints.save(training_state(epoch), tmp_path, keep=2)
        os.utime(tmp_path / f"checkpoint_{epoch:04d}.pth", (1e9 - epoch, 1e9 - epoch))
    assert {path.name for path in tmp_path.glob("checkpoint_0*")} == {"checkpoint_0001.pth", "checkpoint_0002.pth"}


@pytest.mark.parametrize("bad", ["dangling", "loop", "folder", "fifo", "closed", "text"])
def test_one_bad_candidate_never_hides_the_others(
    bad: str, state: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("checkpoint_0000.pth", "checkpoint.pth", "checkpoint_prev.pth", "checkpoint_0007.pth"):
        folder = tmp_path / name.removesuffix(".pth")
        folder.mkdir()
        checkpoints.save(state, folder, keep=1)
        path = folder / name
        path.unlink(missing_ok=True)
        makers = {
            "dangling": lambda path: path.symlink_to("nowhere"),
            "loop": lambda path: path.symlink_to(path.name),
            "folder": lambda path: path.mkdir(),
            "fifo": os.mkfifo,
            "closed": lambda path: path.touch(0o000),
            "text": lambda path: path.write_text("x"),
        }
        makers[bad](path)
        found, checkpoint = checkpoints.latest(folder)
        assert found != path and checkpoint["epoch"] == 0
    assert "skipping a checkpoint that cannot be used" in caplog.text
    checkpoints.save(training_state(1), folder, keep=1)  # and a save goes on there
    assert checkpoints.latest(folder)[1]["epoch"] == 1


def test_a_new_save_is_on_the_disk_before_anything_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power loss keeps what was synced alone: the file before its name, and each name's folder after it."""
    checkpoints.save(training_state(0), tmp_path, is_best=True, keep=1)
    calls = []

    def record(name: str) -> None:
        original = getattr(os, name)

        def call(*arguments: Any) -> Any:
            names = [os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else str(a) for a in arguments]
            calls.append((name, *(Path(n).name.replace(tmp_path.name, "folder") for n in names)))
            return original(*arguments)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "link", "replace"):
        record(name)
    checkpoints.save(training_state(1), tmp_path, is_best=True, keep=1)
    names = [(call[0], *(re.sub(r"\.[0-9a-f]{8}\.tmp", ".tmp", part) for part in call[1:])) for call in calls]
    new, old = "checkpoint.pth.tmp", "checkpoint.pth.tmp"
    assert names == [
        ("fsync", new),
        ("link", new, "best_checkpoint.pth.tmp"),
        ("replace", "best_checkpoint.pth.tmp", "best_checkpoint.pth"),
        ("fsync", "folder"),
        ("link", new, "checkpoint_0001.pth.tmp"),
        ("replace", "checkpoint_0001.pth.tmp", "checkpoint_0001.pth"),
        ("fsync", "folder"),
        ("link", "checkpoint.pth", old),
        ("replace", new, "checkpoint.pth"),
        ("fsync", "folder"),
        ("replace", old, "checkpoint_prev.pth"),
        ("fsync", "folder"),
    ]
    assert calls[0][1] == calls[1][1] == calls[8][1] != calls[7][2] == calls[10][1]


def test_temporary_files_of_killed_saves_are_removed_and_others_are_not(state: dict[str, Any], tmp_path: Path) -> None:
    abandoned, other = tmp_path / "checkpoint.pth.0123abcd.tmp", tmp_path / "notes.tmp"
    abandoned.write_bytes(b"half")
    other.write_bytes(b"mine")
    assert checkpoints.latest(tmp_path) is None
    checkpoints.save(state, tmp_path)
    assert not abandoned.exists() and other.exists()


# ---- damage ----


@pytest.mark.slow
def test_no_truncation_and_no_flipped_bit_is_accepted(state: dict[str, Any], tmp_path: Path) -> None:
    checkpoints.save(state, tmp_path)
    path, previous = tmp_path / "checkpoint.pth", tmp_path / "checkpoint_prev.pth"
    checkpoints.save(training_state(1), tmp_path)
    content = path.read_bytes()
    rng = random.Random(0)
    lengths = [*range(len(content) - 100, len(content), 3), *(rng.randrange(len(content)) for _ in range(70))]
    damaged = [content[:length] for length in lengths]
    tail_and_body = [*range(len(content) - 100, len(content)), *(rng.randrange(len(content)) for _ in range(200))]
    for position in tail_and_body:
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for version in damaged:
        path.write_bytes(version)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pth: .*(damaged|cut short|is not a checkpoint)"):
            read_checkpoint(str(path))
        found, checkpoint = checkpoints.latest(tmp_path)
        assert found == previous and checkpoint["epoch"] == 0
    path.write_bytes(content)
    assert checkpoints.latest(tmp_path)[1]["epoch"] == 1


def test_a_damaged_checkpoint_is_skipped_with_a_line_and_none_good_is_an_error(
    state: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoints.latest(tmp_path) is None and checkpoints.latest(tmp_path / "none") is None
    checkpoints.save(state, tmp_path, keep=1)
    numbered = tmp_path / "checkpoint_0000.pth"
    numbered.write_bytes(numbered.read_bytes())  # the same inode as checkpoint.pth until the next line
    (tmp_path / "checkpoint.pth").unlink()
    (tmp_path / "checkpoint.pth").write_bytes(b"")
    torch.save(state, tmp_path / "checkpoint_prev.pth")  # good content, but no digest: not a file of ours
    assert checkpoints.latest(tmp_path)[0] == numbered
    assert "checkpoint.pth: is not a checkpoint" in caplog.text and "checkpoint_prev.pth: has no SHA-256" in caplog.text
    numbered.write_bytes(numbered.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"none of its checkpoints can be used \(checkpoint\.pth, "):
        checkpoints.latest(tmp_path)


def test_a_damaged_current_file_never_costs_the_good_previous_one(state: dict[str, Any], tmp_path: Path) -> None:
    """A save that fails after a damaged checkpoint.pth leaves the previous one to reload."""
    checkpoints.save(state, tmp_path)
    checkpoints.save(training_state(1), tmp_path)
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoints.save({**state, "meters": Unwritable()}, tmp_path)
    assert checkpoints.latest(tmp_path)[1]["epoch"] == 0
    checkpoints.save(training_state(2), tmp_path)
    assert checkpoints.latest(tmp_path)[1]["epoch"] == 2


class Unwritable:
    """Fails in the middle of a save as a full disk does."""

    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


# ---- kills, full disks, read-only folders ----

KILLED_SAVES = """
import os, random, signal, sys, time
import torch, checkpoints
from oversmoothing.weights import read_checkpoint

folder, tensors = sys.argv[1], {str(index): torch.randn(100, 1000) for index in range(10)}

def save(epoch):
    state = {"model": tensors, "epoch": epoch, "step": 0, "format": 1}
    checkpoints.save(state, folder, is_best=epoch % 2 == 0, keep=2)

def check(finished):
    epoch = checkpoints.latest(folder)[1]["epoch"]
    assert epoch in (finished, finished + 1), (epoch, finished)  # + 1: killed between the rename and the report
    for name in os.listdir(folder):
        if name.endswith(".pth"):
            read_checkpoint(os.path.join(folder, name))  # each name is a whole file at any moment
    numbered = [name for name in os.listdir(folder) if name.startswith("checkpoint_0")]
    # After the last epoch nobody comes to remove what a killed save has left.
    assert len(numbered) <= 2 or max(numbered) != f"checkpoint_{epoch:04d}.pth", (numbered, epoch)
    return epoch

def kill_at_random_moments():
    rng, finished = random.Random(0), 0
    save(0)
    for _ in range(30):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for epoch in range(finished + 1, 10**6):
                save(epoch)
                os.write(writer, b"%d\\n" % epoch)
        os.close(writer)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reader) as reports:
            finished = check(max([finished, *map(int, reports)]))

def kill_before_each_change_of_a_name():
    for epoch in range(3):
        save(epoch)
    for kill_at in range(1, 30):
        finished, count = checkpoints.latest(folder)[1]["epoch"], 0

        def count_and_kill(event, arguments):
            nonlocal count
            if event in ("os.rename", "os.link", "os.remove"):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            sys.addaudithook(count_and_kill)
            save(finished + 1)
            os._exit(0)
        killed = os.waitpid(child, 0)[1] != 0
        check(finished)
        if not killed:
            print("kill points:", kill_at - 1)
            return

{"random": kill_at_random_moments, "names": kill_before_each_change_of_a_name}[sys.argv[2]]()
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_last_finished_save(tmp_path: Path) -> None:
    result = python(KILLED_SAVES, str(tmp_path), "random")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_kill_before_each_change_of_a_name_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    result = python(KILLED_SAVES, str(tmp_path), "names")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.rpartition(": ")[2]) >= 7  # both links and renames of three names, and the removals


@contextlib.contextmanager
def tmpfs(path: Path, options: str) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@needs_root
def test_a_full_disk_is_one_clear_error_and_costs_nothing(state: dict[str, Any], tmp_path: Path) -> None:
    with tmpfs(tmp_path, "size=1200k"):
        checkpoints.save(state, tmp_path)
        (tmp_path / "ballast").write_bytes(bytes(600_000))
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(CheckpointError, match=r"checkpoint\.pth could not be written \(.*No space left.*free some"):
            checkpoints.save(training_state(1), tmp_path)
        assert sorted(os.listdir(tmp_path)) == before
        assert checkpoints.latest(tmp_path)[1]["epoch"] == 0


@needs_root
def test_a_read_only_folder_is_one_clear_error(state: dict[str, Any], tmp_path: Path) -> None:
    with tmpfs(tmp_path, "size=2m"):
        checkpoints.save(state, tmp_path)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pth could not be written \(.*Read-only file system"):
            checkpoints.save(training_state(1), tmp_path)
        assert checkpoints.latest(tmp_path)[1]["epoch"] == 0


SAVE_UNDER_SIZE_LIMITS = """
import os, resource, signal, sys, checkpoints
from oversmoothing.weights import CheckpointError, read_checkpoint
state = read_checkpoint(sys.argv[1] + "/checkpoint.pth")
size, hard = os.path.getsize(sys.argv[1] + "/checkpoint.pth"), resource.RLIM_INFINITY
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for fraction in (0.0001, 0.01, 0.5, 0.9, 0.9999):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * fraction), hard))
    try:
        checkpoints.save({**state, "epoch": 1}, sys.argv[1])
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_write_that_fails_midway_leaves_the_old_checkpoint(state: dict[str, Any], tmp_path: Path) -> None:
    checkpoints.save(state, tmp_path)
    result = python(SAVE_UNDER_SIZE_LIMITS, str(tmp_path))
    lines = result.stdout.splitlines()
    assert len(lines) == 5 and all("could not be written (OSError: [Errno 27]" in line for line in lines), result
    assert os.listdir(tmp_path) == ["checkpoint.pth"] and checkpoints.latest(tmp_path)[1]["epoch"] == 0


def test_ctrl_c_while_saving_is_no_write_error(tmp_path: Path) -> None:
    """torch's writer answers an interruption in the middle of a file with an error of its own."""
    checkpoints.write({"epoch": 0, "weights": torch.zeros(3)}, tmp_path / "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    large = {str(number): torch.zeros(100_000) for number in range(300)}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for milliseconds in range(1, 11):
            with pytest.raises(KeyboardInterrupt):
                # Once more after a second: torch's C code may drop an interruption that falls into a callback.
                signal.setitimer(signal.ITIMER_REAL, milliseconds / 1000, 1)
                while True:  # a fast disk is done before
                    checkpoints.write(large, tmp_path / "large_checkpoint.pth", keep_previous=False)
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


SAVE_AS_NOBODY = """
import os, sys, checkpoints
from oversmoothing.weights import read_checkpoint
state = read_checkpoint(sys.argv[1] + "/checkpoint.pth")
os.setuid(65534)
try:
    os.link(sys.argv[1] + "/checkpoint.pth", sys.argv[1] + "/try")
except PermissionError:
    checkpoints.save({**state, "epoch": 1}, sys.argv[1], is_best=True)
    print("saved")
"""


@needs_root
@pytest.mark.slow
def test_without_hard_links_a_save_still_keeps_the_previous_file(state: dict[str, Any]) -> None:
    """Linux's protected_hardlinks refuses a link to another user's file."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own temporary folders are closed to other users
        os.chmod(folder, 0o777)
        checkpoints.save(state, folder)
        result = python(SAVE_AS_NOBODY, folder)
        if not result.returncode and not result.stdout:
            pytest.skip("a hard link to another user's file is allowed on this system")
        assert result.returncode == 0, result.stderr
        epochs = {path.name: read_checkpoint(path)["epoch"] for path in Path(folder).iterdir()}
    assert epochs == {"checkpoint.pth": 1, "checkpoint_prev.pth": 0, "best_checkpoint.pth": 1}


# ---- kinds of file ----

WEIGHTS = {"blocks.0.attn.lamb": torch.ones(3), "head.weight": torch.zeros(10, 4)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {f"module.{name}": tensor for name, tensor in WEIGHTS.items()},
        {"model": {f"module._orig_mod.module.{name}": tensor for name, tensor in WEIGHTS.items()}},
        {"state_dict": WEIGHTS, "epoch": 3},
        {"model_ema": WEIGHTS},
        {"state_dict_ema": WEIGHTS},
        {"model": WEIGHTS, "model_ema": WEIGHTS, "args": argparse.Namespace(lr=0.1), "epoch": 5},
        {"model": WEIGHTS, "model_ema": None},
    ],
    ids=["bare", "module.", "repeated prefixes", "timm", "EMA only", "timm EMA only", "DeiT", "no EMA"],
)
def test_every_layout_gives_the_same_weights(content: dict[str, Any], zipped: bool, tmp_path: Path) -> None:
    found = read_saved(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    torch.testing.assert_close(found["model"], WEIGHTS)
    if "args" in content:
        assert found["args"] == {"lr": 0.1} and found["epoch"] == 5


def test_safetensors_and_other_endings_are_told_apart_by_content(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pth"):
        safetensors.torch.save_file(WEIGHTS, tmp_path / name)
        torch.testing.assert_close(read_checkpoint(str(tmp_path / name))["model"], WEIGHTS)
    for name in ("x.bin", "x.pt", "y.safetensors"):
        torch.testing.assert_close(read_saved(WEIGHTS, tmp_path / name)["model"], WEIGHTS)


def test_a_prefix_is_removed_at_the_beginning_only_and_never_merges_two_names(tmp_path: Path) -> None:
    names = {"my_module.weight", "blocks.0.module.weight"}
    assert set(read_saved(dict.fromkeys(names, torch.ones(1)), tmp_path / "x.pth")["model"]) == names
    with pytest.raises(CheckpointError, match="'a' occurs twice"):
        read_saved({"a": torch.ones(1), "module.a": torch.ones(1)}, tmp_path / "x.pth")


def numpy_file() -> bytes:
    with io.BytesIO() as buffer:
        np.save(buffer, np.ones(3))
        return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"404: not found\n", "text file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"\x89PNG\r\n\x1a\n\0\0", "PNG"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "JPEG"),
        (numpy_file(), "numpy"),
        (b"\0" * 600, "unknown"),
        (b"PK\x03\x04" + b"\0" * 600, "truncated or damaged"),
        (b"\x80\x04K\x01.", "truncated or damaged"),
        ((90).to_bytes(8, "little") + b'{"a":', "truncated or damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_files_are_refused_by_their_kind(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.pth: .*{message}"):
        read_checkpoint(str(path))
    assert path.read_bytes() == content  # a download would be removed, a file of the user's never


@pytest.mark.parametrize(
    "content",
    [{}, {"epoch": 3}, {"model": {"a": 1.0}}, {"model": {}}, {"model": {1: torch.ones(1)}}, [1], torch.ones(2)],
    ids=str,
)
def test_a_file_without_a_state_dict_says_so(content: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no state dict"):
        read_saved(content, tmp_path / "x.pth")


def test_missing_paths_folders_and_files_of_a_newer_version(state: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(str(tmp_path / "x.pth"))
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(str(tmp_path))
    checkpoints.save({**state, "format": 99}, tmp_path)
    with pytest.raises(CheckpointError, match="format 99, newer"):
        read_checkpoint(str(tmp_path / "checkpoint.pth"))


@contextlib.contextmanager
def without_root_rights() -> Iterator[None]:
    """Root may read everything, so it becomes another user for a moment; any other user stays who they are."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_or_folder_that_may_not_be_read_says_so(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent) / "run"
        folder.mkdir()
        checkpoints.save(state, folder)
        (folder / "checkpoint.pth").chmod(0o000)
        with without_root_rights(), pytest.raises(CheckpointError, match="check its permissions"):
            read_checkpoint(str(folder / "checkpoint.pth"))
        folder.chmod(0o000)
        with without_root_rights(), pytest.raises(CheckpointError, match="cannot look for a checkpoint to reload"):
            checkpoints.latest(folder)
        folder.chmod(0o700)


def test_a_foreign_zip_with_a_flipped_bit_or_cut_short_is_refused(good: bytes, tmp_path: Path) -> None:
    """Our content without our digest counts as cut short, so this is about a bare state dict."""
    path = tmp_path / "x.pth"
    torch.save({"weight": torch.randn(100, 100)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="Bad CRC"):
        read_checkpoint(str(path))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_checkpoint(str(path))
    path.write_bytes(good)
    with pytest.raises(CheckpointError, match="no SHA-256 digest"):
        read_checkpoint(str(path))


# ---- nothing in a file is executed ----


def hostile_contents(marker: Path) -> dict[str, Any]:
    weights = {"weight": torch.ones(2)}
    return {
        "os.system": Hostile(marker),
        "builtins.eval": {"model": Hostile(marker, eval)},
        "nested in args": {"model": weights, "args": {"deep": [{"er": (Hostile(marker),)}]}},
        "in a Namespace": {"model": weights, "args": argparse.Namespace(x=Hostile(marker))},
        "numpy objects": {"model": weights, "extra": np.array([Hostile(marker)], dtype=object)},
        "a whole module": {"model": torch.nn.Linear(1, 1), "extra": Hostile(marker)},
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("kind", list(hostile_contents(Path())))
def test_hostile_files_are_refused_by_name_and_execute_nothing(kind: str, zipped: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "x.pth"
    with pytest.raises(CheckpointError, match="refused, it asks for the Python object .*nothing in it was executed"):
        read_saved(hostile_contents(marker)[kind], path, _use_new_zipfile_serialization=zipped)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the bait is real: unsafe loading does execute it
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", list(hostile_contents(Path())))
def test_a_plain_pickle_under_another_name_executes_nothing(kind: str, protocol: int, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps(hostile_contents(marker)[kind], protocol=protocol))
    with pytest.raises(CheckpointError):
        read_checkpoint(str(path))
    assert not marker.exists()


def test_a_valid_digest_gives_a_hostile_file_no_trust(state: dict[str, Any], tmp_path: Path) -> None:
    checkpoints.save({**state, "args": Hostile(tmp_path / "executed")}, tmp_path)
    with pytest.raises(CheckpointError, match=r"refused, it asks for the Python object (posix|nt)\.system"):
        read_checkpoint(str(tmp_path / "checkpoint.pth"))
    with pytest.raises(CheckpointError, match="none of its checkpoints can be used"):
        checkpoints.latest(tmp_path)
    assert not (tmp_path / "executed").exists()
