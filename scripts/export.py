"""Exports a checkpoint's model, with a JSON file that says how to build and feed it, and a model card.

python scripts/export.py --checkpoint logs/run/best_checkpoint.pth --output model.onnx [--ema]

The ending of --output selects the format: model.safetensors (the weights), model.onnx (ONNX) or model.pt2
(torch.export); the latter two are whole models for any number of images. The file is read back and compared with the
model before it is renamed to --output. docs/export.md shows how to use each format.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, so it runs from any folder

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import timm
import torch
from safetensors.torch import load_file, save
from timm.data import resolve_data_config
from torch import Tensor, nn

import datasets
import models  # noqa: F401  (registers the zoo with timm)
from options import ArgumentError, KeyValues
from oversmoothing.fused.talking_heads import talking_heads_as_maps
from oversmoothing.weights import (
    CheckpointError,
    ModelError,
    check_model_name,
    model_from_checkpoint,
    number_of_classes,
    read_checkpoint,
    trained_with,
)
from scripts.model_card import write_card

CARD_NOTE = "<!-- by scripts/export.py, which writes it anew with each export to this name -->"
DESCRIPTION = {"model", "model_kwargs", "num_classes", "input_size", "weights"}  # keys of every description
ENDINGS = (".safetensors", ".onnx", ".pt2")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSETS, OPSET = range(18, 24), 20  # those that torch's exporter writes and onnxruntime reads; torch 2.14's default
BATCH_SIZES = (1, 2, 5)  # 2 is the one that is traced
TOLERANCE = 1e-4  # of the largest logit, or of 1 where all are smaller


def describe(checkpoint: dict[str, Any], weights: str, args: argparse.Namespace) -> dict[str, Any]:
    """What is needed to build the model again, and its accuracy; None where neither file nor flags say.

    Args:
        checkpoint: From ``read_checkpoint``.
        weights: The entry that is exported, ``model`` or ``model_ema``.
        args: Flags; they take precedence over the checkpoint.

    Raises:
        ModelError: The model's name is unknown.
    """
    saved = trained_with(checkpoint)
    given = {name: value for name, value in vars(args).items() if value is not None}
    told = saved | given
    name, input_size = told.get("model"), told.get("input_size")
    if name is not None:
        check_model_name(name)
        input_size = timm.get_pretrained_cfg(name).input_size[-1] if input_size is None else input_size
    num_classes = told.get("num_classes")
    return {
        "model": name,
        "model_kwargs": {**saved.get("model_kwargs", {}), **(args.model_kwargs or {})},
        "num_classes": number_of_classes(checkpoint[weights]) if num_classes is None else num_classes,
        "input_size": input_size,
        "weights": weights,
        "epoch": checkpoint.get("epoch"),
        "max_accuracy": checkpoint.get("max_accuracy"),
    }


def preprocessing(model: nn.Module, input_size: int, crop_ratio: float | None) -> dict[str, Any]:
    """The steps from an RGB image to the model's input, those of this repository's evaluation.

    The shorter side becomes ``resize`` pixels, the centre ``crop`` x ``crop`` is cut out, values from 0 to 1 are
    normalised with ``mean`` and ``std``.
    """
    config = resolve_data_config({}, model=model)
    options = datasets.DataOptions(input_size=input_size, eval_crop_ratio=crop_ratio)
    resize, crop = datasets.build_transform(False, options, config).transforms[:2]
    return {
        "resize": resize.size,
        "interpolation": config["interpolation"],
        "crop": crop.size[0],
        "mean": config["mean"],
        "std": config["std"],
    }


def write_onnx(program: torch.export.ExportedProgram, path: Path, opset: int) -> Callable[[Tensor], Tensor]:
    """Writes ONNX, one file up to 1.5 GiB of weights, and returns it as onnxruntime runs it on the CPU."""
    import onnxruntime  # only this format needs it

    names = dict(input_names=["images"], output_names=["logits"])
    torch.onnx.export(program, opset_version=opset, verbose=False, **names).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def write_pt2(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
    """Writes torch.export's archive and returns the program loaded from it."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


