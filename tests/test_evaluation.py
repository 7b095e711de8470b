"""Evaluation is exact: the same accuracy to the last digit for any number of processes and any batch size."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from imagenet_val import name_as_imagenet, write_real_labels
from runs import TINY, call_main, free_port, run_main, tiny_tree
from timm.data import resolve_data_config
from timm.data.real_labels import RealLabelsImagenet
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import build
import datasets
import engine
import fit
import models  # noqa: F401 (registers the zoo, also in spawned processes)
import utils
from options import get_args_parser

SIZE = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=32)
IMAGES = 31  # neither a multiple of 2 or 3 processes nor of any of the batch sizes below
BATCH_SIZES = ("2", "4", "10", "64")  # evaluation takes 1.5 times as many: 3, 6, 15 and all
CLASSES = 7
ALONE = utils.World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of an evaluation whose answer depends on the image."""
    folder = tmp_path_factory.mktemp("evaluation")
    data = tiny_tree(folder / "data", classes=CLASSES, train=CLASSES, val=IMAGES)
    return evaluation_flags(data, folder / "weights.pth", CLASSES)


def evaluation_flags(data: Path, weights: Path, classes: int) -> list[str]:
    torch.manual_seed(0)
    model = timm.create_model("attnscale_small_12", num_classes=classes, **SIZE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save({"model": model.state_dict()}, weights)
    return [*TINY, "--data-path", str(data), "--eval", "--resume", str(weights)]


def logits_of(words: list[str]) -> tuple[torch.Tensor, list[tuple[str, int]]]:
    """Logits of all images in one batch, without the code under test, and the files with their labels."""
    args = get_args_parser().parse_args([*words, "--real-labels", ""])
    start = build.find_start(args)
    model = build.build_model(args, build.num_classes(args, start))
    build.load_start(args, start, model, ALONE)
    options = datasets.DataOptions.from_args(args)
    dataset, _ = datasets.build_dataset(False, options, resolve_data_config({}, model=model))
    with torch.inference_mode():
        return model.eval()(torch.stack([image for image, _ in dataset])), list(dataset.samples)


@pytest.fixture(scope="module")
def real_case(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same with ReaL labels."""
    folder = tmp_path_factory.mktemp("real")
    data = tiny_tree(folder / "data", classes=CLASSES, train=CLASSES, val=IMAGES)
    names = [path.name for path in name_as_imagenet(data)]
    words = [*evaluation_flags(data, folder / "weights.pth", 1000), "--num-classes", "1000"]
    logits, samples = logits_of(words)
    predicted = {Path(file).name: int(row.argmax()) for row, (file, _) in zip(logits, samples, strict=True)}
    write_real_labels(folder / "real.json", [predicted[name] for name in names])
    return [*words, "--real-labels", str(folder / "real.json")]


def evaluate(words: list[str], world: utils.World = ALONE) -> dict[str, float]:
    """What ``main`` does for ``--eval``, by its own functions."""
    args = get_args_parser().parse_args(words)
    start = build.find_start(args)
    model = build.build_model(args, build.num_classes(args, start))
    start = build.load_start(args, start, model, world)
    loaders = build.build_loaders(args, model, world)
    return fit.evaluate_with_ema(args, model, None, loaders.val, world, torch.float32, loaders.prepare_eval)


def every_setting(words: list[str], world: utils.World) -> dict[str, dict[str, float]]:
    settings = {f"batch {size}": ["--batch-size", size] for size in BATCH_SIZES}
    settings["each process all of it"] = ["--no-dist-eval"]
    settings["an old script"] = ["--dist-eval"]
    return {name: evaluate([*words, *more], world) for name, more in settings.items()}


def every_evaluation(words: list[str], real_words: list[str], world: utils.World) -> dict[str, dict[str, float]]:
    """Those of plain labels in every setting, with ReaL's, and with ranks that differ in their number of batches."""
    results = every_setting(words, world) | {"uneven": evaluate_unevenly(world)}
    for size in BATCH_SIZES[:2]:
        results[f"ReaL {size}"] = evaluate([*real_words, "--batch-size", size], world)
    return results


def worker(rank: int, world_size: int, port: int, words: list[str], real_words: list[str], folder: str) -> None:
    names = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    with utils.process_group("cpu") as world:
        results = every_evaluation(words, real_words, world)
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


def evaluate_unevenly(world: utils.World) -> dict[str, float]:
    """Rank r of n has its own share in batches of its own size, so the ranks differ in their number of batches.

    A model that took part in collectives (as DistributedDataParallel's forward pass does) would wait for ever.
    """
    torch.manual_seed(0)
    images, targets = torch.randn(13, 3, 32, 32), torch.randint(0, CLASSES, (13,))
    model = timm.create_model("featscale_small_12", num_classes=CLASSES, **SIZE)
    if world.distributed:
        DistributedDataParallel(model)  # as in training: the wrapper is there, evaluation gets the bare model
    mine = TensorDataset(images[world.rank :: world.world_size], targets[world.rank :: world.world_size])
    loader = DataLoader(mine, batch_size=1 if world.rank == 0 else 5)
    return engine.evaluate(model, loader, world.device)


@pytest.fixture(scope="module")
def one_process(case: list[str], real_case: list[str]) -> dict[str, dict[str, float]]:
    return every_evaluation(case, real_case, ALONE)


def assert_equal(result: dict[str, float], expected: dict[str, float]) -> None:
    assert result.keys() == expected.keys()
    for name in result.keys() - {"loss"}:
        assert result[name] == expected[name]  # to the last digit
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_one_process_gives_the_same_for_any_batch_size(one_process: dict[str, dict[str, float]]) -> None:
    results = {name: result for name, result in one_process.items() if name[0].islower() and name != "uneven"}
    reference = results["batch 64"]
    assert 0 < reference["acc1"] < reference["acc5"] < 100  # an answer that could go wrong
    assert reference["acc1"] * IMAGES / 100 == pytest.approx(round(reference["acc1"] * IMAGES / 100))
    for result in results.values():
        assert_equal(result, reference)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_give_the_same_for_any_batch_size(
    world_size: int, case: list[str], real_case: list[str], one_process: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    given = (world_size, free_port(), case, real_case, str(tmp_path))
    context = mp.spawn(worker, given, nprocs=world_size, join=False)
    deadline = time.monotonic() + 200
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{world_size} processes did not end: one waits for another")
    for rank in range(world_size):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert results.keys() == one_process.keys()
        for name, result in results.items():
            assert_equal(result, one_process[name])  # on every rank


@pytest.mark.slow
def test_the_command_line_prints_the_same_line(case: list[str], one_process: dict[str, dict[str, float]]) -> None:
    line = f"Accuracy of the network on the {IMAGES} test images: {one_process['batch 64']['acc1']:.3f}%"
    assert line in call_main(*case, "--batch-size", "6").stdout
    assert line in run_main(*case, "--batch-size", "6", processes=3).stdout


def test_the_loss_is_the_mean_over_images_not_over_batches(case: list[str]) -> None:
    """A last batch of one image counts once."""
    args = get_args_parser().parse_args([*case, "--batch-size", "20"])
    start = build.find_start(args)
    model = build.build_model(args, CLASSES)
    start = build.load_start(args, start, model, ALONE)
    loaders = build.build_loaders(args, model, ALONE)
    assert [len(images) for images, _ in loaders.val] == [30, 1]
    images, targets = (torch.cat(part) for part in zip(*loaders.val, strict=True))
    with torch.inference_mode():
        logits = model.eval()(loaders.prepare_eval(images))
    result = engine.evaluate(model, loaders.val, ALONE.device, prepare=loaders.prepare_eval)
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    assert result["acc1"] == pytest.approx((logits.argmax(1) == targets).double().mean().item() * 100, rel=1e-12)
    top5 = (logits.topk(5).indices == targets[:, None]).any(1)
    assert result["acc5"] == pytest.approx(top5.double().mean().item() * 100, rel=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_fewer_than_five_classes_work(classes: int, tmp_path: Path) -> None:
    data = tiny_tree(tmp_path / "data", classes=classes, train=classes, val=5)
    result = evaluate(evaluation_flags(data, tmp_path / "weights.pth", classes))
    assert result["acc5"] == 100
    assert 0 <= result["acc1"] <= 100 and (classes > 1 or result["acc1"] == 100)


def test_evaluation_leaves_the_model_as_it_was(case: list[str]) -> None:
    args = get_args_parser().parse_args(case)
    model = build.build_model(args, CLASSES).train()
    loaders = build.build_loaders(args, model, ALONE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine.evaluate(model, loaders.val, torch.device("cpu"), prepare=loaders.prepare_eval)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not dist.is_initialized()


def test_workers_ship_a_quarter_of_the_bytes_and_the_logits_stay_the_same_bits(case: list[str]) -> None:
    """Bytes normalised on the device against the finished floats of ``--no-fast-loader``."""
    for size in ("32", "48"):  # 48: resized and cropped
        words = [*case, "--input-size", size, "--num_workers", "1"]
        parsed = [get_args_parser().parse_args([*words, *more]) for more in ([], ["--no-fast-loader"])]
        model = build.build_model(parsed[0], CLASSES).eval()
        ours, plain = (build.build_loaders(args, model, ALONE) for args in parsed)
        assert plain.prepare_eval is None
        for (pixels, labels), (images, expected) in zip(ours.val, plain.val, strict=True):
            assert pixels.dtype == torch.uint8 and 4 * pixels.nbytes == images.nbytes
            assert torch.equal(labels, expected) and torch.equal(ours.prepare_eval(pixels), images)
            with torch.inference_mode():
                assert torch.equal(model(ours.prepare_eval(pixels)), model(images))


def test_the_model_sets_the_crop_of_the_evaluation(case: list[str]) -> None:
    """DeiT keeps 224 of 256 pixels, CaiT everything; --eval-crop-ratio overrules both."""
    sizes = {}
    for name, more in (("deit_tiny_12", []), ("cait_XXS24", []), ("deit_tiny_12", ["--eval-crop-ratio", "1"])):
        args = get_args_parser().parse_args([*case, "--model", name, "--input-size", "224", *more])
        options = datasets.DataOptions.from_args(args)
        with torch.device("meta"):
            model = timm.create_model(name)
        resize = datasets.build_transform(False, options, resolve_data_config({}, model=model)).transforms[0]
        sizes[(name, *more)] = resize.size
    assert list(sizes.values()) == [256, 224, 224]


# ---- other labels of ImageNet ----------------------------------------------------------------------------------------
def test_real_accuracy_is_that_of_timm(real_case: list[str], one_process: dict[str, dict[str, float]]) -> None:
    logits, samples = logits_of(real_case)
    theirs = RealLabelsImagenet([file for file, _ in samples], real_case[-1])
    theirs.add_result(logits)
    ours = one_process["ReaL 2"]
    assert ours == one_process["ReaL 4"] | {"loss": ours["loss"]}
    assert 0 < ours["real_acc1"] < 100 and ours["real_images"] == len(theirs.is_correct[1]) < IMAGES
    assert ours["real_acc1"] == pytest.approx(theirs.get_accuracy(1), rel=1e-12)


def test_real_accuracy_is_printed_beside_the_plain_one_and_as_json(
    real_case: list[str], one_process: dict[str, dict[str, float]]
) -> None:
    printed = call_main(*real_case, "--batch-size", "2").stdout
    expected = one_process["ReaL 2"]
    assert f" Acc@5 {expected['acc5']:.3f} ReaL@1 {expected['real_acc1']:.3f} loss" in printed
    accuracy = f"{expected['real_acc1']:.3f}%"
    assert (
        f"ReaL accuracy of the network on the {expected['real_images']} of them with ReaL labels: {accuracy}" in printed
    )
    assert json.loads(printed.split("results: ")[1]) == pytest.approx(expected)


def test_real_labels_need_the_classes_of_imagenet(case: list[str], real_case: list[str]) -> None:
    done = call_main(*case, "--data-path", real_case[real_case.index("--data-path") + 1], *real_case[-2:], code=2)
    assert "the model has 7 classes; ReaL's labels are those of ImageNet's 1,000" in done.stderr


@pytest.fixture
def imagenet_v2(tmp_path: Path) -> Path:
    """Twelve of its class folders, 0 to 11, and no train/ or val/."""
    made = tiny_tree(tmp_path / "made", classes=12, train=0, val=36)
    root = tmp_path / "imagenetv2-matched-frequency-format-val"
    root.mkdir()
    for label in range(12):
        (made / "val" / f"class_{label}").rename(root / str(label))
    return root


def test_imagenet_v2_folders_are_labels(imagenet_v2: Path, tmp_path: Path) -> None:
    """Sorted as text they would be 0, 1, 10, 11, 2: another accuracy, and no error."""
    words = evaluation_flags(imagenet_v2, tmp_path / "weights.pth", 12)
    words[words.index("--data-set") + 1] = "IMNET-V2"
    logits, samples = logits_of(words)
    assert [label for _, label in samples] == [int(Path(file).parent.name) for file, _ in samples]
    text = {name: label for label, name in enumerate(sorted(map(str, range(12))))}
    as_text = torch.tensor([text[Path(file).parent.name] for file, _ in samples])
    right = (logits.argmax(1) == torch.tensor([label for _, label in samples])).double().mean().item() * 100
    assert right != (logits.argmax(1) == as_text).double().mean().item() * 100
    printed = call_main(*words).stdout
    assert f"Accuracy of the network on the 36 test images: {right:.3f}%" in printed


def test_imagenet_v2_is_complete_and_only_evaluated(imagenet_v2: Path, tmp_path: Path) -> None:
    words = evaluation_flags(imagenet_v2, tmp_path / "weights.pth", 12)
    words[words.index("--data-set") + 1] = "IMNET-V2"
    train = [word for word in words if word not in ("--eval", "--resume", str(tmp_path / "weights.pth"))]
    assert "--data-set IMNET-V2 has no training images" in call_main(*train, code=2).stderr
    shutil.rmtree(imagenet_v2 / "3")
    assert "there are 11 folders, among them 11, and no 3" in call_main(*words, code=2).stderr
    assert (
        "among them imagenetv2-matched-frequency-format-val, made"
        in call_main(*words, "--data-path", imagenet_v2.parent, code=2).stderr
    )
