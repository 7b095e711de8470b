"""Shards hold exactly the images of a tree, the same after every kill, and other libraries can read them."""

import io
import json
import multiprocessing
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from runs import tiny_tree
from test_archives import one_compressed_zip
from test_datasets import make_args
from timm.data.readers.reader_wds import ReaderWds

import datasets
from readers import shards
from scripts import prepare_wds

TRAIN, VAL = 64, 14


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("tree"), train=TRAIN, val=VAL)


@pytest.fixture(autouse=True)
def _folders_are_written_anew() -> None:
    shards.read_info.cache_clear()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_the_files_of_the_tree_byte_for_byte(tree: Path, tmp_path: Path) -> None:
    info = prepare_wds.prepare_wds(tree, tmp_path, (10, float("inf")), seed=0)
    assert info["classes"] == ["class_0", "class_1", "class_2"]
    dataset, _ = datasets.build_dataset(True, make_args(tree))
    expected = {}
    for index, (path, label) in enumerate(dataset.samples):
        extension = "png" if path.endswith("png") else "jpg"
        expected[f"{index:08d}-{Path(path).stem}.{extension}"] = Path(path).read_bytes()
        expected[f"{index:08d}-{Path(path).stem}.cls"] = str(label).encode()
    found = {}
    for path in sorted(tmp_path.glob("train-*.tar")):
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            assert len(members) <= 20
            found |= {member.name: archive.extractfile(member).read() for member in members}
    assert found == expected and list(found) != sorted(expected)
    assert info["splits"]["train"]["shard_lengths"] == [10] * 6 + [4]
    assert [split["num_samples"] for split in info["splits"].values()] == [TRAIN, VAL]


def test_an_archive_makes_the_shards_of_its_tree(tree: Path, tmp_path: Path) -> None:
    prepare_wds.prepare_wds(tree, tmp_path / "a", (10, float("inf")), seed=0)
    prepare_wds.prepare_wds(one_compressed_zip(tree, tmp_path), tmp_path / "b", (10, float("inf")), seed=0)
    prepare_wds.prepare_wds(one_compressed_zip(tree, tmp_path), tmp_path / "b", (10, float("inf")), seed=0)  # kept
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    prepare_wds.prepare_wds(tree, tmp_path / "c", (10, float("inf")), seed=1)
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "c").keys()
    assert contents(tmp_path / "a")["train-000000.tar"] != contents(tmp_path / "c")["train-000000.tar"]


def test_shards_are_as_large_as_asked_for(tree: Path, tmp_path: Path) -> None:
    prepare_wds.prepare_wds(tree, tmp_path, (10**9, 20_000), seed=0)
    table = np.load(tmp_path / "train.npy")
    sizes = np.bincount(table["archive"], table["size"])
    assert sizes.max() <= 20_000 and sizes[:-1].min() > 10_000
    assert prepare_wds.shard_size("100MB") == (2**63 - 1, 10**8) and prepare_wds.shard_size("7") == (7, float("inf"))


def write_shards(tree: Path, folder: Path) -> None:
    prepare_wds.prepare_wds(tree, folder, (1, float("inf")), seed=0)


def test_a_killed_run_goes_on_and_never_leaves_half_a_shard(tree: Path, tmp_path: Path) -> None:
    write_shards(tree, tmp_path / "whole")
    killed = tmp_path / "killed"
    kept = {}
    for wanted in (1, 20, 40):
        process = multiprocessing.get_context("fork").Process(target=write_shards, args=(tree, killed))
        process.start()
        while process.is_alive() and len(list(killed.glob("train-*.tar"))) < wanted:
            time.sleep(0.001)
        process.kill()
        process.join()
        for path in killed.glob("*.tar"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
            assert kept.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns  # not written again
    write_shards(tree, killed)
    assert contents(killed) == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"seed": 1}, {"limit": (5, float("inf"))}, {"limit": (20, float("inf"))}])
def test_shards_of_something_else_are_refused(change: dict, tree: Path, tmp_path: Path) -> None:
    settings = {"limit": (10, float("inf")), "seed": 0}
    prepare_wds.prepare_wds(tree, tmp_path, **settings)
    before = contents(tmp_path)
    with pytest.raises(datasets.DataError, match="train-0000.*give another folder, or remove the shards there"):
        prepare_wds.prepare_wds(tree, tmp_path, **(settings | change))
    assert contents(tmp_path) == before


