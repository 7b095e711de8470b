"""Publishes the weights of a run on the Hugging Face Hub, in timm's layout and with a model card.

    python scripts/push_to_hub.py logs/run owner/name --dry-run logs/card   # writes the files for review
    python scripts/push_to_hub.py logs/run owner/name                       # uploads them (after `hf auth login`)

Uploaded are model.safetensors, config.json and README.md, and nothing else of the run: of its arguments only the
recipe, no path. ``timm.create_model("hf-hub:owner/name", pretrained=True)`` loads it; before anything is uploaded this
script does that with its files and compares every weight.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, constants, get_token
from huggingface_hub.errors import HTTPError
from timm.models import save_for_hf
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, so it runs from any folder

import checkpoints
import entry
import models
import options
import oversmoothing
from datasets import NOMINAL_CLASSES
from oversmoothing.weights import CheckpointError, ModelError, model_from_checkpoint, published_model, read_checkpoint
from scripts import markdown
from scripts.plot_log import LogError, read_log

# --data-set -> its name on the Hub where it has one, and in words.
DATASETS = {
    "IMNET": ("ILSVRC/imagenet-1k", "ImageNet-1k"),
    "IMNET100": (None, "ImageNet-100"),
    "CIFAR": ("uoft-cs/cifar100", "CIFAR-100"),
    "CIFAR10": ("uoft-cs/cifar10", "CIFAR-10"),
    "FMNIST": ("zalando-datasets/fashion_mnist", "Fashion-MNIST"),
    "INAT": (None, "iNaturalist 2018"),
    "INAT19": (None, "iNaturalist 2019"),
}
# Of a run's arguments these alone are published; what is not named here, paths above all, stays at home.
RECIPE = (
    *("model", "model_kwargs", "remedy", "input_size", "drop", "drop_path", "model_ema", "model_ema_decay"),
    *("data_set", "batch_size", "epochs", "grad_accum", "seed", "amp_dtype", "fast_loader"),
    *("opt", "opt_eps", "opt_betas", "clip_grad", "momentum", "weight_decay"),
    *("lr", "sched", "sched_on_updates", "warmup_epochs", "warmup_lr", "min_lr", "scale_min_lr"),
    *("decay_epochs", "decay_rate"),
    *("color_jitter", "hflip", "aa", "smoothing", "train_interpolation", "repeated_aug"),
    *("reprob", "remode", "recount", "resplit"),
    *("mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode"),
    *("distillation_type", "teacher_model", "distillation_alpha", "distillation_tau"),
)
CITATION = """@inproceedings{wang2022antioversmoothing,
  title     = {Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain Analysis: From Theory to Practice},
  author    = {Wang, Peihao and Zheng, Wenqing and Chen, Tianlong and Wang, Zhangyang},
  booktitle = {International Conference on Learning Representations},
  year      = {2022}
}"""


def find_checkpoint(source: str) -> str:
    """The checkpoint that is meant: of a run's folder the best one, else the last; anything else as it is.

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


def recipe(trained: dict[str, Any]) -> dict[str, Any]:
    """The published part of a run's arguments: `RECIPE`, without text that looks like a path."""

    def is_private(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(is_private, value.values()))
        if isinstance(value, list):
            return any(map(is_private, value))
        return isinstance(value, str) and ("/" in value or "\\" in value)

    return {name: trained[name] for name in RECIPE if name in trained and not is_private(trained[name])}


def as_command(chosen: dict[str, Any], processes: int) -> str:
    """The command of a recipe: what differs from the defaults of main.py."""
    parser = options.get_args_parser()
    defaults = vars(parser.parse_args([]))
    words = ["torchrun", f"--nproc_per_node={processes}", "main.py", "--data-path", "/path/to/data"]
    for name, value in chosen.items():
        if value is None or value == defaults[name]:
            continue
        if name == "remedy":
            if value:
                options_of = [f"{remedy}.{key}={entry}" for remedy, own in value.items() for key, entry in own.items()]
                words += ["--remedy", *value, "--remedy-kwargs", *options_of]
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            words += [flag, *(f"{key}={entry}" for key, entry in value.items())]
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def results(source: str, checkpoint: dict[str, Any], ema: bool) -> list[tuple[str, int, float, float]]:
    """(weights, epoch, top-1, top-5), from the ``log.txt`` beside the checkpoint; first, if known, of these weights."""
    file = Path(source).expanduser().with_name("log.txt")
    try:
        log = read_log(file) if file.exists() else []
    except LogError as error:
        raise CheckpointError(f"{error}; or move it away: the card then names no accuracies") from error
    if not log:
        print(f"note: no accuracies in the card: no log.txt beside {source}", file=sys.stderr)
        return []
    of = {line["epoch"]: line for line in log}
    best = max(log, key=lambda line: line.get("test_acc1", -1))
    this = of.get(checkpoint.get("epoch")) if checkpoint.get("step") == 0 else None
    average = "test_ema_" if ema else "test_"
    rows = [
        ("this file" + (", the EMA" if ema else ""), this, average),
        ("best epoch", best, "test_"),
        ("last epoch", log[-1], "test_"),
        ("last epoch, the EMA", log[-1], "test_ema_"),
    ]
    return [
        (what, line["epoch"], line[f"{prefix}acc1"], line[f"{prefix}acc5"])
        for what, line, prefix in rows
        if line is not None and f"{prefix}acc1" in line
    ]


