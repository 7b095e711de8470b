"""Addresses of checkpoints: downloads from servers and from the Hub, kept, checked, and explained when they fail."""

import functools
import hashlib
import http.server
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import LocalHub, serving, use
from huggingface_hub import constants
from runs import TINY, call_main, free_port, tiny_tree
from safetensors.torch import save
from states import Hostile

from oversmoothing.weights import CheckpointError, fetch, read_checkpoint

# ---- URLs ----


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
        threading.Thread(target=instance.serve_forever, args=(0.01,), daemon=True).start()
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
            assert read_checkpoint(f"{address}/{run}/checkpoint.pth")["model"]["weight"][0] == ord(run)
        for file in served.glob("*/checkpoint.pth"):
            file.unlink()  # the second round is served from torch.hub's folder


def test_a_broken_download_is_an_error_once_and_not_for_ever(server: tuple[str, Path]) -> None:
    address, served = server
    (served / "x.pth").write_bytes(b"busy, try again later")
    with pytest.raises(CheckpointError, match=r"http://.*/x\.pth: .*text file"):
        read_checkpoint(f"{address}/x.pth")
    torch.save({"weight": torch.ones(2)}, served / "x.pth")
    assert "weight" in read_checkpoint(f"{address}/x.pth")["model"]
    with pytest.raises(CheckpointError, match="the download failed .*404"):
        read_checkpoint(f"{address}/none.pth")
    torch.save({"weight": torch.ones(2)}, served / "x-00000000.pth")
    with pytest.raises(CheckpointError, match="the download failed .*hash"):
        read_checkpoint(f"{address}/x-00000000.pth")


