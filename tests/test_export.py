"""scripts/export.py: an exported model computes what the checkpoint's does, and the JSON file says how to use it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from runs import ROOT, TINY, call_main, environment, tiny_tree
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

import datasets
import oversmoothing
from oversmoothing.weights import load_weights, read_checkpoint
from reporting import EpochLog
from scripts import export

PAGE = ROOT / "docs" / "export.md"
SIZE = dict(patch_size=8, embed_dim=24, depth=2, num_heads=2)
REMEDIES = [
    *("attnscale_tiny_12", "featscale_tiny_12", "attnfeatscale_tiny_12"),
    *("attnscale_cait_XXS24", "featscale_cait_XXS24", "attnfeatscale_cait_XXS24"),
]


def size_of(name: str) -> dict[str, int]:
    """Arguments of a small model; on DeiT two blocks, since the last one is a case of its own."""
    return SIZE | (dict(depth=1, depth_token_only=1) if "cait" in name else {})


def build(name: str) -> nn.Module:
    """A small model whose remedy, LayerScale and head do something."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, img_size=32, **size_of(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if oversmoothing.is_remedy_parameter(key) or "gamma" in key or key == "head.weight":
                parameter.normal_(std=0.5)
    return model.eval()


def saved(name: str, path: Path) -> nn.Module:
    """A model and its checkpoint at ``path``, with the arguments that a run leaves in it."""
    model = build(name)
    args = {"model": name, "model_kwargs": size_of(name), "input_size": 32}
    torch.save({"model": model.state_dict(), "args": args}, path)
    return model


def run_exported(path: Path, images: Tensor) -> Tensor:
    """Logits of the file as its user gets them."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    (logits,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"images": images.numpy()}
    )
    return torch.from_numpy(logits)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data``, and ``run``, in which main.py has trained an AttnScale model for an epoch."""
    folder = tmp_path_factory.mktemp("export")
    flags = ("--lr", "0.05", "--model-ema-decay", "0.5", "--eval-crop-ratio", "0.9")
    tiny_tree(folder / "data")
    call_main(*TINY, "--data-path", folder / "data", "--output_dir", folder / "run", *flags, "--input-size", "40")
    return folder


# ---- the three kinds of files ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, suffix, opset",
    [
        (REMEDIES[0], ".onnx", 20),
        *(pytest.param(name, ".onnx", 20, marks=pytest.mark.slow) for name in REMEDIES[1:-1]),
        (REMEDIES[-1], ".onnx", 18),
        *((name, ".pt2", None) for name in ("deit_tiny_12", "cait_XXS24", *REMEDIES[2::3])),
    ],
)
def test_the_exported_model_computes_what_the_model_does(
    name: str, suffix: str, opset: int | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, output = saved(name, tmp_path / "x.pth"), tmp_path / f"model{suffix}"
    flags = ["--opset", "18"] if opset == 18 else []
    export.main(["--checkpoint", str(tmp_path / "x.pth"), "--output", str(output), *flags])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        expected = model(images)
        torch.testing.assert_close(run_exported(output, images), expected, rtol=1e-4, atol=1e-4)
        assert expected.abs().max() > 0.1  # logits that a wrong lambda would change beyond the tolerance

    about = json.loads(output.with_suffix(".json").read_text())
    check = about["check"]
    assert check["batch_sizes"] == [1, 2, 5] and 0 <= check["max_difference"] < 1e-4 < check["largest_logit"]
    assert f"checked: logits within {check['max_difference']:.2g} of the model's" in capsys.readouterr().out
    assert about.get("opset") == opset
    if opset is not None:
        assert [entry.version for entry in onnx.load(output).opset_import if not entry.domain] == [opset]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.md", output.name, "x.pth"]


@pytest.mark.parametrize("weights", ["model", "model_ema"])
def test_exported_weights_rebuild_the_model(weights: str, run: Path, tmp_path: Path) -> None:
    source, output = run / "run" / "checkpoint.pth", tmp_path / "out.safetensors"
    export.main(["--checkpoint", str(source), "--output", str(output), *(["--ema"] if weights == "model_ema" else [])])
    checkpoint = read_checkpoint(source)
    torch.testing.assert_close(load_file(output), checkpoint[weights], rtol=0, atol=0)
    assert not torch.equal(checkpoint["model"]["head.weight"], checkpoint["model_ema"]["head.weight"])
    assert output.stat().st_mode == output.with_suffix(".json").stat().st_mode  # whoever reads one reads the other

    about = json.loads(output.with_suffix(".json").read_text())
    assert (about["epoch"], about["max_accuracy"], about["weights"]) == (0, checkpoint["max_accuracy"], weights)
    model = timm.create_model(
        about["model"], num_classes=about["num_classes"], img_size=about["input_size"], **about["model_kwargs"]
    )
    assert load_weights(model, read_checkpoint(output)["model"], source="out.safetensors") == []


def test_an_export_has_a_card_of_its_weights_and_leaves_somebody_else_s_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [
        "--checkpoint",
        str(run / "run" / "checkpoint.pth"),
        "--output",
        str(tmp_path / "net.safetensors"),
        "--ema",
    ]
    with pytest.raises(SystemExit):
        export.main([*words, "--images", "nowhere"])
    assert "--images nowhere does not exist: give a folder" in capsys.readouterr().err
    export.main([*words, "--images", str(run / "data")])
    assert f"model card: {tmp_path / 'net.md'}" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "net.md")
    [logged] = EpochLog.read(run / "run" / "log.txt")
    assert f"| last epoch | 0 | {logged['test_acc1']:.2f} |" in card.text and card.data.model_name == "net"
    assert "![similarity of the tokens and high-frequency energy by layer](net-spectrum.png)" in card.text
    assert (tmp_path / "net-spectrum.png").stat().st_size > 10000 and str(tmp_path) not in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1].replace('"net.saf', f'"{tmp_path}/net.saf')
    code = code.replace("import oversmoothing.zoo", "import models")  # in the checkout
    exec(code, {"images": torch.zeros(1, 3, 40, 40)})

    (tmp_path / "net.md").write_text("# my notes\n")
    with pytest.raises(SystemExit):
        export.main(words)
    assert "would overwrite" in capsys.readouterr().err and (tmp_path / "net.md").read_text() == "# my notes\n"


