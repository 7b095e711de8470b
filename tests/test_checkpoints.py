"""Checkpoints: what is read and refused, what survives kills and full disks, and the account of every parameter."""

import argparse
import contextlib
import functools
import http.server
import io
import logging
import os
import pickle
import random
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.utils import ModelEmaV3

import checkpoints
from checkpoints import CheckpointError

ROOT = Path(checkpoints.__file__).resolve().parent
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mount and setuid need root")


def small_vit(name: str = "vit_tiny_patch16_224", img_size: int = 32, **kwargs: Any) -> torch.nn.Module:
    size = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 10, "patch_size": 8}
    return timm.create_model(name, img_size=img_size, **{**size, **kwargs})


def training_state(epoch: int = 0, step: int = 0) -> dict[str, Any]:
    """A checkpoint of a model that made one optimizer step."""
    torch.manual_seed(epoch)
    model = small_vit()
    ema = ModelEmaV3(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="tiny", data_path=Path("/data"), opt_betas=(0.9, 0.99), dtype=torch.float32)
    return checkpoints.assemble(
        model=torch.nn.DataParallel(model),
        model_ema=ema,
        optimizer=optimizer,
        scaler=None,
        epoch=epoch,
        step=step,
        meters={"loss": np.float32(0.5), "count": np.int64(3)},
        max_accuracy={"acc1": 12.5},
        args=args,
    )


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
    return checkpoints.read(str(path))


# ---- assemble, write, read back ----


def test_a_checkpoint_is_read_by_plain_torch_with_and_without_mmap(state: dict[str, Any], tmp_path: Path) -> None:
    checkpoints.save(state, tmp_path)
    path = tmp_path / "checkpoint.pth"
    for loaded in (torch.load(path, weights_only=True), torch.load(path, mmap=True), checkpoints.read(str(path))):
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
    assert state["meters"] == {"loss": 0.5, "count": 3} and type(state["meters"]["count"]) is int


def test_previous_best_and_numbered_files(tmp_path: Path) -> None:
    for epoch in range(4):
        checkpoints.save(training_state(epoch), tmp_path, is_best=epoch == 1, keep=2)
    checkpoints.save(training_state(3, step=7), tmp_path, keep=2)  # within epoch 4: not numbered
    epochs = {path.name: checkpoints.read(path)["epoch"] for path in tmp_path.iterdir()}
    assert epochs == {
        "checkpoint.pth": 3, "checkpoint_prev.pth": 3, "best_checkpoint.pth": 1,
        "checkpoint_0002.pth": 2, "checkpoint_0003.pth": 3,
    }  # fmt: skip
    assert checkpoints.latest(tmp_path)[1]["step"] == 7


def test_a_new_short_run_keeps_its_own_numbered_files_not_those_of_an_old_long_one(tmp_path: Path) -> None:
    for epoch in (300, 301, 5):
        checkpoints.save(training_state(epoch), tmp_path, keep=2)
    assert {path.name for path in tmp_path.glob("checkpoint_0*")} == {"checkpoint_0005.pth", "checkpoint_0301.pth"}


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
            checkpoints.read(str(path))
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

folder, tensors = sys.argv[1], {str(index): torch.randn(100, 1000) for index in range(10)}

def save(epoch):
    state = {"model": tensors, "epoch": epoch, "step": 0, "format": 1}
    checkpoints.save(state, folder, is_best=epoch % 2 == 0, keep=2)

def check(finished):
    epoch = checkpoints.latest(folder)[1]["epoch"]
    assert epoch in (finished, finished + 1), (epoch, finished)  # + 1: killed between the rename and the report
    for name in os.listdir(folder):
        if name.endswith(".pth"):
            checkpoints.read(os.path.join(folder, name))  # each name is a whole file at any moment
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
state = checkpoints.read(sys.argv[1] + "/checkpoint.pth")
size, hard = os.path.getsize(sys.argv[1] + "/checkpoint.pth"), resource.RLIM_INFINITY
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for fraction in (0.0001, 0.01, 0.5, 0.9, 0.9999):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * fraction), hard))
    try:
        checkpoints.save({**state, "epoch": 1}, sys.argv[1])
    except checkpoints.CheckpointError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_write_that_fails_midway_leaves_the_old_checkpoint(state: dict[str, Any], tmp_path: Path) -> None:
    checkpoints.save(state, tmp_path)
    result = python(SAVE_UNDER_SIZE_LIMITS, str(tmp_path))
    lines = result.stdout.splitlines()
    assert len(lines) == 5 and all("could not be written (OSError: [Errno 27]" in line for line in lines), result
    assert os.listdir(tmp_path) == ["checkpoint.pth"] and checkpoints.latest(tmp_path)[1]["epoch"] == 0


