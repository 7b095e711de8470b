"""WebDataset shards: local ones are the tree they were made from, remote ones are exact in an order of their own."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks
from runs import TINY, call_main, tiny_tree
from test_archives import assert_same_samples
from test_datasets import make_args
from test_resume import assert_same_results
from torch.utils.data import DataLoader

import datasets
import entry
from readers import archives, shards
from readers.archives import DataError
from readers.images import load_image
from readers.loader import AddressedDataset, build_loader
from samplers import ShardSampler, build_samplers
from scripts.prepare_wds import index_shards, prepare_wds

TRAIN, VAL = 64, 14

# A machine with fewer cores than a test has workers is no problem here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("tree"), train=TRAIN, val=VAL)


@pytest.fixture(scope="module")
def folder(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of seven images: ten for training, two for validation."""
    folder = tmp_path_factory.mktemp("shards")
    prepare_wds(tree, folder, (7, float("inf")), seed=0)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Shards that a test may spoil."""
    shards.read_info.cache_clear()
    return shutil.copytree(folder, tmp_path / "copy")


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, counts what is asked for, and breaks off the first answers if told so."""

    def __init__(self, *args: object, asked: Counter, broken: Counter, **kwargs: object) -> None:
        self.asked, self.broken = asked, broken
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.asked[name] += 1
        if self.broken[name] > 0:
            self.broken[name] -= 1
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