def compare(model: nn.Module, exported: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> dict[str, Any]:
    """How far the logits of ``exported`` are from the model's, on normal noise in batches of several sizes."""
    generator = torch.Generator().manual_seed(0)
    differences, logits = [], []
    for size in BATCH_SIZES:
        images = torch.randn(size, *shape, generator=generator)
        expected = model(images)
        differences.append((exported(images) - expected).abs().max())
        logits.append(expected.abs().max())
    # Maxima of tensors: Python's max() could miss a NaN.
    return {
        "batch_sizes": BATCH_SIZES,
        "max_difference": torch.stack(differences).max().item(),
        "largest_logit": torch.stack(logits).max().item(),
    }


def check_description(output: Path) -> None:
    """Refuses an ``--output`` whose ``.json`` or ``.md`` exists already and is not from an export.

    Raises:
        ArgumentError: If it is somebody else's file (``package.json`` beside ``package.safetensors``).
    """
    for path, is_ours in ((output.with_suffix(".json"), _is_description), (output.with_suffix(".md"), _is_card)):
        try:
            foreign = path.exists() and not is_ours(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            foreign = True
        if foreign:
            raise ArgumentError(
                f"--output {output}: would overwrite {path}, which no export has written; give another name"
            )


def _is_description(text: str) -> bool:
    content = json.loads(text)
    return isinstance(content, dict) and DESCRIPTION <= content.keys()


def _is_card(text: str) -> bool:
    return CARD_NOTE in text


def usage(output: Path, about: dict[str, Any]) -> list[str]:
    """Python that loads the exported file."""
    prepared = "# images: shape (batch, 3, side, side), as the .json file says"
    if output.suffix == ".onnx":
        load = f'session = onnxruntime.InferenceSession("{output.name}")'
        return ["import onnxruntime", load, prepared, '(logits,) = session.run(["logits"], {"images": images})']
    if output.suffix == ".pt2":
        load = f'model = torch.export.load("{output.name}").module()'
        return ["import torch", load, prepared, "logits = model(images)"]
    return [
        "import timm",
        "import oversmoothing.zoo  # registers its models with timm",
        "model = timm.create_model(",
        f'    "{about["model"]}", num_classes={about["num_classes"]}, checkpoint_path="{output.name}",',
        f"    img_size={about['input_size']}, **{about['model_kwargs']},",
        ").eval()",
        prepared,
        "logits = model(images)",
    ]


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Writes ``--output``, its ``.json`` and, if the model is known, its card; returns the content of the ``.json``.

    Raises:
        ArgumentError: A flag is missing or wrong.
        ModelError: The model cannot be built.
        CheckpointError: The checkpoint cannot be read, has no EMA weights, or is of another model than the flags say;
            or the model cannot be exported, or the written file computes something else.
    """
    output, suffix = args.output, args.output.suffix
    if suffix not in ENDINGS:
        raise ArgumentError(f"--output {output}: must end in one of {', '.join(ENDINGS)}")
    if not output.parent.is_dir():
        raise ArgumentError(f"--output {output}: there is no folder {output.parent}: make it first")
    check_description(output)
    if args.opset is not None and suffix != ".onnx":
        raise ArgumentError(f"--opset {args.opset}: only an --output that ends in .onnx has one")
    absent = [name for name in ONNX_PACKAGES if suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if absent:
        raise ArgumentError(f"--output {output} needs {', '.join(absent)}: pip install -r requirements.txt")
    checkpoint = read_checkpoint(args.checkpoint)
    weights = "model_ema" if args.ema else "model"
    if checkpoint.get(weights) is None:
        raise CheckpointError(f"{args.checkpoint}: has no EMA weights: leave --ema out")
    # safetensors refuses tensors that share memory and changes the layout of strided ones: copy all.
    state_dict = {name: tensor.clone().contiguous() for name, tensor in checkpoint[weights].items()}
    about = describe(checkpoint, weights, args)
    missing = [flag for flag in ("model", "num_classes") if about[flag] is None]
    model = None
    if not missing:
        given = {flag: about[flag] for flag in ("num_classes", "input_size", "model_kwargs")}
        model = model_from_checkpoint(
            {**checkpoint, "model": state_dict}, source=args.checkpoint, name=about["model"], **given
        )
        model.eval().requires_grad_(False)
        crop_ratio = (checkpoint.get("args") or {}).get("eval_crop_ratio")
        about["preprocessing"] = preprocessing(model, about["input_size"], crop_ratio)
    elif suffix != ".safetensors":
        flags = " and ".join(f"--{flag.replace('_', '-')}" for flag in missing)
        raise ArgumentError(f"{args.checkpoint} does not say which model it is of: give {flags} (and --model-kwargs)")

    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        path = Path(folder) / output.name
        if suffix == ".safetensors":
            path.write_bytes(save(state_dict, metadata={"format": "pt"}))  # save_file would let only the owner read it
            torch.testing.assert_close(load_file(path), state_dict, rtol=0, atol=0, equal_nan=True)
        else:
            if suffix == ".onnx":
                about["opset"] = args.opset or OPSET
            about["check"] = write_and_compare(model, about, path)
        path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
        if model is not None:
            write_card(
                path.with_suffix(".md"),
                title=output.stem,
                model=model,
                checkpoint=checkpoint,
                source=args.checkpoint,
                ema=args.ema,
                usage=usage(output, about),
                library="timm" if suffix == ".safetensors" else None,
                images=args.images,
                figure_name=f"{output.stem}-spectrum.png",
                input_size=about["input_size"],
                note=CARD_NOTE,
            )
        for file in Path(folder).iterdir():
            os.replace(file, output.parent / file.name)
    return about


def write_and_compare(model: nn.Module, about: dict[str, Any], path: Path) -> dict[str, Any]:
    """Writes the computation to ``path``, reads it back and returns what :func:`compare` measured.

    Raises:
        CheckpointError: It cannot be written, or computes something else.
    """
    shape = (model.in_chans, about["input_size"], about["input_size"])
    any_batch = ({0: torch.export.Dim("batch")},)
    try:
        program = torch.export.export(model, (torch.randn(2, *shape),), dynamic_shapes=any_batch)
        # An operator of ours would have to be imported before the file can be loaded.
        program = program.run_decompositions({torch.ops.oversmoothing.talking_heads.default: talking_heads_as_maps})
        exported = write_onnx(program, path, about["opset"]) if path.suffix == ".onnx" else write_pt2(program, path)
    except RuntimeError as error:  # what torch's exporters raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{about['model']} cannot be exported to {path.suffix}: {reason}") from error
    found = compare(model, exported, shape)
    if not found["max_difference"] <= TOLERANCE * max(1.0, found["largest_logit"]):  # a NaN is refused too
        raise CheckpointError(
            f"{about['model']} as {path.suffix} gives other logits than the model, by up to "
            f"{found['max_difference']:.2g} (the largest is {found['largest_logit']:.2g}); nothing was written"
        )
    return found


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=os.path.expanduser,
        help="the checkpoint: a path, a URL or hf-hub:owner/name[/file]",
    )
    parser.add_argument(
        "--output", required=True, type=entry.user_path, help="the file to write: ends in .safetensors, .onnx or .pt2"
    )
    parser.add_argument(
        "--images",
        type=entry.user_path,
        metavar="DIR",
        help="measure the card's spectrum on images of this folder; default: as --spectrum-every has logged it",
    )
    parser.add_argument("--ema", action="store_true", help="export the EMA's weights instead of the model's")
    parser.add_argument(
        "--opset", type=int, choices=OPSETS, help=f"version of ONNX's operators, for older runtimes; left out: {OPSET}"
    )
    model = parser.add_argument_group("model", "Of a checkpoint of this repository all of these are known.")
    model.add_argument("--model", metavar="NAME", help="as main.py's, where the checkpoint does not say it")
    model.add_argument("--num-classes", type=int, metavar="N", help="classes of its head")
    model.add_argument("--input-size", type=int, metavar="PX", help="side of its images; left out: the model's own")
    model.add_argument("--model-kwargs", nargs="*", action=KeyValues, metavar="KEY=VALUE", help="as main.py's")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(arguments)
    try:
        about = export(args)
    except (ArgumentError, CheckpointError, ModelError, datasets.DataError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {args.output} and {args.output.with_suffix('.json')}")
    if args.output.suffix == ".safetensors":
        print(f"checked: its {about['weights']} weights equal the checkpoint's bit for bit")
    else:
        found = about["check"]
        print(
            f"checked: logits within {found['max_difference']:.2g} of the model's (largest: "
            f"{found['largest_logit']:.2g}) for batches of {', '.join(map(str, BATCH_SIZES))} images"
        )
    if about["model"] is not None:
        print(f"model card: {args.output.with_suffix('.md')}")


if __name__ == "__main__":
    entry.run(main)