def test_an_exported_run_has_the_accuracy_that_the_run_logged(run: Path, tmp_path: Path) -> None:
    """With the steps of the JSON file alone, over the validation images."""
    output = tmp_path / "model.onnx"
    export.main(["--checkpoint", str(run / "run" / "checkpoint.pth"), "--output", str(output)])
    steps = json.loads(output.with_suffix(".json").read_text())["preprocessing"]
    images, labels = zip(*ImageFolder(run / "data" / "val", transform=transform(steps)), strict=True)
    right = run_exported(output, torch.stack(images)).argmax(1) == torch.tensor(labels)
    [logged] = EpochLog.read(run / "run" / "log.txt")
    assert 100 * right.float().mean().item() == pytest.approx(logged["test_acc1"], abs=1e-4)


def transform(steps: dict) -> transforms.Compose:
    """As docs/export.md has it."""
    return transforms.Compose(
        [
            transforms.Resize(steps["resize"], transforms.InterpolationMode(steps["interpolation"])),
            transforms.CenterCrop(steps["crop"]),
            transforms.ToTensor(),
            transforms.Normalize(steps["mean"], steps["std"]),
        ]
    )


@pytest.mark.parametrize(
    "name, pixels, ratio, resized", [("attnscale_tiny_12", 64, None, 73), ("attnscale_tiny_12", 64, 0.9, 71),
                                     ("cait_XXS24", 64, None, 64), ("attnscale_tiny_12", 32, None, 32)]
)  # fmt: skip
def test_the_preprocessing_is_the_evaluations(name: str, pixels: int, ratio: float | None, resized: int) -> None:
    model = timm.create_model(name, **SIZE, img_size=pixels)
    steps = export.preprocessing(model, pixels, ratio)
    assert (steps["resize"], steps["crop"]) == (resized, pixels)
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image, config = Image.fromarray(noise), timm.data.resolve_data_config({}, model=model)
    options = datasets.DataOptions(input_size=pixels, eval_crop_ratio=ratio)
    expected = datasets.build_transform(False, options, config)(image)
    torch.testing.assert_close(transform(json.loads(json.dumps(steps)))(image), expected, rtol=0, atol=0)


# ---- checkpoints from elsewhere --------------------------------------------------------------------------------------
def test_a_bare_state_dict_is_described_by_what_it_shows(tmp_path: Path) -> None:
    torch.save({"module.head.weight": torch.zeros(3, 4)}, tmp_path / "bare.pth")
    export.main(["--checkpoint", str(tmp_path / "bare.pth"), "--output", str(tmp_path / "x.safetensors")])
    about = json.loads((tmp_path / "x.json").read_text())
    assert about["num_classes"] == 3 and about["model"] is None
    assert list(load_file(tmp_path / "x.safetensors")) == ["head.weight"]


def test_flags_say_what_a_bare_state_dict_is(tmp_path: Path) -> None:
    save_file(build("attnscale_tiny_12").state_dict(), tmp_path / "bare.safetensors")
    words = ["--checkpoint", str(tmp_path / "bare.safetensors"), "--model", "attnscale_tiny_12", "--input-size", "32"]
    words += ["--model-kwargs", *(f"{key}={value}" for key, value in SIZE.items())]
    export.main([*words, "--output", str(tmp_path / "x.safetensors")])
    about = json.loads((tmp_path / "x.json").read_text())
    assert (about["model"], about["model_kwargs"]) == ("attnscale_tiny_12", SIZE)
    assert (about["input_size"], about["num_classes"], about["preprocessing"]["resize"]) == (32, 5, 32)


