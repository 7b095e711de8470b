"""Model cards: what a model is, how good, how it was trained and what its remedy learnt, written from a checkpoint.

``scripts/push_to_hub.py`` and ``scripts/export.py`` write one beside the weights, with what they can find: the
checkpoint, the ``log.txt`` beside it, and images if some are given. Paths and names of folders stay out of it.
"""

import copy
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from timm.data import resolve_data_config
from torch import nn
from torch.utils.data import DataLoader

import options
import oversmoothing
from datasets import NOMINAL_CLASSES, DataOptions, build_transform
from epochlog import LogError, read_log
from oversmoothing.analysis import probe
from oversmoothing.analysis.cost import count_macs
from oversmoothing.analysis.figures import features, style
from oversmoothing.analysis.measurement import measure
from oversmoothing.analysis.results import describe_parameter
from oversmoothing.analysis.subject import subject_of
from oversmoothing.weights import CheckpointError
from scripts import markdown
from scripts.analysis_images import ImageFiles

SPECTRUM_IMAGES, BATCH = 128, 16  # of --images: at most so many, and a batch of them

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
# The only arguments of a run that are published; all others, above all paths, are left out.
RECIPE = (
    *("model", "model_kwargs", "remedy", "input_size", "drop", "drop_path", "model_ema", "model_ema_decay"),
    *("data_set", "batch_size", "epochs", "grad_accum", "seed", "amp_dtype", "fast_loader"),
    *("opt", "opt_eps", "opt_betas", "opt_kwargs", "clip_grad", "momentum", "weight_decay"),
    *("lr", "unscale_lr", "layer_decay", "sched", "sched_on_updates", "warmup_epochs", "warmup_lr", "min_lr"),
    *("scale_min_lr", "decay_epochs", "decay_rate", "lr_noise", "lr_noise_pct", "lr_noise_std"),
    *("color_jitter", "hflip", "aa", "three_augment", "src", "smoothing", "bce_loss", "train_interpolation"),
    *("repeated_aug", "repeated_aug_local"),
    *("reprob", "remode", "recount", "resplit", "val_split", "val_split_seed"),
    *("mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode"),
    *("distillation_type", "teacher_model", "distillation_alpha", "distillation_tau"),
)
CITATION = """@inproceedings{wang2022antioversmoothing,
  title     = {Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain Analysis: From Theory to Practice},
  author    = {Wang, Peihao and Zheng, Wenqing and Chen, Tianlong and Wang, Zhangyang},
  booktitle = {International Conference on Learning Representations},
  year      = {2022}
}"""


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


class Accuracy(NamedTuple):
    """One row of the card's table."""

    weights: str
    epoch: int
    top1: float
    top5: float
    images: str  # "test", or "held out" of the training images by --val-split


def epochs_of(source: str) -> list[dict[str, Any]]:
    """The ``log.txt`` beside a checkpoint; empty where there is none.

    Raises:
        CheckpointError: If there is one that cannot be read.
    """
    file = Path(source).expanduser().with_name("log.txt")
    try:
        return read_log(file) if file.exists() else []
    except LogError as error:
        raise CheckpointError(f"{error}; or move it away: the card then names no accuracies") from error


def accuracies(log: list[dict[str, Any]], checkpoint: dict[str, Any], ema: bool) -> list[Accuracy]:
    """Accuracies of these weights, if their epoch is in the log, then of the best and of the last epoch."""
    if not log:
        return []
    chosen_by = "val_acc1" if "val_acc1" in log[-1] else "test_acc1"
    best = max(log, key=lambda line: line.get(chosen_by, -1))
    of = {line["epoch"]: line for line in log}
    this = of.get(checkpoint.get("epoch")) if checkpoint.get("step") == 0 else None
    rows = [
        ("this file, the EMA" if ema else "this file", this, "ema_" if ema else ""),
        ("best epoch", best, ""),
        ("last epoch", log[-1], ""),
        ("last epoch, the EMA", log[-1], "ema_"),
    ]
    return [
        Accuracy(what, line["epoch"], line[f"{split}_{average}acc1"], line[f"{split}_{average}acc5"], images)
        for what, line, average in rows
        for split, images in (("test", "test"), ("val", "held out"))
        if line is not None and {f"{split}_{average}acc1", f"{split}_{average}acc5"} <= line.keys()
    ]


