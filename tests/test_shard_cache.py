"""The cache of remote shards: whose it is, what it is checked for, and what happens to what others leave there."""

import json
import os
import shutil
import stat
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from runs import tiny_tree

from readers import archives, shards
from readers.archives import DataError
from readers.shards import RemoteMembers
from scripts.prepare_wds import prepare_wds

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user's files need root")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards for training, of seven images but the last."""
    folder = tmp_path_factory.mktemp("shards")
    prepare_wds(tiny_tree(tmp_path_factory.mktemp("tree"), train=16, val=4), folder, (7, float("inf")), seed=0)
    return folder


def members_of(root: str | Path, cache: Path, limit: float = 2**30) -> RemoteMembers:
    shards.read_info.cache_clear()
    address = root if isinstance(root, str) else f"pipe:cat {root}/{{}}"
    return RemoteMembers(shards.open_split(address, "train"), cache, limit)


def read_all(members: RemoteMembers) -> list[bytes]:
    return [member.read() for member, _ in members]


@pytest.fixture
def expected(folder: Path) -> list[bytes]:
    rows = [
        row
        for path in sorted(folder.glob("train-*.tar"))
        for row in archives.Members([str(path)], shards.scan_shard(str(path)))
    ]
    return [member.read() for member, _ in rows]  # fmt: skip


def new_process() -> None:
    """What is open or known of the cache in this process is forgotten, as in the next run."""
    for path in list(archives._open_files):
        archives.close(path)


# ---- whose it is ----


def test_the_default_is_in_the_users_own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shards.default_cache() == tmp_path / "vit-anti-oversmoothing" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shards.default_cache() == tmp_path / ".cache" / "vit-anti-oversmoothing" / "shards"


def test_nobody_else_can_write_into_the_cache(folder: Path, tmp_path: Path) -> None:
    members = members_of(folder, tmp_path / "cache")
    old = os.umask(0)
    try:
        read_all(members)
    finally:
        os.umask(old)
    assert stat.S_IMODE(members.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(members.path(0).with_suffix(".lock").stat().st_mode) == 0o600


def planted(members: RemoteMembers, folder: Path, how: str) -> None:
    """A cache as somebody else may prepare it in a shared folder, its names being known."""
    members.base.mkdir(parents=True)
    if how == "link":
        elsewhere = members.base.parent / "elsewhere"
        elsewhere.mkdir(mode=0o700)
        members.folder.symlink_to(elsewhere)
        return
    members.folder.mkdir()
    shutil.copy(folder / "train-000000.tar", members.path(0))
    np.save(members.path(0).with_suffix(".npy"), shards.scan_shard(str(members.path(0))))
    if how == "owner":
        os.chown(members.folder, 65534, 65534)
    elif how == "mode":
        members.folder.chmod(0o770)
    elif how == "base":
        members.base.chmod(0o777)
        members.folder.chmod(0o700)


@pytest.mark.parametrize("how", ["link", pytest.param("owner", marks=needs_root), "mode", "base"])
def test_a_cache_that_others_can_fill_is_refused(how: str, folder: Path, tmp_path: Path) -> None:
    members = members_of(folder, tmp_path / "shared")
    planted(members, folder, how)
    with pytest.raises(DataError, match="--shard-cache.*(who could put images there|written by everybody)"):
        members[0]


def test_planted_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    """A lock file once cut a victim's file to zero."""
    members = members_of(folder, tmp_path / "cache")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    members.folder.mkdir(parents=True, mode=0o700)
    members.path(0).with_suffix(".lock").symlink_to(victim)
    with pytest.raises(DataError, match="--shard-cache .* cannot take a shard"):
        members[0]
    assert victim.read_text() == "precious"
    members.path(0).with_suffix(".lock").unlink()
    members.path(0).symlink_to(victim)
    assert members[0][0].read() and victim.read_text() == "precious"


def test_nothing_but_the_caches_own_folders_is_counted_or_removed(folder: Path, tmp_path: Path) -> None:
    """--shard-cache may be a folder that holds other things."""
    other = tmp_path / "features"
    other.mkdir()
    for name in ("train.npy", "train.tar", "train.12345678.part"):
        (other / name).write_bytes(bytes(10**6))
    read_all(members_of(folder, tmp_path, limit=1))
    assert len(list(other.iterdir())) == 3


# ---- what is checked ----


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tar: tar.with_suffix(".npy").unlink(),
        lambda tar: tar.with_suffix(".npy").write_bytes(b""),
        lambda tar: tar.with_suffix(".npy").write_bytes(tar.with_suffix(".npy").read_bytes()[:-7]),
        lambda tar: tar.unlink(),
        lambda tar: tar.write_bytes(b""),
        lambda tar: tar.write_bytes(tar.read_bytes()[:2000]),
        lambda tar: shutil.copy(tar.with_name("train-000001.tar"), tar),
        lambda tar: tar.write_bytes(bytes(byte ^ (place % 997 == 700) for place, byte in enumerate(tar.read_bytes()))),
    ],
    ids=["no table", "empty table", "cut table", "no shard", "empty shard", "cut shard", "another's", "flipped bits"],
)
def test_a_damaged_shard_is_fetched_again(spoil: object, folder: Path, expected: list, tmp_path: Path) -> None:
    assert read_all(members_of(folder, tmp_path)) == expected
    members = members_of(folder, tmp_path)
    spoil(members.path(0))
    new_process()
    assert read_all(members) == expected
    new_process()
    assert read_all(members_of(folder, tmp_path)) == expected