def test_models_of_timm_alone_are_described_too(tmp_path: Path) -> None:
    """One whose classifier has another name, and whose images may have any size."""
    torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), tmp_path / "bare.pth")
    words = ["--checkpoint", str(tmp_path / "bare.pth"), "--model", "resnet10t", "--num-classes", "5"]
    export.main([*words, "--output", str(tmp_path / "x.safetensors")])
    about = json.loads((tmp_path / "x.json").read_text())
    assert (about["num_classes"], about["input_size"], about["preprocessing"]["crop"]) == (5, 176, 176)


# ---- refused ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("source", "output", "flags", "message"),
    [
        ("bare.pth", "x.safetensors", ["--ema"], "has no EMA weights: leave --ema out"),
        ("none.pth", "x.safetensors", [], "none.pth: no such file"),
        ("bare.pth", "x.pth", [], "x.pth: must end in one of .safetensors, .onnx, .pt2"),
        ("bare.pth", "none/x.safetensors", [], "/none: make it first"),
        ("bare.pth", "x.onnx", [], "does not say which model it is of: give --model (and --model-kwargs)"),
        ("bare.pth", "x.pt2", ["--opset", "18"], "--opset 18: only an --output that ends in .onnx has one"),
        ("bare.pth", "x.onnx", ["--opset", "12"], "argument --opset: invalid choice: 12"),
        ("bare.pth", "x.pt2", ["--model", "attnscale_tiny"], "--model attnscale_tiny: no such model; near: attnscale"),
        ("headless.pth", "x.pt2", ["--model", "resnet10t"], "does not say which model it is of: give --num-classes"),
        ("good.pth", "x.pt2", ["--model", "featscale_tiny_12"], "unexpected: blocks.0.attn.lamb, blocks.1.attn.lamb: "),
        ("good.pth", "x.onnx", ["--input-size", "64"], "--num-classes and --input-size must say what was trained"),
        ("good.pth", "x.safetensors", ["--num-classes", "9"], "must say what was trained"),
        ("good.pth", "x.pt2", ["--model-kwargs", "heads=3"], "got an unexpected keyword argument 'heads'"),
        ("good.pth", "x.pt2", ["--input-size", "0"], "--input-size 0: give a whole number of 1 or more"),
        ("good.pth", "x.pt2", ["--num-classes", "-1"], "--num-classes -1: give 1 or more"),
        ("nan.pth", "x.pt2", [], "gives other logits than the model, by up to nan"),
    ],
)
def test_a_wrong_argument_is_one_line_and_writes_nothing(
    source: str, output: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save({"head.weight": torch.zeros(3, 4)}, tmp_path / "bare.pth")
    torch.save({"body.weight": torch.zeros(3, 4)}, tmp_path / "headless.pth")
    model = saved("attnscale_tiny_12", tmp_path / "good.pth")
    broken = model.state_dict() | {"head.bias": torch.full((5,), torch.nan)}
    torch.save(read_checkpoint(tmp_path / "good.pth") | {"model": broken}, tmp_path / "nan.pth")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as left:
        export.main(["--checkpoint", str(tmp_path / source), "--output", str(tmp_path / output), *flags])
    assert left.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before


def test_onnx_without_its_packages_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)  # as an environment without them
    with pytest.raises(SystemExit):
        export.main(["--checkpoint", "x.pth", "--output", str(tmp_path / "x.onnx")])
    assert "x.onnx needs onnxscript, onnxruntime: pip install" in capsys.readouterr().err


# ---- as a user -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_page_works_as_printed(
    tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its commands beside a folder ``logs/digits``, then its code, which has nothing but the installed library."""
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page.replace("\\\n", " "), re.S)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(commands) == 5 and all(words[:2] == ["python", "scripts/export.py"] for words in commands)

    logs = tmp_path / "logs" / "digits"
    logs.mkdir(parents=True)
    saved("attnscale_tiny_12", logs / "best_checkpoint.pth")
    monkeypatch.chdir(tmp_path)
    for _, _, *words in commands:
        export.get_parser().parse_args(words)
        if len(words) == 4:  # the first three, which need no more than a run
            export.main(words)
            assert capsys.readouterr().out.startswith(f"wrote {words[-1]} and model.json\nchecked: ")

    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cat.jpg")
    prepare, onnxruntime_alone, torch_alone, with_timm = re.findall(r"```python\n(.*?)```", page, re.S)
    alone = "import sys\nassert not {'timm', 'oversmoothing'} & set(sys.modules)\n"
    export.main(commands[0][2:])  # model.json is that of the file exported last
    assert "wrote model.safetensors and model.json\nchecked: its model weights equal" in capsys.readouterr().out
    code = prepare + onnxruntime_alone + torch_alone + alone + with_timm
    env = environment(PYTHONPATH=str(installed))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    classes = [re.findall(r"\d+", predicted[kind]) for kind in ("onnx", "pt2", "safetensors")]
    assert len(classes[0]) == 1 and classes[0] == classes[1] == classes[2]