SAVE_AS_NOBODY = """
import os, sys, checkpoints
state = checkpoints.read(sys.argv[1] + "/checkpoint.pth")
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
        epochs = {path.name: checkpoints.read(path)["epoch"] for path in Path(folder).iterdir()}
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
        torch.testing.assert_close(checkpoints.read(str(tmp_path / name))["model"], WEIGHTS)
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
        checkpoints.read(str(path))


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
        checkpoints.read(str(tmp_path / "x.pth"))
    with pytest.raises(CheckpointError, match="is a folder"):
        checkpoints.read(str(tmp_path))
    checkpoints.save({**state, "format": 99}, tmp_path)
    with pytest.raises(CheckpointError, match="format 99, newer"):
        checkpoints.read(str(tmp_path / "checkpoint.pth"))


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
            checkpoints.read(str(folder / "checkpoint.pth"))
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
    with pytest.raises(CheckpointError, match="wrong CRC"):
        checkpoints.read(str(path))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        checkpoints.read(str(path))
    path.write_bytes(good)
    with pytest.raises(CheckpointError, match="no SHA-256 digest"):
        checkpoints.read(str(path))


# ---- nothing in a file is executed ----


class Hostile:
    """Its unpickling would create a file."""

    def __init__(self, marker: Path, function: Any = os.system) -> None:
        self.marker, self.function = marker, function

    def __reduce__(self) -> Any:
        if self.function is eval:
            return eval, (f"open({str(self.marker)!r}, 'w')",)
        return os.system, (f"touch {self.marker}",)


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
        checkpoints.read(str(path))
    assert not marker.exists()


def test_a_valid_digest_gives_a_hostile_file_no_trust(state: dict[str, Any], tmp_path: Path) -> None:
    checkpoints.save({**state, "args": Hostile(tmp_path / "executed")}, tmp_path)
    with pytest.raises(CheckpointError, match=r"refused, it asks for the Python object (posix|nt)\.system"):
        checkpoints.read(str(tmp_path / "checkpoint.pth"))
    with pytest.raises(CheckpointError, match="none of its checkpoints can be used"):
        checkpoints.latest(tmp_path)
    assert not (tmp_path / "executed").exists()


# ---- downloads ----


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address, served folder); torch.hub's folder is another temporary one."""
    served = tmp_path / "served"
    served.mkdir()
    hub_before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    handler = functools.partial(QuietHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as instance:
        threading.Thread(target=instance.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{instance.server_address[1]}", served
        instance.shutdown()
    torch.hub.set_dir(hub_before)


def test_a_url_is_downloaded_once_and_equal_file_names_do_not_collide(server: tuple[str, Path]) -> None:
    address, served = server
    for run in ("a", "b"):
        (served / run).mkdir()
        torch.save({"weight": torch.full((2,), float(ord(run)))}, served / run / "checkpoint.pth")
    for _ in range(2):
        for run in ("a", "b"):
            assert checkpoints.read(f"{address}/{run}/checkpoint.pth")["model"]["weight"][0] == ord(run)
        for file in served.glob("*/checkpoint.pth"):
            file.unlink()  # the second round is served from torch.hub's folder


def test_a_broken_download_is_an_error_once_and_not_for_ever(server: tuple[str, Path]) -> None:
    address, served = server
    (served / "x.pth").write_bytes(b"busy, try again later")
    with pytest.raises(CheckpointError, match=r"http://.*/x\.pth: .*text file"):
        checkpoints.read(f"{address}/x.pth")
    torch.save({"weight": torch.ones(2)}, served / "x.pth")
    assert "weight" in checkpoints.read(f"{address}/x.pth")["model"]
    with pytest.raises(CheckpointError, match="the download failed .*404"):
        checkpoints.read(f"{address}/none.pth")
    torch.save({"weight": torch.ones(2)}, served / "x-00000000.pth")
    with pytest.raises(CheckpointError, match="the download failed .*hash"):
        checkpoints.read(f"{address}/x-00000000.pth")


# ---- every name is accounted for ----


def is_lamb(name: str) -> bool:
    return name.rpartition(".")[2] in ("lamb", "lamb1", "lamb2")


class Scaled(torch.nn.Module):
    """A block with a remedy's parameter beside it."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.attn, self.norm1, self.norm2, self.mlp = block.attn, block.norm1, block.norm2, block.mlp
        self.lamb = torch.nn.Parameter(torch.zeros(2))


def vit_with_lamb() -> torch.nn.Module:
    model = small_vit()
    model.blocks = torch.nn.Sequential(*[Scaled(block) for block in model.blocks])
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2),
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=2),
        lambda: timm.create_model("cait_xxs24_224", img_size=32, patch_size=8, depth=2),
    ],
    ids=["vit", "distilled", "cait"],
)
def test_a_models_own_weights_load_strictly(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source, model = build(), build()
    assert checkpoints.load_weights(model, source.state_dict(), source="x.pth") == []
    torch.testing.assert_close(dict(model.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    count = len(source.state_dict())
    assert caplog.messages == [f"loaded {count} of {count} tensors from x.pth"]


def test_only_the_names_the_caller_allows_may_be_missing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plain, variant = small_vit().state_dict(), vit_with_lamb()
    missing = checkpoints.load_weights(variant, plain, source="x.pth", may_be_missing=is_lamb)
    assert missing == ["blocks.0.lamb", "blocks.1.lamb"]
    assert caplog.messages[0].endswith("from x.pth; left at initial value: blocks.*.lamb (2)")
    with pytest.raises(CheckpointError, match=r"2 missing: blocks\.0\.lamb, blocks\.1\.lamb: is it .* another --model"):
        checkpoints.load_weights(variant, plain, source="x.pth")
    with pytest.raises(CheckpointError, match=r"2 unexpected: blocks\.0\.lamb"):
        checkpoints.load_weights(small_vit(), variant.state_dict(), source="x.pth", may_be_missing=is_lamb)
    del plain["norm.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: norm\.bias"):
        checkpoints.load_weights(variant, plain, source="x.pth", may_be_missing=is_lamb, finetune=True)


def test_a_refused_file_changes_nothing_and_lists_ten_names_of_many() -> None:
    model = small_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {**small_vit(depth=4).state_dict(), "norm.weight": torch.ones(5)}
    with pytest.raises(CheckpointError, match=r"24 unexpected: (\S+, ){10}\.\.\.; 1 of another shape: norm\.weight"):
        checkpoints.load_weights(model, other, source="x.pth")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "cait_xxs24_224"])
def test_finetune_leaves_out_a_classifier_of_other_classes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model, source = small_vit(name), small_vit(name, num_classes=7)
    before = model.head.weight.clone()
    with pytest.raises(CheckpointError, match=r"of another shape: head\.weight \(7, 32\) in the file.*with --finetune"):
        checkpoints.load_weights(model, source.state_dict(), source="x.pth")
    missing = checkpoints.load_weights(model, source.state_dict(), source="x.pth", finetune=True)
    heads = ["head", "head_dist"] if "distilled" in name else ["head"]
    assert missing == [f"{head}.{end}" for head in heads for end in ("weight", "bias")]
    assert torch.equal(model.head.weight, before) and torch.equal(model.pos_embed, source.pos_embed)
    assert "dropped head (7 classes in the file, 10 in the model)" in caplog.text
    same_classes = small_vit(name, num_classes=7)
    assert checkpoints.load_weights(same_classes, source.state_dict(), source="x.pth", finetune=True) == []


@pytest.mark.parametrize(
    ("name", "prefix"), [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2), ("cait_xxs24_224", 0)]
)
@pytest.mark.parametrize("new_size", [48, 24, (32, 64)], ids=str)
def test_finetune_interpolates_position_embeddings_as_deit_does(
    name: str, prefix: int, new_size: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model, source = small_vit(name, img_size=new_size), small_vit(name)
    with pytest.raises(CheckpointError, match=r"of another shape: pos_embed.*with --finetune"):
        checkpoints.load_weights(model, source.state_dict(), source="x.pth")
    assert checkpoints.load_weights(model, source.state_dict(), source="x.pth", finetune=True) == []
    grid = model.patch_embed.grid_size
    patches = source.pos_embed[:, prefix:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    expected = torch.cat([source.pos_embed[:, :prefix], patches.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(model.pos_embed, expected)
    assert f"interpolated pos_embed from 4x4 to {grid[0]}x{grid[1]}" in caplog.text


def test_finetune_takes_a_distilled_checkpoint_into_a_plain_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    distilled = small_vit("deit_tiny_distilled_patch16_224", num_classes=7)
    for img_size in (32, 48):
        model = small_vit("deit_tiny_patch16_224", img_size=img_size)
        assert checkpoints.load_weights(model, distilled.state_dict(), source="x", finetune=True) == [
            "head.weight",
            "head.bias",
        ]
        assert torch.equal(model.pos_embed[:, 0], distilled.pos_embed[:, 0])
    assert "dropped dist_token and head_dist" in caplog.text
    model = small_vit("deit_tiny_patch16_224", num_classes=7)
    with pytest.raises(CheckpointError, match=r"3 unexpected: dist_token, .*with --finetune"):
        checkpoints.load_weights(model, distilled.state_dict(), source="x")
    checkpoints.load_weights(model, distilled.state_dict(), source="x", finetune=True)
    assert torch.equal(model.pos_embed[:, 1:], distilled.pos_embed[:, 2:])
    with pytest.raises(CheckpointError, match="missing: dist_token, head_dist"):  # the other way round is no fine-tune
        checkpoints.load_weights(distilled, model.state_dict(), source="x", finetune=True)


def test_finetune_does_not_excuse_another_model() -> None:
    for other in (small_vit(embed_dim=48), small_vit(patch_size=16), small_vit("cait_xxs24_224")):
        with pytest.raises(CheckpointError, match="another --model"):
            checkpoints.load_weights(small_vit(), other.state_dict(), source="x", finetune=True)


# ---- resuming ----


def test_a_full_state_is_resumed_and_anything_less_gives_weights_only(state: dict[str, Any]) -> None:
    assert checkpoints.can_resume(state, missing=[])
    assert not checkpoints.can_resume(state, missing=["blocks.0.attn.lamb"])
    assert not checkpoints.can_resume({"model": state["model"], "epoch": 3}, missing=[])
    assert not checkpoints.can_resume({"model": state["model"], "optimizer": state["optimizer"]}, missing=[])


def test_the_optimizer_takes_moments_from_the_file_and_settings_from_the_command_line(state: dict[str, Any]) -> None:
    model = small_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=7e-4, weight_decay=0.3, betas=(0.8, 0.9))
    checkpoints.load_optimizer(optimizer, state["optimizer"])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (7e-4, 0.3, (0.8, 0.9))
    for index, parameter in enumerate(model.parameters()):
        torch.testing.assert_close(optimizer.state[parameter], state["optimizer"]["state"][index])
    with pytest.raises(CheckpointError, match=r"groups of sizes \[\d+\], this run's has \[\d+, \d+\]"):
        two_groups = [{"params": list(model.parameters())[:3]}, {"params": list(model.parameters())[3:]}]
        checkpoints.load_optimizer(torch.optim.AdamW(two_groups), state["optimizer"])
    with pytest.raises(CheckpointError, match="another --opt"):
        checkpoints.load_optimizer(torch.optim.SGD(model.parameters(), momentum=0.9), state["optimizer"])


def test_a_resumed_optimizer_makes_the_step_an_uninterrupted_one_makes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = torch.randn(3, 2, 3, 32, 32)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()

    model = small_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for images in batches[:2]:
        step(model, optimizer, images)
    state = checkpoints.assemble(
        model=model, model_ema=None, optimizer=optimizer, scaler=None, epoch=-1, step=2, meters={}, max_accuracy={},
        args=argparse.Namespace(),
    )  # fmt: skip
    checkpoints.save(state, tmp_path)
    step(model, optimizer, batches[2])

    _, state = checkpoints.latest(tmp_path)
    resumed = small_vit()
    assert checkpoints.load_weights(resumed, state["model"], source="checkpoint.pth") == []
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    checkpoints.load_optimizer(resumed_optimizer, state["optimizer"])
    step(resumed, resumed_optimizer, batches[2])
    torch.testing.assert_close(dict(resumed.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_number_of_classes() -> None:
    assert checkpoints.number_of_classes(small_vit().state_dict()) == 10
    assert checkpoints.number_of_classes(small_vit(num_classes=0).state_dict()) is None