@pytest.mark.parametrize("moment", ["_to_disk", "_locked", "disk_usage"])
def test_the_cache_may_be_removed_at_any_moment(
    moment: str, folder: Path, expected: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a shard is written, before it is locked, before it is downloaded; and after it was opened."""
    owner = shutil if moment == "disk_usage" else shards
    original, removed = getattr(owner, moment), []

    def remove_before(*arguments: object, **kwargs: object) -> object:
        if len(removed) % 3 == 0:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        removed.append(moment)
        return original(*arguments, **kwargs)

    monkeypatch.setattr(owner, moment, remove_before)
    members = members_of(folder, tmp_path / "cache")
    assert read_all(members) == expected and len(removed) > 2
    monkeypatch.undo()
    member, _ = members[0]
    shutil.rmtree(tmp_path / "cache")
    assert member.read() == expected[0]


def test_parts_of_killed_downloads_make_room(folder: Path, tmp_path: Path) -> None:
    members = members_of(folder, tmp_path)
    members.folder.mkdir(parents=True, mode=0o700)
    parts = [members.folder / f"train-000001.{name}.part" for name in ("0123abcd", "0123abcd.npy")]
    for part in parts:
        part.write_bytes(bytes(1000))
    busy = members.folder / "train-000002.0123abcd.part"
    busy.write_bytes(b"another process is at it")
    with shards._locked(members.path(2)):
        members[0]
        assert busy.exists() and not any(part.exists() for part in parts)


# ---- servers ----


class Moody(BaseHTTPRequestHandler):
    """The first answers for a shard are not what was asked for."""

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        content = (self.server.folder / name).read_bytes() if (self.server.folder / name).exists() else b""
        if name.endswith(".tar") and self.server.moods:
            content = self.server.moods.pop(0)(content)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    if shutil.which("curl") is None:
        pytest.skip("http:// is opened with curl, which is not here")
    monkeypatch.setattr(shards, "PAUSE_S", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Moody) as server:
        server.folder, server.moods = folder, []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def page(content: bytes) -> bytes:
    return b"<!DOCTYPE html><html>Please log in</html>"


def test_web_pages_and_cut_bodies_are_asked_for_again(server: object, expected: list, tmp_path: Path) -> None:
    server.moods = [page, lambda content: content[:3000], lambda content: b"", lambda content: content[:-9000]]
    url = f"http://127.0.0.1:{server.server_address[1]}"
    members = members_of(url, tmp_path)
    assert read_all(members) == expected
    server.moods = [page] * shards.ATTEMPTS
    with pytest.raises(DataError, match=rf"--data-path: {url}/train-000000.tar could not be fetched .*a web page came"):
        members_of(url, tmp_path / "other")[0]
    server.moods = [lambda content: content[:-20_000]] * shards.ATTEMPTS
    with pytest.raises(DataError, match=rf"{url}/train-000000.tar could not be fetched .*no whole tar came"):
        members_of(url, tmp_path / "other")[0]
    assert not list(tmp_path.rglob("*.part"))


def test_an_index_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "MAX_INDEX", 1000)
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {}, "x": "x" * 2000}))
    for root in (f"pipe:cat {tmp_path}/{{}}", str(tmp_path)):
        shards.read_info.cache_clear()
        with pytest.raises(DataError, match="_info.json.*larger than"):
            shards.read_info(root)
