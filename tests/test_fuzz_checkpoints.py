"""Damaged and hostile checkpoints: a sentence or a state that trains on; no traceback, hang, signal or memory bomb."""

import collections
import copy
import io
import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from fuzzing import CASES, EXTREMES, SCALE, damage, in_time, watched
from torch import nn

import checkpoints
from oversmoothing.weights import CheckpointError, load_weights, number_of_classes, read_checkpoint, trained_with

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.head = nn.Linear(4, 3)
        self.patch_embed = nn.Identity()
        self.patch_embed.num_patches, self.patch_embed.grid_size = 4, (2, 2)

    def get_classifier(self) -> nn.Module:
        return self.head


def training_state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train_on(model, optimizer)
    return {
        "model": dict(model.state_dict()),
        "model_ema": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "optimizer_class": "AdamW",
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "epoch": 3,
        "step": 2,
        "meters": {"0": {"loss": [1.5, 8.0]}},
        "max_accuracy": {"acc1": 12.5},
        "args": {"model": "tiny", "input_size": 32, "batch_size": 8, "model_kwargs": {"depth": 2}, "opt_betas": None},
        "data": {"images": 8, "digest": "0" * 64},
        "format": 1,
    }


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def use(checkpoint: dict[str, Any]) -> None:
    """What a run, export, push and analysis do with a checkpoint that was accepted."""
    model, ema = Tiny(), Tiny()
    missing = load_weights(model, checkpoint["model"], source="x.pth")
    load_weights(Tiny(), checkpoint["model"], source="x.pth", finetune=True)
    if checkpoint.get("model_ema"):
        load_weights(ema, checkpoint["model_ema"], source="x.pth")
    assert number_of_classes(checkpoint["model"]) == 3
    trained_with(checkpoint)
    if not checkpoints.can_resume(checkpoint, missing):
        return
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoints.load_optimizer(optimizer, checkpoint["optimizer"], checkpoint.get("optimizer_class"), "x.pth")
    train_on(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    if checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
        scaler.scale(torch.ones(()))
        scaler.update(1.0)
    assert 0 <= checkpoint["epoch"] + 1 <= 10**6 + 1 and 0 <= (checkpoint.get("step") or 0) <= 10**9
    sums = (checkpoint.get("meters") or {}).get("0") or {}
    assert all(np.isfinite(total) and count >= 0 for total, count in sums.values())
    assert all(np.isfinite(value) for value in (checkpoint.get("max_accuracy") or {}).values())
    (checkpoint.get("args") or {}).get("eval_crop_ratio")
    (checkpoint.get("data") or {"images": 0})["images"] + 1


def outcome(path: Path) -> bool:
    """Whether a file is accepted; if not, by one printable sentence that names it."""
    try:
        use(read_checkpoint(path))
        return True
    except CheckpointError as error:
        text = str(error)
        assert "x.pth" in text and "\n" not in text and text.isprintable() and len(text) < 2000, text
        return False


# ---- fields ----


def hostile_values(rng: random.Random) -> Any:
    nested: list = []
    for _ in range(200):
        nested = [nested]
    loop: list = []
    loop.append(loop)
    values = [
        *(None, True, "", "x" * 10_000, "a\nb\x1b[31m", b"bytes", float("nan"), float("inf"), -float("inf"), -1, 1e308),
        *EXTREMES,
        *(
            10**30,
            -(10**30),
            [],
            {},
            (),
            [1],
            {"a": 1},
            {1: 2},
            {None: None},
            {"0": {"loss": "x"}},
            set(),
            nested,
            loop,
        ),
        *(torch.tensor(1.0), torch.zeros(0), torch.zeros(2, 2), torch.zeros(5, 4, dtype=torch.int64)),
        *(torch.zeros(3, 4, dtype=torch.complex64), torch.tensor(float("nan")), torch.zeros(1).expand(1000)),
        *(torch.zeros(1000, 1000), torch.zeros(3, 4).to_sparse(), torch.zeros(3, 4, device="meta")),
        *(torch.quantize_per_tensor(torch.zeros(3, 4), 0.1, 0, torch.qint8), nn.Parameter(torch.ones(3))),
        *(torch.zeros(3, dtype=torch.bool), torch.float32, torch.device("cpu"), collections.OrderedDict(a=1)),
    ]
    return rng.choice(values)


def spoil(rng: random.Random, state: Any) -> None:
    """Replaces, removes, renames or adds an entry somewhere below ``state``."""
    while True:
        key = (
            rng.choice(list(state))
            if isinstance(state, dict) and state
            else rng.randrange(len(state))
            if state
            else None
        )
        inner = state[key] if key is not None else None
        if isinstance(inner, dict | list) and len(inner) and rng.random() < 0.7:
            state = inner
            continue
        kind = rng.randrange(6)
        if key is None:
            return
        if kind == 0:
            del state[key]
        elif kind == 1 and isinstance(state, dict):
            state[rng.choice(("lookahead_step", "step", "0", 7, "module.head.bias", "x" * 600, "\n", None))] = inner
        else:
            state[key] = hostile_values(rng)
        return


def test_spoiled_fields_of_a_checkpoint_of_ones_own(tmp_path: Path) -> None:
    """They carry the digest, as files of an older version, of another program or of an attacker may."""
    rng, good = random.Random(SCALE), training_state()
    path, outcomes = tmp_path / "x.pth", []
    checkpoints.write(good, path, keep_previous=False)
    assert outcome(path)
    with watched():
        for case in range(CASES):
            state = copy.deepcopy(good)
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                spoil(rng, state)
            write(state, path)
            with in_time(case):
                outcomes.append(outcome(path))
    assert 0.02 < np.mean(outcomes) < 0.5


def write(state: Any, path: Path) -> None:
    """Without the disk's part of ``checkpoints.write``."""
    with open(path, "w+b") as file:
        torch.save(state, file)
        checkpoints._append_digest(file)


# ---- bytes ----


def zip_with(content: bytes, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A file of ``torch.save`` with another pickle, and right CRCs."""
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, record in {**records, "archive/data.pkl": content}.items():
                archive.writestr(name, record)
        return buffer.getvalue()


def saved(state: Any, **kwargs: Any) -> bytes:
    with io.BytesIO() as buffer:
        torch.save(state, buffer, **kwargs)
        return buffer.getvalue()


def foreign_state() -> dict[str, Any]:
    return {key: value for key, value in training_state().items() if key != "format"}


def records_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def spoiled_pickle() -> Callable[[random.Random], bytes]:
    records = records_of(saved(foreign_state()))
    return lambda rng: zip_with(damage(rng, records["archive/data.pkl"]), records)


def spoiled_file(**kwargs: Any) -> Callable[[random.Random], bytes]:
    content = saved(foreign_state(), **kwargs)
    return lambda rng: damage(rng, content)


def spoiled_safetensors() -> Callable[[random.Random], bytes]:
    content = safetensors.torch.save(training_state()["model"])
    return lambda rng: damage(rng, content[:400]) + content[400:]


@pytest.mark.parametrize(
    "make",
    [spoiled_pickle, spoiled_file, lambda: spoiled_file(_use_new_zipfile_serialization=False), spoiled_safetensors],
    ids=["pickle", "zip", "older format", "safetensors"],
)
def test_damaged_bytes_of_a_foreign_checkpoint(make: Callable, tmp_path: Path) -> None:
    rng, spoiled, path, outcomes = random.Random(SCALE), make(), tmp_path / "x.pth", []
    with watched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in range(CASES):
            path.write_bytes(spoiled(rng))
            with in_time(case):
                outcomes.append(outcome(path))
    assert 0 < np.mean(outcomes) < 0.6


# ---- bombs ----


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Storage:
    def __init__(self, elements: int) -> None:
        self.elements = elements


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", value.elements) if isinstance(value, Storage) else None


def crafted(state: Any) -> bytes:
    with io.BytesIO() as buffer:
        Pickler(buffer, 2).dump(state)
        return buffer.getvalue()


def tensor(elements: int, size: tuple, stride: tuple, offset: int = 0) -> Call:
    arguments = (Storage(elements), offset, size, stride, False, collections.OrderedDict())
    return Call(torch._utils._rebuild_tensor_v2, *arguments)


def doubled(times: int) -> list:
    """A list that unfolds to 2 ** times entries."""
    value: list = ["x"]
    for _ in range(times):
        value = [value, value]
    return value


BOMBS = {
    "a constructor": {"w": Call(torch.Tensor, 10**10)},
    "a storage": {"w": Call(torch.FloatStorage, 10**10)},
    "bytes": {"w": Call(bytearray, 10**10)},
    "larger than its storage": {"w": tensor(4, (10**9,), (1,))},
    "expanded": {"w": tensor(4, (10**5, 10**5), (0, 0))},
    "a declared storage": {"w": tensor(10**9, (10**9,), (1,))},
    "beyond the end": {"w": tensor(4, (4,), (1,), 4)},
    "before the start": {"w": tensor(4, (4,), (1,), -4)},
    "backwards": {"w": tensor(4, (4,), (-1,), 3)},
    "overflow": {"w": tensor(4, (2**40, 2**40), (2**40, 1))},
    "unfolding": {"model": {"w": tensor(4, (4,), (1,))}, "args": {"a": doubled(60)}},
}


@pytest.mark.parametrize("kind", list(BOMBS))
def test_a_small_file_takes_no_more_memory_than_it_has(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(zip_with(crafted(BOMBS[kind]), {"archive/data/0": bytes(16), "archive/byteorder": b"little"}))
    with watched(), in_time(kind), pytest.raises(CheckpointError, match=r"x\.pth: (cannot be read|refused)"):
        read_checkpoint(path)


def test_other_bombs(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    memo = b"\x80\x02}r\xff\xff\xff\x7f."  # its object has the number 2**31
    zeros = torch.zeros(25_000_000)
    for content in (
        zip_with(memo, {}),
        zip_with(crafted({"w": tensor(len(zeros), (len(zeros),), (1,))}), {"archive/data/0": bytes(10**8)}, 8),
        zip_with(b"\x80\x02" + b"]" * (17 << 20) + b".", {}, zipfile.ZIP_DEFLATED),
        saved({"w": torch.zeros(4)}, _use_new_zipfile_serialization=False).replace(b"K\x04", b"J\0\0\0\x7f"),
    ):
        path.write_bytes(content)
        with watched(), in_time("bomb"), pytest.raises(CheckpointError, match=r"x\.pth: cannot be read"):
            read_checkpoint(path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pth")
    for path in (tmp_path / "x.pth", "/dev/zero"):
        with in_time(path), pytest.raises(CheckpointError, match="is a FIFO, device or socket, no file"):
            read_checkpoint(path)