def model_card(
    repository: str,
    model: nn.Module,
    checkpoint: dict[str, Any],
    rows: list[tuple[str, int, float, float]],
    licence: str,
) -> ModelCard:
    """The README.md of the repository, with the Hub's metadata."""
    trained = checkpoint.get("args") or {}
    chosen, name = recipe(trained), model.pretrained_cfg["architecture"]
    on_hub, dataset = DATASETS.get(trained.get("data_set"), (None, "images of one's own"))
    if model.num_classes != NOMINAL_CLASSES.get(trained.get("data_set"), model.num_classes):
        on_hub, dataset = None, f"{model.num_classes} classes of {dataset}"
    measured = [row for row in rows if row[0].startswith("this file")]
    data = ModelCardData(
        license=licence,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "vision-transformer", "over-smoothing"],
        datasets=[on_hub] if on_hub else None,
        model_name=repository.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=on_hub or "imagefolder",
                dataset_name=dataset,
                metric_type="accuracy",
                metric_name=f"Top-{k} accuracy in percent",
                metric_value=round(accuracy, 3),
            )
            for _, _, top1, top5 in measured
            for k, accuracy in ((1, top1), (5, top5))
        ]
        or None,
    )
    lambdas = sum(p.numel() for n, p in model.named_parameters() if oversmoothing.is_remedy_parameter(n))
    size = timm.data.resolve_model_data_config(model)["input_size"][-1]
    ours = name in models.list_models()
    register = ["import models  # the training repository's folder: registers its models with timm"] if ours else []
    if remedies := oversmoothing.remedies_of(model):
        create = [
            "from oversmoothing.weights import published_model  # adds " + ", ".join(remedies),
            f'model = published_model("hf-hub:{repository}").eval()',
        ]
    else:
        create = [f'model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()']
    usage = [
        "import timm",
        *register,
        *create,
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
    ]
    parts = [
        f"# {data.model_name}",
        f"`{name}`, {sum(p.numel() for p in model.parameters()):,} parameters ({lambdas:,} of them the remedy's), "
        f"{model.num_classes} classes, {size} px, trained on {dataset}"
        + (", from other weights (`--finetune`)." if trained.get("finetune") else "."),
        "AttnScale and FeatScale counter over-smoothing in deep vision transformers "
        "([arXiv 2203.05962](https://arxiv.org/abs/2203.05962)).",
        "## Use",
        "```python\n" + "\n".join(usage) + "\n```",
        "## Accuracy",
    ]
    if rows:
        cells = [[what, str(epoch), f"{top1:.2f}", f"{top5:.2f}"] for what, epoch, top1, top5 in rows]
        table = markdown.table(("weights", "epoch", "top-1, %", "top-5, %"), cells)
        parts += [table, "The best epoch was chosen on the images that it is measured on."]
    else:
        parts.append("Not recorded.")
    if chosen:
        processes = int(trained.get("world_size") or 1)
        everything = json.dumps(chosen | {"processes": processes}, indent=1)
        parts += [
            "## Training",
            f"```bash\n{as_command(chosen, processes)}\n```",
            f"<details><summary>the whole recipe</summary>\n\n```json\n{everything}\n```\n\n</details>",
        ]
    parts += ["## Citation", f"```bibtex\n{CITATION}\n```"]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def write_folder(folder: Path, args: argparse.Namespace) -> None:
    """Writes the three files and reads the model back from them.

    Raises:
        CheckpointError: If the run cannot be read.
        AssertionError: If what was written is another model than what was read.
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
    rows = results(source, checkpoint, args.ema)
    model_card(args.repository, model, checkpoint, rows, args.license).save(folder / "README.md")
    print(f"taking the {'EMA' if args.ema else 'weights'} of {source}, epoch {checkpoint.get('epoch')}")


def upload(folder: Path, repository: str, private: bool) -> str:
    """Creates the repository if need be and adds the files as one commit; returns its address.

    A README.md that is there already is kept: it may have been edited.

    Raises:
        CheckpointError: If it exists and everyone may read it, though ``private`` is asked for.
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
            ignore_patterns=["README.md"] if kept else None,
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
    except (CheckpointError, ModelError) as error:
        parser.error(str(error))
    except (HTTPError, OSError) as error:
        cause = str(error).strip().splitlines()[0][:200]
        parser.error(
            f"{args.repository} at {constants.ENDPOINT}: the upload failed ({type(error).__name__}: {cause}): check "
            "the network, and that your token may write there; --dry-run DIR writes the files without it"
        )


if __name__ == "__main__":
    entry.run(main)