class Server:
    """A web server of one folder; ``asked`` counts the files it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked, self.broken = Counter(), Counter()
        handler = partial(Handler, directory=str(folder), asked=self.asked, broken=self.broken)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    if shutil.which("curl") is None:
        pytest.skip("webdataset opens http:// with curl, which is not here")
    with Server(folder) as server:
        yield server


def remote_args(url: str, cache: Path, **kwargs: object) -> object:
    return make_args(url, data_set="wds", input_size=32, shard_cache=str(cache), **kwargs)


# ---------------------------------------------------------------------------------------------------------------- local


def test_local_shards_are_the_tree_they_were_made_from(tree: Path, folder: Path) -> None:
    args, plain = make_args(folder, data_set="wds", input_size=32), make_args(tree, input_size=32)
    assert datasets.count_classes(args) == 3
    for is_train in (True, False):
        ours, classes = datasets.build_dataset(is_train, args)
        theirs, expected = datasets.build_dataset(is_train, plain)
        assert (classes, ours.classes) == (expected, theirs.classes)
        assert_same_samples(ours, theirs)


def test_a_run_on_archives_or_local_shards_is_the_run_on_the_tree(tree: Path, folder: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "images"), "tar", tree)
    logs = []
    for data in (("FOLDER", tree), ("FOLDER", archive), ("wds", folder)):
        output = tmp_path / f"run-{len(logs)}"
        call_main(*TINY, "--data-set", data[0], "--data-path", data[1], "--output_dir", output)
        logs.append((output / "log.txt").read_text())
    assert logs[0] == logs[1] == logs[2]


# --------------------------------------------------------------------------------------------------------------- remote


def loader_of(args: object, *, num_workers: int, rank: int = 0, is_train: bool = True) -> DataLoader:
    dataset, _ = datasets.build_dataset(is_train, args)
    train, val = build_samplers(dataset, dataset, world_size=2, rank=rank, repeated_aug=True, seed=1)
    sampler = train if is_train else val
    return build_loader(dataset, sampler, batch_size=4, num_workers=num_workers, pin_memory=False, drop_last=is_train)


def test_remote_images_are_fetched_once_and_do_not_depend_on_the_workers(
    tree: Path, server: Server, tmp_path: Path
) -> None:
    batches = []
    for workers in (0, 3):
        loader = loader_of(remote_args(server.url, tmp_path), num_workers=workers)
        loader.sampler.set_epoch(2)
        batches.append(list(loader))
    assert len(batches[0]) == TRAIN // 2 // 4
    for (images, labels), (others, other_labels) in zip(*batches, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
    fetched = {name: count for name, count in server.asked.items() if name.startswith("train")}
    assert 0 < len(fetched) <= 3 and set(fetched.values()) == {1}  # 11 different images: of one to three shards of 7


def test_shards_are_fetched_before_they_are_needed(server: Server, tmp_path: Path) -> None:
    loader = loader_of(remote_args(server.url, tmp_path), num_workers=0)
    keys = iter(loader.sampler)
    next(keys)
    wanted = {loader.dataset.dataset.remote.path(index // 7) for index, _ in loader.sampler.sampler}
    deadline = time.monotonic() + 60
    while set(tmp_path.glob("*/train-*.tar")) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(list(keys)) == TRAIN // 2 - 1


def test_a_fork_does_not_keep_a_shard_locked(tmp_path: Path) -> None:
    with shards._locked(tmp_path / "shard.tar"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        with pytest.raises(BlockingIOError), shards._locked(tmp_path / "shard.tar", wait=False):
            pass
    try:
        with shards._locked(tmp_path / "shard.tar", wait=False):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_remote_images_are_those_of_the_tree(tree: Path, server: Server, tmp_path: Path) -> None:
    remote, _ = datasets.build_dataset(True, remote_args(server.url, tmp_path))
    plain, _ = datasets.build_dataset(True, make_args(tree, input_size=32))
    assert len(remote) == len(plain) == TRAIN
    places = [int(member.name.partition("-")[0]) for member, _ in remote.samples]
    assert sorted(places) == list(range(TRAIN)) and places != sorted(places)
    for index, place in enumerate(places):
        (image, label), (expected, expected_label) = (
            AddressedDataset(images)[number, index] for images, number in ((remote, index), (plain, place))
        )
        assert label == expected_label and torch.equal(image, expected)
    shutil.rmtree(tmp_path)  # somebody clears the cache while a run goes on
    assert [remote[index][1] for index in range(TRAIN)] == [plain.targets[place] for place in places]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote_evaluation_counts_every_image_once(server: Server, num_workers: int, tmp_path: Path) -> None:
    labels = []
    for rank in range(2):
        loader = loader_of(remote_args(server.url, tmp_path), num_workers=num_workers, rank=rank, is_train=False)
        found = torch.cat([label for _, label in loader])
        assert len(found) == VAL // 2
        labels += found[: loader.sampler.num_valid_samples].tolist()
    assert Counter(labels) == {0: 5, 1: 5, 2: 4}


def test_a_download_that_breaks_off_is_repeated(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PAUSE_S", 0.01)
    server.broken |= {"val-000000.tar": 2, "val-000001.tar": 1}
    dataset, _ = datasets.build_dataset(False, remote_args(server.url, tmp_path))
    assert len([dataset[index] for index in range(VAL)]) == VAL
    assert (server.asked["val-000000.tar"], server.asked["val-000001.tar"]) == (3, 2)


def test_no_process_is_forked_while_a_thread_starts_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep the command's pipe open, and the thread would wait for its end for ever."""
    began, order = threading.Event(), []

    def gopen(url: str, mode: str) -> io.BytesIO:
        began.set()
        time.sleep(0.2)
        order.append("started")
        return io.BytesIO()

    monkeypatch.setattr(sys.modules["webdataset.gopen"], "gopen", gopen)
    thread = threading.Thread(target=shards._open, args=("pipe:true",))
    thread.start()
    assert began.wait(10)
    child = multiprocessing.get_context("fork").Process(target=shards._open, args=("pipe:true",))
    child.start()
    order.append("forked")
    child.join(20)
    thread.join()
    assert order == ["started", "forked"] and child.exitcode == 0