def test_timm_and_webdataset_read_the_shards(tree: Path, tmp_path: Path) -> None:
    prepare_wds.prepare_wds(tree, tmp_path, (10, float("inf")), seed=0)
    expected = datasets.build_dataset(False, make_args(tree))[0].targets
    reader = ReaderWds(str(tmp_path), split="val", batch_size=1)
    assert len(reader) == VAL
    assert sorted(target for _, target in reader) == sorted(expected)
    urls = [str(path) for path in sorted(tmp_path.glob("val-*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg;png", "cls")
    assert Counter(label for _, label in samples) == Counter(expected)


def test_shards_that_others_have_written_are_indexed(tree: Path, tmp_path: Path) -> None:
    for split, pattern in (("train", "train-%04d.tar"), ("val", "validation-%02d.tar")):
        with webdataset.ShardWriter(str(tmp_path / pattern), maxcount=9, verbose=0) as writer:
            dataset, _ = datasets.build_dataset(split == "train", make_args(tree))
            for index, (path, label) in enumerate(dataset.samples):
                sample = {"__key__": f"{split}/{index:03d}", "cls": label, "json": {"path": path}}
                writer.write(sample | {"png" if path.endswith("png") else "jpeg": Path(path).read_bytes()})
    assert prepare_wds.main(["--index", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "_info.json").read_text())["classes"] == ["0", "1", "2"]
    for is_train, number in ((True, TRAIN), (False, VAL)):
        ours, classes = datasets.build_dataset(is_train, make_args(tmp_path, data_set="wds", input_size=32))
        theirs, _ = datasets.build_dataset(is_train, make_args(tree, input_size=32))
        assert classes == 3 and ours.samples.targets.tolist() == theirs.targets
        member, _ = ours.samples[number - 1]
        assert member.read() == Path(theirs.samples[number - 1][0]).read_bytes()


def test_the_command_line_says_what_it_did_and_what_is_wrong(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--data-path", str(tree), "--output", str(tmp_path / "out"), "--shard-size", "50"]
    assert prepare_wds.main(words) == 0
    printed = capsys.readouterr()
    assert "train: 64 images in 2 shards" in printed.out and "--data-set wds --data-path" in printed.out
    assert "train: 100%" in printed.err
    assert prepare_wds.main([*words[:-1], "40"]) == 2
    assert "error: --output" in capsys.readouterr().err
    assert prepare_wds.main(["--data-path", str(tmp_path / "no"), "--output", str(tmp_path / "new")]) == 2
    assert "no does not exist" in capsys.readouterr().err and not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    assert prepare_wds.main([*words[:3], str(tmp_path / "file")]) == 2
    assert "file is a file: give a folder" in capsys.readouterr().err
    assert prepare_wds.main(["--index", str(tmp_path)]) == 2
    assert "no train-*.tar and no val-*.tar there" in capsys.readouterr().err
    for bad in (["--shard-size", "0", *words[:4]], ["--shard-size", "1GiB"], ["--data-path", "x"], []):
        with pytest.raises(SystemExit) as left:
            prepare_wds.main(bad)
        assert left.value.code == 2


def test_large_training_images_are_made_smaller_and_all_others_copied(tmp_path: Path) -> None:
    tree, limit = tiny_tree(tmp_path / "tree", train=6, val=6), (4, float("inf"))
    for split, name in (("train", "class_0/large.png"), ("train", "class_1/tall.jpg"), ("val", "class_2/large.jpg")):
        Image.radial_gradient("L").resize((100, 300)).convert("RGB").save(tree / split / name)
    prepare_wds.prepare_wds(tree, tmp_path / "out", limit, seed=0, max_side=150)
    for is_train in (True, False):
        originals, _ = datasets.build_dataset(is_train, make_args(tree))
        ours, _ = datasets.build_dataset(is_train, make_args(tmp_path / "out", data_set="wds"))
        for (path, label), (member, our_label) in zip(originals.samples, ours.samples, strict=True):
            assert label == our_label
            if is_train and Path(path).stem in ("large", "tall"):
                image = Image.open(io.BytesIO(member.read()))
                assert image.size == (50, 150) and image.format == "JPEG" and member.name.endswith(".jpg")
                expected = np.asarray(Image.open(path).resize((50, 150), Image.Resampling.BICUBIC)).astype(float)
                assert np.abs(np.asarray(image) - expected).mean() < 2
            else:
                assert member.read() == Path(path).read_bytes()
    before = contents(tmp_path / "out")
    prepare_wds.prepare_wds(tree, tmp_path / "out", limit, seed=0, max_side=150)
    assert contents(tmp_path / "out") == before
    for other in (None, 151, 299):
        with pytest.raises(datasets.DataError, match="--max-side make of it: give another folder"):
            prepare_wds.prepare_wds(tree, tmp_path / "out", limit, seed=0, max_side=other)


def test_an_image_that_cannot_be_made_smaller_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tree = tiny_tree(tmp_path / "tree", train=6, val=6)
    (tree / "train" / "class_0" / "broken.jpg").write_bytes(b"no image")
    words = ["--data-path", str(tree), "--output", str(tmp_path / "out"), "--max-side", "32"]
    assert prepare_wds.main(words) == 2
    assert "cannot read image" in (printed := capsys.readouterr().err) and "broken.jpg" in printed
    for bad in (["--max-side", "31", *words[:4]], ["--max-side", "32", "--index", "x"]):
        with pytest.raises(SystemExit) as left:
            prepare_wds.main(bad)
        assert left.value.code == 2
