"""Exports a checkpoint's weights as safetensors, with a JSON file that says which model they belong to.

python scripts/export.py --checkpoint logs/run/best_checkpoint.pth --output model.safetensors [--ema]

writes model.safetensors and model.json. The weights are read back and compared before the script reports success.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, so it runs from any folder

from checkpoints import CheckpointError, read
from weights import number_of_classes


def describe(checkpoint: dict[str, Any], weights: str) -> dict[str, Any]:
    """What is needed to build the model again, and how good it is; None where the checkpoint does not say.

    Args:
        checkpoint: From `checkpoints.read`.
        weights: Its entry that is exported, ``model`` or ``model_ema``.
    """
    args = checkpoint.get("args") or {}
    return {
        "model": args.get("model"),
        "model_kwargs": args.get("model_kwargs"),
        "num_classes": args.get("num_classes") or number_of_classes(checkpoint[weights]),
        "input_size": args.get("input_size"),
        "weights": weights,
        "epoch": checkpoint.get("epoch"),
        "max_accuracy": checkpoint.get("max_accuracy"),
    }


def export(source: str, output: Path, ema: bool) -> dict[str, Any]:
    """Writes ``output`` and its ``.json``, and returns the content of the latter.

    Raises:
        CheckpointError: The source cannot be read or has no EMA weights, or the output has another ending.
        AssertionError: What was written differs from what was read.
    """
    if output.suffix != ".safetensors":
        raise CheckpointError(f"--output {output}: must end in .safetensors")
    checkpoint = read(source)
    weights = "model_ema" if ema else "model"
    if checkpoint.get(weights) is None:
        raise CheckpointError(f"{source}: has no EMA weights: leave --ema out")
    # Tensors that share memory are refused by safetensors, and strided ones change their layout: copy all.
    state_dict = {name: tensor.clone().contiguous() for name, tensor in checkpoint[weights].items()}
    save_file(state_dict, output, metadata={"format": "pt"})
    written = load_file(output)
    torch.testing.assert_close(written, state_dict, rtol=0, atol=0, equal_nan=True)
    description = describe(checkpoint, weights)
    output.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n")
    return description


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="the checkpoint: a path, a URL or hf-hub:owner/name[/file]")
    parser.add_argument("--output", required=True, type=Path, help="path of the .safetensors file to write")
    parser.add_argument("--ema", action="store_true", help="export the EMA's weights instead of the model's")
    args = parser.parse_args(arguments)
    try:
        description = export(args.checkpoint, args.output, args.ema)
    except (CheckpointError, OSError, SafetensorError) as error:
        parser.error(str(error))
    print(f"wrote {args.output} and {args.output.with_suffix('.json')}: {json.dumps(description)}")


if __name__ == "__main__":
    main()