def test_a_shard_that_cannot_be_fetched_is_named_also_from_a_worker(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PAUSE_S", 0.01)
    (copy / "val-000001.tar").unlink()
    url = f"pipe:cat {copy}/{{}} 2>/dev/null"
    message = f"cat {copy}/val-000001.tar .*could not be fetched in 8 attempts.*--auto_reload continues"
    for workers in (0, 1):
        with pytest.raises(DataError, match=message):
            list(loader_of(remote_args(url, tmp_path / "cache"), num_workers=workers, rank=1, is_train=False))


def test_the_cache_keeps_to_its_limit(folder: Path, tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in folder.glob("train-*.tar")]
    limit = 3 * max(sizes)
    args = remote_args(f"pipe:cat {folder}/{{}}", tmp_path, shard_cache_gb=limit / 2**30)
    dataset, _ = datasets.build_dataset(True, args)
    expected = [int(label) for label in np.load(folder / "train.npy")["label"]]
    for index in np.random.RandomState(0).permutation(TRAIN)[:12].tolist():
        member, label = dataset.samples[index]
        assert label == expected[int(member.name.partition("-")[0])]
        assert load_image(member).mode == "RGB"
        kept = list(tmp_path.glob("*/*.tar"))
        assert sum(path.stat().st_size for path in kept) <= limit
        assert {path.stem for path in tmp_path.glob("*/*.npy")} == {path.stem for path in kept}
        ours = [file for path, file in archives._open_files.items() if path.startswith(str(tmp_path))]
        assert sum(os.fstat(file).st_nlink == 0 for file in ours) <= 1  # what is removed does not fill the disk


def test_another_index_at_the_same_address_is_another_data_set(tree: Path, copy: Path, tmp_path: Path) -> None:
    args = remote_args(f"pipe:cat {copy}/{{}}", tmp_path / "cache")
    before, _ = datasets.build_dataset(False, args)
    assert before[0]
    for path in copy.iterdir():
        path.unlink()
    prepare_wds(tree, copy, (5, float("inf")), seed=7)
    shards.read_info.cache_clear()
    after, _ = datasets.build_dataset(False, args)
    plain, _ = datasets.build_dataset(False, make_args(tree, input_size=32))
    for index in range(VAL):
        place = int(after.samples[index][0].name.partition("-")[0])
        assert torch.equal(after[index][0], plain[place][0])


# ------------------------------------------------------------------------------------------------------- whole runs


RUN = (  # everything random is on, and every image comes three times
    *TINY, "--data-set", "wds", "--batch-size", 8, "--epochs", 2, "--drop", 0.1, "--drop-path", 0.2, "--lr", 0.05,
    "--model-ema-decay", 0.9, "--eval-ema", "--print-freq", 1, "--keep-checkpoints", 2, "--auto_reload",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_on_remote_shards_that_was_stopped_ends_with_the_same_bits(server: Server, tmp_path: Path) -> None:
    """Two processes, another number of loader processes after the stop, a cache that is too small for all shards."""
    flags = (*RUN, "--data-path", server.url, "--shard-cache", tmp_path / "cache", "--shard-cache-gb", 1e-4)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for output in (whole, stopped):
        output.mkdir()
    with Ranks(*flags, "--output_dir", whole, folder=whole) as run:
        text = run.expect(0)
    assert "4 batches an epoch on each process" in text  # 64 images, two processes, batches of 8
    with Ranks(*flags, "--num_workers", 2, "--output_dir", stopped, folder=stopped) as run:
        run.wait_for("Epoch: [1]  [1/4]")
        run.signal(signal.SIGTERM, rank=1)
        run.expect(entry.EXIT_PREEMPTED)
    with Ranks(*flags, "--num_workers", 1, "--output_dir", stopped, folder=stopped) as run:
        assert "auto-reload: continuing from" in run.expect(0)
    assert_same_results(stopped, whole, epochs=2)
    with Ranks(*flags, "--epochs", 3, "--output_dir", stopped, folder=stopped, processes=1) as run:
        text = run.expect(0)  # one process goes on where two were
    assert "'world_size': '2 -> 1'" in text and "Epoch: [2]  [7/8]" in text and "Epoch: [1]" not in text


@pytest.mark.slow
def test_remote_evaluation_is_exact_for_any_number_of_processes(tree: Path, server: Server, tmp_path: Path) -> None:
    call_main(*TINY, "--data-path", tree, "--output_dir", tmp_path / "run", "--lr", 0.1)
    words = ("--eval", "--resume", tmp_path / "run" / "checkpoint.pth", "--batch-size", 2)
    expected = [line for line in call_main(*TINY, "--data-path", tree, *words).stdout.splitlines() if "Acc@1" in line]
    flags = (*TINY, "--data-set", "wds", "--data-path", server.url, "--shard-cache", tmp_path / "cache", *words)
    for processes in (1, 3):
        with Ranks(*flags, folder=tmp_path, processes=processes) as run:
            assert run.expect(0).count(expected[0]) == 1


# ---------------------------------------------------------------------------------------------------------- the order


def orders(world_size: int, epoch: int = 0, repeats: int = 1, images: int = 100, **kwargs: object) -> list[list[int]]:
    """Of every rank, over shards of 10 images."""
    found = []
    for rank in range(world_size):
        sampler = ShardSampler(
            [10] * (images // 10), num_samples=-(-images // world_size), rank=rank, repeats=repeats, **kwargs
        )
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(sampler) == len(found[-1])
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_image_of_remote_shards_comes_once_an_epoch(world_size: int) -> None:
    parts = orders(world_size, seed=0)
    assert len({len(part) for part in parts}) == 1  # as many steps on every rank
    counts = Counter(index for part in parts for index in part)
    assert set(counts) == set(range(100)) and sum(counts.values()) == -(-100 // world_size) * world_size
    assert len({index // 10 for index in parts[0]}) <= -(-10 // world_size) + 1  # a rank keeps to its own shards


def test_the_order_follows_from_seed_and_epoch_and_is_shuffled() -> None:
    assert orders(2, 3, seed=5) == orders(2, 3, seed=5)
    assert len({str(orders(2, epoch, seed=seed)) for epoch in range(3) for seed in range(3)}) == 9
    (order,) = orders(1, images=1000, seed=0, window=100)
    assert len({index // 10 for index in order[:50]}) >= 8  # a batch mixes the shards of the window
    assert max(np.abs(np.argsort([index // 10 for index in order[:50]]))) < 100


def test_shards_are_asked_for_in_turn() -> None:
    (order,) = orders(1, images=1000, seed=0, window=50)
    first_seen = {shard: order.index(index) for index in order[::-1] for shard in [index // 10]}
    places = sorted(first_seen.values())
    assert max(np.diff(places)) <= 60  # one after the other through the whole epoch, never many at once
    last_seen = {index // 10: place for place, index in enumerate(order)}
    assert max(last_seen[shard] - first_seen[shard] for shard in first_seen) <= 110


def test_repeats_stay_together_on_one_rank() -> None:
    parts = orders(2, repeats=3, seed=0)
    for part in parts:
        assert len(part) == 50
        assert all(len(set(part[place : place + 3])) == 1 for place in range(0, 48, 3))
    assert not set(parts[0]) & set(parts[1])


def test_an_epoch_of_remote_shards_is_as_long_as_of_a_tree() -> None:
    class Remote(list):
        remote = None

    class Images(list):
        pass

    for size in (64, 300, 1000):
        for repeated_aug in (True, False):
            images, remote = Images(range(size)), Remote(range(size))
            remote.remote = shards.RemoteMembers(shards.Shards("", "train", [], [size - 7, 7], [], ""), Path(), 0)
            for rank in range(3):
                settings = dict(world_size=3, rank=rank, repeated_aug=repeated_aug, seed=0)
                plain, _ = build_samplers(images, images, **settings)
                ours, val = build_samplers(remote, remote, **settings)
                assert (len(ours), len(val)) == (len(plain), -(-size // 3))


# -------------------------------------------------------------------------------------------------------- bad indices


def spoil_info(folder: Path, **change: object) -> None:
    path = folder / "_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def spoil_split(folder: Path, **change: object) -> None:
    info = json.loads((folder / "_info.json").read_text())
    info["splits"]["val"] |= change
    (folder / "_info.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "_info.json").unlink(), "no readable index of shards .*prepare_wds.py"),
        (lambda folder: (folder / "_info.json").write_text("{"), "_info.json is no index of shards"),
        (lambda folder: spoil_info(folder, splits={"train": {}}), "_info.json is no index of shards"),
        (lambda folder: spoil_info(folder, splits={}), "the index has no split val"),
        (lambda folder: spoil_info(folder, classes=["a"]), "a label of val is 2, but the index names 1"),
        (lambda folder: spoil_split(folder, shard_lengths=[7]), "differ in number"),
        (lambda folder: spoil_split(folder, shard_lengths=[8, 6]), "numbers of images"),
        (lambda folder: spoil_split(folder, shard_lengths=["a", 7]), "shard_lengths are no numbers"),
        (lambda folder: spoil_split(folder, shard_lengths=[0, 0]), "lists no images of val"),
        (lambda folder: spoil_split(folder, filenames=["a.tar", "../../b.tar"]), "names a shard '../../b.tar'"),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_an_unusable_index_is_explained(spoil: object, message: str, remote: bool, copy: Path, tmp_path: Path) -> None:
    spoil(copy)
    if remote and "numbers of images" in message:
        message = "val-000000.tar .*holds 7 images, the index says 8"
    path = f"pipe:cat {copy}/{{}} 2>/dev/null" if remote else copy
    with pytest.raises(DataError, match=message) as raised:
        dataset, _ = datasets.build_dataset(False, remote_args(path, tmp_path / "cache"))
        for index in range(len(dataset)):
            dataset[index]
    assert str(copy) in str(raised.value)


def test_a_shards_name_is_never_executed(copy: Path, tmp_path: Path) -> None:
    spoil_split(copy, filenames=[f"x; touch {tmp_path}/executed", "$(touch executed).tar"])
    with pytest.raises(DataError, match="the index names a shard 'x; touch"):
        datasets.build_dataset(False, remote_args(f"pipe:cat {copy}/{{}}", tmp_path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "val.npy").unlink(), "val.npy is missing or damaged .*prepare_wds.py --index"),
        (lambda folder: (folder / "val.npy").write_bytes(b"x" * 99), "val.npy is missing or damaged"),
        (lambda folder: (folder / "val-000001.tar").unlink(), "shard .*val-000001.tar is missing"),
        (lambda folder: (folder / "val-000001.tar").write_bytes(b"x" * 99), "shard .*val-000001.tar is cut short"),
    ],
)
def test_unusable_local_shards_are_explained(spoil: object, message: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(DataError, match=message):
        datasets.build_dataset(False, make_args(copy, data_set="wds"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "--data-path is missing"),
        ("/nowhere/at/all", "--data-path /nowhere/at/all is no folder"),
        ("pipe:cat /somewhere", "put {} where the command takes a file's name"),
        ("s3://bucket/shards", "s3:// cannot be opened, only .*https.*pipe:aws s3 cp"),
    ],
)
def test_unusable_addresses_are_explained(path: str, message: str) -> None:
    for call in (datasets.count_classes, partial(datasets.build_dataset, False)):
        with pytest.raises(DataError, match=message):
            call(make_args(path, data_set="wds"))


def test_a_cache_that_cannot_be_written_is_explained(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    dataset, _ = datasets.build_dataset(False, remote_args(f"pipe:cat {folder}/{{}}", tmp_path / "file"))
    with pytest.raises(DataError, match="--shard-cache .*file cannot take a shard .*--shard-cache-gb"):
        dataset[0]


def test_shards_without_names_of_classes_need_the_number(copy: Path) -> None:
    spoil_info(copy, classes=[])
    with pytest.raises(DataError, match="--num-classes"):
        datasets.count_classes(make_args(copy, data_set="wds"))
    flags = ("--data-set", "wds", "--data-path", f"pipe:cat {copy}/{{}}", "--shard-cache", copy / "cache")
    call_main(*TINY, *flags, "--num-classes", 3)
    assert len(datasets.build_dataset(True, make_args(copy, data_set="wds", num_classes=3))[0]) == TRAIN
    index_shards(copy)
    shards.read_info.cache_clear()
    assert datasets.count_classes(make_args(copy, data_set="wds")) == 3
