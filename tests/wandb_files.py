"""Reads the files of Weights & Biases: records of ``wandb_internal.proto`` in the log format of LevelDB."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, CHUNK_HEADER = 32768, 7, 7
FULL, LAST = 1, 4  # kinds of chunks that end a record


def records(file: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records that are complete; a kill may have cut off the last one."""
    data, at, record = file.read_bytes(), FILE_HEADER, b""
    assert not data or data[:4] == b":W&B"
    while at + CHUNK_HEADER <= len(data):
        left = BLOCK - at % BLOCK
        _, length, kind = struct.unpack("<IHB", data[at : at + CHUNK_HEADER])
        if left < CHUNK_HEADER or kind == 0:
            at += left
            continue
        record += data[at + CHUNK_HEADER : at + CHUNK_HEADER + length]
        at += CHUNK_HEADER + length
        if kind in (FULL, LAST) and at <= len(data):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged, a dict each time; dots join the names of nested values."""
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records(file)
        if record.WhichOneof("record_type") == "history"
    ]


def run_of(file: Path) -> wandb_internal_pb2.RunRecord:
    """Id, name, project, tags and configuration."""
    return next(record.run for record in records(file) if record.WhichOneof("record_type") == "run")
