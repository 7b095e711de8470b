"""Publishes the weights of a run on the Hugging Face Hub, in timm's layout and with a model card.

    python scripts/push_to_hub.py logs/run owner/name --dry-run logs/card   # writes the files for review
    python scripts/push_to_hub.py logs/run owner/name                       # uploads them (after `hf auth login`)

It uploads model.safetensors, config.json, README.md and, if the over-smoothing was measured, its figure. Nothing else
of the run is published; of its arguments only the recipe is, no path.
``timm.create_model("hf-hub:owner/name", pretrained=True)`` loads the result. Before the upload, this script does the
same with the files and compares every weight.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, so it runs from any folder

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import timm
import torch
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HTTPError
from timm.models import save_for_hf
from torch import nn

import checkpoints
import models
import options
import oversmoothing
from datasets import DataError
from oversmoothing.weights import CheckpointError, ModelError, model_from_checkpoint, published_model, read_checkpoint
from scripts.model_card import write_card


def find_checkpoint(source: str) -> str:
    """The checkpoint of ``source``: in a run's folder the best one, else the last; anything else as it is.

    Raises:
        CheckpointError: If the folder holds none.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source
    for name in (checkpoints.BEST, checkpoints.CURRENT):
        if (folder / name).exists():
            return str(folder / name)
    raise CheckpointError(f"{source}: holds neither {checkpoints.BEST} nor {checkpoints.CURRENT}: give a run's folder")


def usage(repository: str, model: nn.Module) -> list[str]:
    """Python that loads what was published."""
    ours = model.pretrained_cfg["architecture"] in models.list_models()
    register = ["import models  # the training repository's folder: registers its models with timm"] if ours else []
    if remedies := oversmoothing.remedies_of(model):
        create = [
            "from oversmoothing.weights import published_model  # adds " + ", ".join(remedies),
            f'model = published_model("hf-hub:{repository}").eval()',
        ]
    else:
        create = [f'model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()']
    return [
        "import timm",
        *register,
        *create,
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
    ]


def write_folder(folder: Path, args: argparse.Namespace) -> None:
    """Writes the files and reads the model back from them.

    Raises:
        CheckpointError: If the run cannot be read.
        AssertionError: If the written model differs from the one that was read.
    """
    source = find_checkpoint(args.run)
    checkpoint = read_checkpoint(source)
    weights = "model_ema" if args.ema else "model"
    model = model_from_checkpoint(
        checkpoint, source=source, name=args.model, weights=weights, model_kwargs=args.model_kwargs
    )
    crop_pct = (checkpoint.get("args") or {}).get("eval_crop_ratio")
    remedies = oversmoothing.remedies_of(model)
    save_for_hf(
        model,
        str(folder),
        safe_serialization=True,
        model_config={"pretrained_cfg": {"license": args.license}} | ({"remedies": remedies} if remedies else {}),
        data_config={"crop_pct": crop_pct} if crop_pct else None,
    )
    again = published_model(str(folder)) if remedies else timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0, equal_nan=True)
    if not Path(source).expanduser().with_name("log.txt").exists():
        print(f"note: no accuracies by epoch in the card: no log.txt beside {source}", file=sys.stderr)
    write_card(
        folder / "README.md",
        title=args.repository.rpartition("/")[2],
        model=model,
        checkpoint=checkpoint,
        source=source,
        ema=args.ema,
        usage=usage(args.repository, model),
        library="timm",
        licence=args.license,
        images=args.images,
    )
    print(f"taking the {'EMA' if args.ema else 'weights'} of {source}, epoch {checkpoint.get('epoch')}")


def upload(folder: Path, repository: str, private: bool) -> str:
    """Creates the repository if need be and adds the files as one commit; returns its address.

    A README.md that is there already is kept: it may have been edited.

    Raises:
        CheckpointError: If the repository exists and is public, though ``private`` is asked for.
    """
    api = HfApi()
    api.create_repo(repository, private=private or None, exist_ok=True)
    if private and not api.model_info(repository).private:
        raise CheckpointError(f"--private: {repository} exists and is public: give another name, or leave it out")
    kept = api.file_exists(repository, "README.md")
    if kept:
        print(f"{repository} has a README.md, which stays; --dry-run DIR writes the one of this run")
    return str(
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            commit_message=f"Weights of {json.loads((folder / 'config.json').read_text())['architecture']}",
            ignore_patterns=["README.md", "spectrum.png"] if kept else None,
        ).commit_url
    )


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's --output_dir (its best checkpoint is taken), or a checkpoint")
    parser.add_argument("repository", help="owner/name on the Hub; made if it does not exist")
    parser.add_argument("--ema", action="store_true", help="the EMA of the weights")
    parser.add_argument("--private", action="store_true", help="make a repository that only its owner sees")
    parser.add_argument(
        "--dry-run", type=entry.user_path, metavar="DIR", help="write the files into a new folder, upload nothing"
    )
    parser.add_argument(
        "--images",
        type=entry.user_path,
        metavar="DIR",
        help="measure the card's spectrum on images of this folder; default: as --spectrum-every has logged it",
    )
    parser.add_argument("--license", default="mit", metavar="NAME", help="of the weights, for the card [%(default)s]")
    parser.add_argument("--model", metavar="NAME", help="where the checkpoint does not say its model")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=options.KeyValues, metavar="KEY=VALUE")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(arguments)
    try:
        if args.repository.count("/") != 1 or not all(args.repository.split("/")):
            raise CheckpointError(f"{args.repository}: is no name of a repository: write owner/name")
        if args.dry_run:
            if args.dry_run.exists() and os.listdir(args.dry_run):
                raise CheckpointError(f"--dry-run {args.dry_run}: is not empty: give a new folder")
            write_folder(args.dry_run, args)
            print(f"wrote {args.dry_run}/: {', '.join(sorted(os.listdir(args.dry_run)))}; nothing was uploaded")
            return
        if get_token() is None:
            raise CheckpointError("not logged in to the Hub: `hf auth login`, or set HF_TOKEN; or use --dry-run")
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), args)
            print(f"uploaded: {upload(Path(folder), args.repository, args.private)}")
    except (CheckpointError, ModelError, DataError) as error:
        parser.error(str(error))
    except (HTTPError, OSError) as error:
        cause = str(error).strip().splitlines()[0][:200]
        parser.error(
            f"{args.repository} at {constants.ENDPOINT}: the upload failed ({type(error).__name__}: {cause}): check "
            "the network, and that your token may write there; --dry-run DIR writes the files without it"
        )


if __name__ == "__main__":
    entry.run(main)