@pytest.mark.parametrize("name", ["checkpoint.pth", "x-{digest}.pth"])
def test_a_kept_download_is_checked_each_time(
    name: str, server: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    address, served = server
    torch.save({"weight": torch.ones(2)}, served / "content")
    content = (served / "content").read_bytes()
    name = name.format(digest=hashlib.sha256(content).hexdigest()[:8])
    (served / name).write_bytes(content)
    path = fetch.local_file(f"{address}/{name}")
    assert path.read_bytes() == content and fetch.local_file(f"{address}/{name}") == path
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    path.write_bytes(damaged)
    assert fetch.local_file(f"{address}/{name}").read_bytes() == content
    assert "is damaged: downloading it again" in caplog.text
    path.write_bytes(damaged)
    (served / name).unlink()
    with pytest.raises(CheckpointError, match="the download failed .*404"):
        read_checkpoint(f"{address}/{name}")


def test_a_server_that_breaks_off_or_never_answers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Path]
) -> None:
    class Hostile(QuietHandler):
        def do_GET(self) -> None:
            if "silent" in self.path:
                time.sleep(2)
                return
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(bytes(100))
            self.close_connection = True

    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as instance:
        threading.Thread(target=instance.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{instance.server_address[1]}"
        for path, message in (("cut.pth", "100 of 1000 bytes came|IncompleteRead"), ("silent.pth", "timed out")):
            with pytest.raises(CheckpointError, match=rf"/{path}: the download failed .*({message})"):
                read_checkpoint(f"{address}/{path}")
        instance.shutdown()
    assert not list(Path(torch.hub.get_dir()).rglob("*.p*"))


# ---- the Hub ----

WEIGHTS = {"head.weight": torch.arange(40.0).reshape(10, 4), "head.bias": torch.ones(10)}


def torch_file(content: Any, folder: Path) -> bytes:
    torch.save(content, folder / "content")
    return (folder / "content").read_bytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with serving(LocalHub()) as instance:
        use(instance, tmp_path, monkeypatch)
        instance.add("ann/plain", "README.md", b"# A model")
        instance.add("ann/plain", "model.safetensors", save(WEIGHTS))
        yield instance


@pytest.mark.parametrize("end", ["", "/model.safetensors", "@main", "@main/model.safetensors"])
def test_a_file_of_the_hub_is_read_and_comes_from_the_cache_the_second_time(
    end: str, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "oversmoothing.weights.fetch")
    torch.testing.assert_close(read_checkpoint(f"hf-hub:ann/plain{end}")["model"], WEIGHTS)
    assert ("taking its model.safetensors" in caplog.text) == ("/" not in end)
    downloads = [line for line in hub.requests if line.startswith("GET /large/")]
    assert len(downloads) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(read_checkpoint(f"hf-hub:ann/plain{end}")["model"], WEIGHTS)
    assert [line for line in hub.requests if line.startswith("GET /large/")] == downloads


def test_what_is_in_the_cache_is_used_when_the_hub_cannot_be_reached(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch.local_file("hf-hub:ann/plain")
    hub.address = f"http://127.0.0.1:{free_port()}"  # nobody is there
    use(hub, tmp_path, monkeypatch)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # its pauses between attempts
    assert fetch.local_file("hf-hub:ann/plain") == first
    with pytest.raises(
        fetch.FetchError, match=r"hf-hub:bob/other: the download from http://127.* failed \(ConnectError"
    ):
        fetch.local_file("hf-hub:bob/other")
    with pytest.raises(fetch.FetchError, match=r"failed \(ConnectError.*check the network and .* pass its path"):
        fetch.local_file("hf-hub:ann/plain/other.pth")


def test_a_new_upload_is_noticed_and_a_commit_stays_what_it_was(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.commit("ann/plain")
    hub.add("ann/other", "model.safetensors", save(WEIGHTS))
    assert read_checkpoint("hf-hub:ann/plain")["model"].keys() == WEIGHTS.keys()
    assert read_checkpoint(f"hf-hub:ann/plain@{commit}")["model"].keys() == WEIGHTS.keys()
    hub.add("ann/plain", "model.safetensors", save({"new": torch.ones(1)}))
    assert read_checkpoint("hf-hub:ann/plain")["model"].keys() == {"new"}
    assert read_checkpoint(f"hf-hub:ann/plain@{commit}/model.safetensors")["model"].keys() == WEIGHTS.keys()


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["b.pth", "model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["b.pth", "checkpoint.pth", "best_checkpoint.pth", "log.txt"], "checkpoint.pth"),
        (["README.md", "sub/only.pth", "log.txt"], "sub/only.pth"),
        (["a.pth", "b.pth"], "holds a.pth, b.pth: name one of them, as in hf-hub:ann/x/a.pth"),
        (["README.md"], "holds no weights"),
    ],
)
def test_without_a_file_name_the_usual_or_only_file_is_taken(
    names: list[str], chosen: str, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        hub.add("ann/x", name, save({name: torch.ones(1)}))
    if chosen not in names:
        with pytest.raises(fetch.FetchError, match=chosen):
            fetch.local_file("hf-hub:ann/x")
        return
    assert read_checkpoint("hf-hub:ann/x")["model"].keys() == {chosen}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_checkpoint("hf-hub:ann/x")["model"].keys() == {chosen}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf-hub:ann/none", "knows no such repository, or it is private: check the name, or `hf auth login`"),
        ("hf-hub:ann/none/x.pth", "knows no such repository"),
        ("hf-hub:ann/gated", "its owner grants access on its page: ask there, then `hf auth login`"),
        ("hf-hub:ann/gated/model.safetensors", "its owner grants access"),
        ("hf-hub:ann/plain@v2", "no such revision: give a branch"),
        ("hf-hub:ann/plain@refs/pr/7/x.pth", "no such revision"),
        ("hf-hub:ann/plain/x.pth", r"no x\.pth in that repository; its weights: model\.safetensors: name one"),
        ("hf-hub:ann", r"is not an address on the Hub: write hf-hub:owner/name\[@revision\]\[/file\]"),
        ("hf-hub:ann/plain/", "is not an address on the Hub"),
        ("hf-hub:an n/plain", "failed .*check the network and the address"),
        ("hf-hub:ann/plain/README.md", "is not a checkpoint .* a text file"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_sentence_that_names_it(address: str, message: str, hub: LocalHub) -> None:
    hub.add("ann/gated", "model.safetensors", save(WEIGHTS))
    hub.gated.add("ann/gated")
    with pytest.raises(CheckpointError, match=f"^{address}: .*{message}") as caught:
        read_checkpoint(address)
    assert "\n" not in str(caught.value)


def test_offline_without_the_file_says_how_to_get_it(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for address in ("hf-hub:ann/plain", "hf-hub:ann/plain/model.safetensors"):
        with pytest.raises(
            fetch.FetchError, match="is not in the cache .* HF_HUB_OFFLINE is set: unset it to download"
        ):
            fetch.local_file(address)
    assert not hub.requests


@pytest.mark.parametrize("where", ["on the way", "in the cache"])
def test_a_damaged_copy_is_noticed_removed_and_downloaded_again(where: str, hub: LocalHub) -> None:
    """One flipped bit in a tensor: the format has no checksum, the Hub's library compares sizes."""
    digest = hashlib.sha256(save(WEIGHTS)).hexdigest()
    if where == "on the way":
        hub.corrupt.add(digest)
    else:
        path = fetch.local_file("hf-hub:ann/plain")
        path.resolve().write_bytes(save({**WEIGHTS, "head.bias": torch.zeros(10)}))
    with pytest.raises(CheckpointError, match="copy in the cache was damaged .* the same command downloads it again"):
        read_checkpoint("hf-hub:ann/plain")
    hub.corrupt.clear()
    torch.testing.assert_close(read_checkpoint("hf-hub:ann/plain")["model"], WEIGHTS)


def test_published_files_are_read_as_strictly_as_any_other(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    hub.add("ann/x", "hostile.pth", torch_file({"model": WEIGHTS, "args": Hostile(marker)}, tmp_path))
    with pytest.raises(CheckpointError, match="hostile.pth: refused, it asks for the Python object"):
        read_checkpoint("hf-hub:ann/x/hostile.pth")
    assert not marker.exists()
    hub.add("ann/x", "short.pth", torch_file({"model": WEIGHTS}, tmp_path)[:-50])
    with pytest.raises(CheckpointError, match=r"short\.pth: cannot be read as a checkpoint, truncated or damaged"):
        read_checkpoint("hf-hub:ann/x/short.pth")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch.local_file("hf-hub:ann/x/short.pth").exists()  # what was published stays in the shared cache


def test_a_run_takes_an_address_where_it_takes_a_file(hub: LocalHub, tmp_path: Path) -> None:
    size = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=32)
    hub.add(
        "ann/run",
        "best.pth",
        torch_file(timm.create_model("attnscale_small_12", num_classes=3, **size).state_dict(), tmp_path),
    )
    data = tiny_tree(tmp_path / "data", train=4, val=4)
    for flag in ("--resume", "--finetune"):
        done = call_main(*TINY, "--data-path", data, "--eval", flag, "hf-hub:ann/run")
        assert "hf-hub:ann/run: taking its best.pth" in done.stdout and "HTTP Request" not in done.stdout
        assert "loaded 34 of 34 tensors from hf-hub:ann/run" in done.stdout and "Accuracy of the network" in done.stdout
    done = call_main(*TINY, "--data-path", data, "--eval", "--resume", "hf-hub:ann/none", code=2)
    assert (
        done.stderr.startswith("error: hf-hub:ann/none: the Hub knows no such repository")
        and done.stderr.count("\n") == 1
    )


def test_another_cache_folder_is_used_where_one_is_named(hub: LocalHub, tmp_path: Path) -> None:
    assert fetch.local_file("hf-hub:ann/plain", tmp_path / "mine").is_relative_to(tmp_path / "mine")
    assert not Path(constants.HF_HUB_CACHE).exists()