def remedy_section(model: nn.Module) -> list[str]:
    """Each kind of parameter that a remedy adds, with its formula and its mean and range in every layer."""
    of_kind: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if oversmoothing.is_remedy_parameter(name):
            layer, _, kind = name.rpartition(".")
            of_kind.setdefault(kind, []).append((layer, parameter.detach().float()))
    if not of_kind:
        return []
    parts = ["## Remedy"]
    if options_of := oversmoothing.remedies_of(model):
        parts.append(", ".join(f"`{name}` {own}" for name, own in options_of.items()))
    for kind, layers in of_kind.items():
        try:
            what, _, formula = describe_parameter(kind).partition(": ")
            parts.append(f"`{kind}`, {what}: `{formula}`")
        except StopIteration:  # a parameter of a module that the remedy adds, such as a linear layer's weight
            parts.append(f"`{kind}`, parameter of the remedy")
        cells = [
            [
                f"`{layer}`",
                str(values.numel()),
                *(f"{number(values):.4f}" for number in (torch.mean, torch.min, torch.max)),
            ]
            for layer, values in layers
        ]
        parts.append(markdown.table(("layer", "values", "mean", "smallest", "largest"), cells))
    return parts


def draw_logged(log: list[dict[str, Any]], checkpoint: dict[str, Any]) -> tuple[Figure, str] | None:
    """The spectrum that ``--spectrum-every`` has logged up to the checkpoint's epoch, with a caption, or None."""
    last = checkpoint.get("epoch")

    def is_row(value: Any) -> bool:
        return isinstance(value, list) and all(type(number) in (int, float, type(None)) for number in value)

    panels = {
        "spectrum_token_similarity": ("how alike the tokens are", "cosine similarity of distinct tokens"),
        "spectrum_hc_dc_mlp": ("how much the tokens differ from their mean", "‖HC‖ / ‖DC‖"),
    }
    logged = [
        line
        for line in log
        if (last is None or line["epoch"] <= last) and all(is_row(line.get(quantity)) for quantity in panels)
    ]
    if not logged:
        return None
    figure, axes = style.panels(1, 2, width=4.5, height=3.4)
    shown = {line["epoch"]: line for line in (logged[0], logged[-1])}
    for ax, (quantity, (title, ylabel)) in zip(axes.flat, panels.items(), strict=True):
        for index, (epoch, line) in enumerate(shown.items()):
            values = [math.nan if value is None else value for value in line[quantity]]
            ax.plot(range(len(values)), values, label=f"after epoch {epoch}", **style.line_style(index))
        ax.set(ylabel=ylabel, xlabel=style.LAYER_AXIS)
        ax.set_title(title, fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    style.logarithmic(axes.flat[1])
    axes.flat[0].legend(frameon=False)
    return figure, (
        "Of each block's output, of the run's weights (not their EMA), means over the images that `--spectrum-every` "
        "looks at. Left: towards 1 all tokens are alike. Right: towards 0 they become one."
    )


def draw_measured(model: nn.Module, folder: Path, input_size: int, crop_ratio: float | None) -> tuple[Figure, str]:
    """The curves of :func:`draw_logged`, measured for this model on images of ``folder``, with a caption.

    Raises:
        UnsupportedModelError: If its attention cannot be recomputed.
        DataError: If there are no images.
    """
    subject = subject_of(model.eval(), "this model", input_size)
    data_options = DataOptions(input_size=input_size, eval_crop_ratio=crop_ratio)
    files = ImageFiles(folder, build_transform(False, data_options, subject.data_config), flag="--images")
    files.files = files.files[:: max(1, math.ceil(len(files) / SPECTRUM_IMAGES))]  # folders are ordered by class
    results = measure(
        [subject], ([images] for images, _ in DataLoader(files, batch_size=BATCH)), quantities=["features"]
    )
    return features.draw_overview(results), (
        f"Of each block's output, on {len(files)} images. Left: towards 1 all tokens are alike. Right: towards 0 they "
        "become one."
    )


def write_card(
    file: Path,
    *,
    title: str,
    model: nn.Module,
    checkpoint: dict[str, Any],
    source: str,
    ema: bool,
    usage: Sequence[str],
    library: str | None,
    licence: str | None = None,
    images: Path | None = None,
    figure_name: str = "spectrum.png",
    input_size: int | None = None,
    note: str = "",
) -> None:
    """Writes the card, with the Hub's metadata at its head, and the figure beside it where there is one.

    Args:
        file: The Markdown file.
        title: Name of the model in the heading and the metadata.
        model: With the weights that the card is about.
        checkpoint: From ``read_checkpoint``; the recipe in its ``args`` is published, but no path.
        source: The checkpoint's file; the ``log.txt`` beside it has the accuracies and the spectrum.
        ema: Whether the weights are the EMA's.
        usage: Lines of Python.
        library: The Hub's name of the library that reads the weights.
        licence: Licence of the weights, by the Hub's identifiers.
        images: Folder of images to measure the spectrum on; None: as the run has logged it.
        figure_name: Name of the figure's file.
        input_size: Side of the model's images; None: as the checkpoint says, else the model's own.
        note: Put at the end.

    Raises:
        CheckpointError: If the log cannot be read.
        DataError: If ``images`` holds none.
    """
    trained = checkpoint.get("args") or {}
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or trained.get("model")
    chosen = recipe(trained)
    log = epochs_of(source)
    rows = accuracies(log, checkpoint, ema)
    on_hub, dataset = DATASETS.get(trained.get("data_set"), (None, "images of one's own"))
    if model.num_classes != NOMINAL_CLASSES.get(trained.get("data_set"), model.num_classes):
        on_hub, dataset = None, f"{model.num_classes} classes of {dataset}"
    data = ModelCardData(
        license=licence,
        library_name=library,
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "vision-transformer", "over-smoothing"],
        datasets=[on_hub] if on_hub else None,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=on_hub or "imagefolder",
                dataset_name=dataset,
                metric_type="accuracy",
                metric_name=f"Top-{k} accuracy in percent",
                metric_value=round(accuracy, 3),
            )
            for row in rows
            if row.weights.startswith("this file") and row.images == "test"
            for k, accuracy in ((1, row.top1), (5, row.top5))
        ]
        or None,
    )
    added = sum(p.numel() for n, p in model.named_parameters() if oversmoothing.is_remedy_parameter(n))
    size = input_size or trained.get("input_size") or resolve_data_config({}, model=model)["input_size"][-1]
    of_gradients = copy.deepcopy(model).requires_grad_(True)  # the counter needs gradients
    gmacs = count_macs(of_gradients, torch.zeros(1, getattr(model, "in_chans", 3), size, size)) / 1e9
    trained_on = f", trained on {dataset}" if trained else ""
    parts = [
        f"# {title}",
        f"`{name}`, {sum(p.numel() for p in model.parameters()):,} parameters ({added:,} of them the remedy's), "
        f"{gmacs:.3g} GMACs an image, {model.num_classes} classes, {size} px{trained_on}"
        + (", from other weights (`--finetune`)." if trained.get("finetune") else "."),
        "AttnScale and FeatScale counter over-smoothing in deep vision transformers "
        "([arXiv 2203.05962](https://arxiv.org/abs/2203.05962)).",
        "## Use",
        "```python\n" + "\n".join(usage) + "\n```",
        "## Accuracy",
    ]
    if rows:
        cells = [[row.weights, str(row.epoch), f"{row.top1:.2f}", f"{row.top5:.2f}", row.images] for row in rows]
        parts.append(markdown.table(("weights", "epoch", "top-1, %", "top-5, %", "images"), cells))
        if any(row.images == "held out" for row in rows):
            parts.append(
                "The best epoch was chosen on images held out of the training set "
                f"(`--val-split {trained.get('val_split')}`), not on the test images."
            )
        else:
            parts.append("The best epoch was chosen on the images that it is measured on.")
    elif best := (checkpoint.get("max_accuracy") or {}).get("ema_acc1" if ema else "acc1"):
        parts.append(f"Best top-1 of the run up to epoch {checkpoint.get('epoch')}: {best:.2f} %. Its log is not here.")
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
    parts += remedy_section(model)
    parts.append("## Over-smoothing by layer")
    try:
        drawn = draw_logged(log, checkpoint) if images is None else None
        drawn = drawn if images is None else draw_measured(model, images, size, trained.get("eval_crop_ratio"))
    except probe.UnsupportedModelError:
        drawn = None
    if drawn is None:
        parts.append("Not measured (`--spectrum-every` of the training, or `--images` of the command that wrote this).")
    else:
        drawn[0].savefig(file.with_name(figure_name), dpi=120)
        parts += [f"![similarity of the tokens and high-frequency energy by layer]({figure_name})", drawn[1]]
    parts += ["## Citation", f"```bibtex\n{CITATION}\n```", *([note] if note else [])]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(file)
