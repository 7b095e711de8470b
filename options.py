"""The command line of ``main.py``: every flag, its default and what it means. The defaults are the paper's recipe."""

import argparse
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from timm.utils import ParseKwargs

SCHEDULES = ("cosine", "step", "poly", "tanh")  # those of timm that depend on the epoch alone
INTERPOLATIONS = ("random", "bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
# ~ in them is the user's home
PATHS = ("output_dir", "resume", "finetune", "teacher_path", "data_path", "shard_cache", "real_labels")


class Interval(NamedTuple):
    """Finite numbers from ``low`` to ``high``; ``above`` excludes ``low``, ``below`` excludes ``high``."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether ``value`` is finite and lies in the interval."""
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (value > self.low if self.above else value >= self.low)
            and (value < self.high if self.below else value <= self.high)
        )

    def __str__(self) -> str:
        low, high = (f"{end:,}" for end in (self.low, self.high))
        at_least = f"above {low}" if self.above else f"{low} or more"
        if self.high == math.inf:
            return at_least
        if not self.above and not self.below:
            return f"from {low} to {high}"
        return f"{at_least}, {'below' if self.below else 'at most'} {high}"


# The allowed interval of each number (of each one in a list). Upper ends of counts are far above any real run: without
# them a mistyped number could take all memory, or years.
RANGES = {
    **dict.fromkeys(("batch_size", "grad_accum", "print_freq", "epochs"), Interval(1, 10**6)),
    **dict.fromkeys(("start_epoch", "warmup_epochs", "spectrum_every"), Interval(0, 10**6)),
    **dict.fromkeys(("keep_checkpoints", "skip_bad_images", "checkpoint_steps"), Interval(0, 10**9)),
    "profile": Interval(0, 1000),
    **dict.fromkeys(("drop", "drop_path", "hflip", "reprob", "mixup_prob", "mixup_switch_prob"), Interval(0, 1)),
    **dict.fromkeys(
        ("distillation_alpha", "model_ema_decay", "momentum", "cutmix_minmax", "opt_betas"), Interval(0, 1)
    ),
    **dict.fromkeys(("lr", "warmup_lr", "min_lr", "opt_eps", "weight_decay", "clip_grad"), Interval(0)),
    **dict.fromkeys(("decay_rate", "lr_noise", "lr_noise_std"), Interval(0)),
    **dict.fromkeys(("mixup", "cutmix", "color_jitter"), Interval(0, 1000)),
    **dict.fromkeys(("decay_epochs", "distillation_tau", "shard_cache_gb"), Interval(0, above=True)),
    "input_size": Interval(1, 8192),
    "num_classes": Interval(1, 10**7),
    "num_workers": Interval(-1, 1024),
    "seed": Interval(0, 2**62),
    "dist_timeout": Interval(1, 10**7),
    "local_rank": Interval(0, 10**6),
    "recount": Interval(1, 100),
    "smoothing": Interval(0, 1, below=True),
    "val_split": Interval(0, 1, below=True),
    "val_split_seed": Interval(0, 2**62),
    "layer_decay": Interval(0, 1, above=True),
    "eval_crop_ratio": Interval(0.05, 1),
    "lr_noise_pct": Interval(0, 1, above=True),
}
CHOICES = {
    "mixup_mode": ("batch", "pair", "elem"),
    "remode": ("const", "rand", "pixel"),
    "train_interpolation": INTERPOLATIONS,
}


class _HelpFormatter(argparse.HelpFormatter):
    """Shows each flag in one spelling, with its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = argparse.Action(
            action.option_strings[:1], action.dest, action.nargs, choices=action.choices, metavar=action.metavar
        )
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, "", {}, [], argparse.SUPPRESS) or action.nargs == 0:
            return action.help
        return f"{action.help} [%(default)s]"


class _Group:
    """An argument group whose flags can be written with ``-`` and with ``_``; DeiT's users have both in scripts."""

    def __init__(self, parser: argparse.ArgumentParser, title: str, description: str | None = None) -> None:
        self.group = parser.add_argument_group(title, description)

    def add(self, *flags: str, **kwargs) -> None:
        body = flags[0][2:]
        other = body.replace("_", "-") if "_" in body else body.replace("-", "_")
        kwargs.setdefault("dest", body.replace("-", "_"))
        self.group.add_argument(*flags, *([f"--{other}"] if other != body else []), **kwargs)


class KeyValues(ParseKwargs):
    """timm's ``KEY=VALUE`` words as a dict; a word of another form is a usage error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: list[str],
        option_string: str | None = None,
    ) -> None:
        for word in values:
            if not word.partition("=")[0].replace(".", "_").isidentifier() or "=" not in word:
                parser.error(f"argument {option_string}: {word!r} is not of the form KEY=VALUE, e.g. depth=24")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (MemoryError, RecursionError, TypeError) as error:  # literal_eval fails so on huge or deeply nested text
            parser.error(f"argument {option_string}: a value cannot be read ({type(error).__name__})")


class _Parser(argparse.ArgumentParser):
    """Replaces ``~`` in paths even where the shell does not, as in ``--output_dir=~/run``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        parsed, unknown = super().parse_known_args(args, namespace)
        for name in PATHS:
            setattr(parsed, name, os.path.expanduser(getattr(parsed, name)))
        return parsed, unknown


def get_args_parser() -> argparse.ArgumentParser:
    """The parser of ``main.py``; names and defaults of the paper's code are kept, everything else is an addition."""
    parser = _Parser(
        prog="main.py",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        description="Train and evaluate DeiT, CaiT and Swin with AttnScale and FeatScale (arXiv 2203.05962).",
        epilog="Example, two processes on one node:  torchrun --nproc_per_node=2 main.py --auto_reload "
        "--model attnscale_small_12 --batch-size 512 --data-set IMNET --data-path /data/imagenet "
        "--output_dir logs/attnscale_small_12     (flags can be written with - or with _)",
    )

    groups = (
        _model,
        _optimizer,
        _learning_rate,
        _augmentation,
        _distillation,
        _data,
        _run,
        _checkpoints,
        _evaluation,
        _processes,
        _without_effect,
    )
    for add_group in groups:
        add_group(parser)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    """The model, its regularisation and its EMA."""
    group = _Group(parser, "model")
    group.add(
        "--model",
        default="deit_base_patch16_224",
        type=str,
        metavar="NAME",
        help="any model of this zoo or of timm; --list-models prints the zoo",
    )
    group.add("--list-models", action="store_true", help="print the names of this zoo and exit")
    group.add("--input-size", default=224, type=int, metavar="PX", help="side of the square input image, in pixels")
    group.add(
        "--num-classes",
        default=None,
        type=int,
        metavar="N",
        help="classes of the head; default: counted from the data set",
    )
    group.add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="constructor arguments of the model, e.g. embed_dim=96 num_heads=3 patch_size=8",
    )
    group.add(
        "--remedy",
        nargs="*",
        default=[],
        metavar="NAME",
        help="remedies against over-smoothing to add to the model, of those that --list-remedies prints; left out: "
        "those of the checkpoint that the run starts from",
    )
    group.add(
        "--remedy-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="their options, e.g. layers=6: K=3; of one among several: gfsa.K=3",
    )
    group.add("--list-remedies", action="store_true", help="print the remedies with their formulas and leave")
    group.add(
        "--drop",
        type=float,
        default=0.0,
        metavar="P",
        help="dropout after the position embedding, the attention projection and in the MLP (none on the head)",
    )
    group.add(
        "--drop-path",
        type=float,
        default=0.1,
        metavar="P",
        help="stochastic depth: rises linearly to P over the layers on DeiT and Swin; constant on CaiT, and on DeiT "
        "with --model-kwargs uniform_drop_path=True",
    )
    group.add("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass")
    group.add(
        "--torchcompile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        metavar="MODE",
        help="run the model through torch.compile, in this of its modes; without one: default",
    )
    group.add("--model-ema", action="store_true", default=True, help="keep an EMA of the weights (the default)")
    group.add("--no-model-ema", action="store_false", dest="model_ema", help="keep no EMA")
    group.add("--model-ema-decay", type=float, default=0.99996, metavar="D", help="decay of the EMA, per step")
    group.add("--model-ema-force-cpu", action="store_true", default=False, help="keep the EMA in host memory")


def _optimizer(parser: argparse.ArgumentParser) -> None:
    """The optimizer, and how long it runs."""
    group = _Group(parser, "optimizer")
    group.add("--batch-size", default=64, type=int, metavar="N", help="images per process and step")
    group.add("--epochs", default=500, type=int, metavar="N", help="passes over the data; the paper's recipe is 500")
    group.add(
        "--grad-accum",
        default=1,
        type=int,
        metavar="N",
        help="batches whose gradients are added up before a step; counts in the effective batch",
    )
    group.add("--opt", default="adamw", type=str, metavar="NAME", help="any optimizer of timm")
    group.add("--opt-eps", default=1e-8, type=float, metavar="EPS", help="epsilon of the optimizer")
    group.add(
        "--opt-betas", default=None, type=float, nargs="+", metavar="B", help="betas; default: the optimizer's own"
    )
    group.add(
        "--opt-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="further arguments of the optimizer, e.g. nesterov=True ns_steps=6 (docs/optimizers.md)",
    )
    group.add(
        "--clip-grad",
        type=float,
        default=None,
        metavar="NORM",
        help="clip the gradient's global norm; 0 (the default): no clipping",
    )
    group.add("--momentum", type=float, default=0.9, metavar="M", help="momentum of SGD-like optimizers")
    group.add(
        "--weight-decay",
        type=float,
        default=0.05,
        metavar="W",
        help="weight decay of matrices; vectors, biases, tokens and position embeddings get none",
    )


def _learning_rate(parser: argparse.ArgumentParser) -> None:
    """The learning rate of every step."""
    group = _Group(
        parser,
        "learning rate",
        "Set once an epoch: epoch 0 runs at --warmup-lr, epoch e > 0 at the schedule's "
        "value for e - 1, as in the paper's runs; with --sched-on-updates the same of steps. "
        "The plan is printed at the start.",
    )
    group.add(
        "--lr",
        type=float,
        default=5e-4,
        metavar="LR",
        help="for a batch of 512; scaled by batch-size x processes x grad-accum / 512",
    )
    group.add("--unscale-lr", action="store_true", help="take --lr as it is, whatever the batch (DeiT III's recipe)")
    group.add(
        "--layer-decay",
        type=float,
        default=None,
        metavar="D",
        help="for fine-tuning: each layer's learning rate is D times that of the layer above it, up to the head's "
        "(0.65 to 0.75 are usual); default: one learning rate for all",
    )
    group.add("--sched", default="cosine", type=str, metavar="NAME", help=f"one of {', '.join(SCHEDULES)}")
    group.add(
        "--sched-on-updates",
        action="store_true",
        help="set the rate at every optimizer step, not once an epoch (Swin's recipe)",
    )
    group.add(
        "--warmup-epochs", type=int, default=5, metavar="N", help="epochs of linear warm-up, if the schedule has one"
    )
    group.add("--warmup-lr", type=float, default=1e-6, metavar="LR", help="where the warm-up starts")
    group.add("--min-lr", type=float, default=1e-5, metavar="LR", help="where the cosine ends")
    group.add(
        "--scale-min-lr",
        action="store_true",
        help="scale --min-lr and --warmup-lr with the batch, as --lr is (Swin's recipe)",
    )
    group.add("--decay-epochs", type=float, default=30, metavar="N", help="interval of step schedules; cosine has none")
    group.add("--decay-rate", "--dr", type=float, default=0.1, metavar="RATE", help="factor of step schedules")
    group.add(
        "--lr-noise", type=float, nargs="+", default=None, metavar="PCT", help="epochs between which there is noise"
    )
    group.add("--lr-noise-pct", type=float, default=0.67, metavar="PCT", help="limit of that noise")
    group.add("--lr-noise-std", type=float, default=1.0, metavar="STD", help="standard deviation of that noise")


def _augmentation(parser: argparse.ArgumentParser) -> None:
    """What happens to training images."""
    group = _Group(parser, "augmentation")
    group.add(
        "--color-jitter",
        type=float,
        default=0.4,
        metavar="PCT",
        help="colour jitter; only without --aa, as in timm, or with --three-augment",
    )
    group.add("--hflip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip")
    group.add(
        "--aa",
        type=str,
        default=RAND_AUGMENT,
        metavar="NAME",
        help='timm\'s AutoAugment policy; "none" switches it off',
    )
    group.add(
        "--three-augment",
        "--ThreeAugment",
        action="store_true",
        help="DeiT III's ThreeAugment, in place of --aa: each image is made grey, solarised or blurred, then "
        "--color-jitter. --reprob stays as it is (DeiT III: 0)",
    )
    group.add(
        "--src",
        action="store_true",
        help="DeiT III's simple random crop, in place of the random resized crop: the shorter side is resized to "
        "--input-size, the square cropped from it with 4 reflected pixels around",
    )
    group.add("--smoothing", type=float, default=0.1, metavar="EPS", help="label smoothing")
    group.add(
        "--bce-loss",
        action="store_true",
        help="binary cross entropy of each class, in place of the cross entropy; with mixup and cutmix every class in "
        "the mixed image is present, whatever its share (DeiT III). Needs --smoothing 0",
    )
    group.add("--train-interpolation", type=str, default="bicubic", metavar="NAME", help="random, bilinear or bicubic")
    group.add(
        "--repeated-aug",
        action="store_true",
        default=True,
        help="each image three times an epoch, each time differently (the default)",
    )
    group.add("--no-repeated-aug", action="store_false", dest="repeated_aug", help="each image once an epoch")
    group.add(
        "--repeated-aug-local",
        action="store_true",
        help="the three times on one process, one after the other, instead of on three processes as in DeiT: the fast "
        "loader then decodes an image once, in place of two or three times (docs/data.md)",
    )
    group.add("--reprob", type=float, default=0.25, metavar="P", help="probability of random erasing")
    group.add(
        "--remode", type=str, default="pixel", metavar="MODE", help="what random erasing fills in: const, rand or pixel"
    )
    group.add("--recount", type=int, default=1, metavar="N", help="rectangles that random erasing draws")
    group.add("--mixup", type=float, default=0.8, metavar="ALPHA", help="mixup alpha; 0 switches it off")
    group.add("--cutmix", type=float, default=1.0, metavar="ALPHA", help="cutmix alpha; 0 switches it off")
    group.add(
        "--cutmix-minmax",
        type=float,
        nargs="+",
        default=None,
        metavar="R",
        help="smallest and largest ratio of the cut; switches cutmix on and its alpha off",
    )
    group.add("--mixup-prob", type=float, default=1.0, metavar="P", help="probability of mixing a batch at all")
    group.add("--mixup-switch-prob", type=float, default=0.5, metavar="P", help="chance of cutmix where both are on")
    group.add("--mixup-mode", type=str, default="batch", metavar="MODE", help="mix per batch, pair or elem")


def _distillation(parser: argparse.ArgumentParser) -> None:
    """A teacher, and the weight of its loss."""
    group = _Group(parser, "distillation", "Needs a student with a distillation token (deit_*_distilled_* of timm).")
    group.add(
        "--distillation-type", default="none", choices=["none", "soft", "hard"], type=str, help="none, soft or hard"
    )
    group.add("--teacher-model", default="regnety_160", type=str, metavar="NAME", help="any model of timm")
    group.add(
        "--teacher-path", type=str, default="", metavar="FILE", help="the teacher's weights, as --resume reads them"
    )
    group.add("--distillation-alpha", default=0.5, type=float, metavar="A", help="weight of the distillation loss")
    group.add("--distillation-tau", default=1.0, type=float, metavar="T", help="temperature of the soft loss")


def _data(parser: argparse.ArgumentParser) -> None:
    """Where images come from, and how they are loaded."""
    group = _Group(parser, "data")
    group.add(
        "--data-path",
        default="/datasets01/imagenet_full_size/061417/",
        type=str,
        metavar="DIR",
        help="folder of the data set; for ImageNet and FOLDER it holds train/<class>/ and val/<class>/, or train.tar "
        "and val.tar (or .zip), or is one archive of both, read in place; for wds a folder of shards or its "
        "URL (https://, gs://, hf://, or a command with {} for the file name: 'pipe:aws s3 cp s3://bucket/{} -')",
    )
    group.add(
        "--data-set",
        default="IMNET100",
        type=str,
        choices=["CIFAR", "IMNET", "IMNET100", "IMNET-V2", "INAT", "INAT19", "CIFAR10", "FMNIST", "FOLDER", "wds"],
        help="kind of data set; IMNET100 is 100 of ImageNet's classes, CIFAR is CIFAR-100, FOLDER any tree of images "
        "with one folder a class, IMNET-V2 a folder of 0/ to 999/ to evaluate on (docs/evaluate.md), wds WebDataset "
        "shards (scripts/prepare_wds.py): local ones give the same run as the tree they were made from, bit for bit; "
        "remote ones are as reproducible, but have an order of their own, and the three views of --repeated-aug stay "
        "on one process (docs/data.md)",
    )
    group.add(
        "--shard-cache",
        default="",
        metavar="DIR",
        help="cache of downloaded shards, preferably on a local disk; default: "
        "~/.cache/vit-anti-oversmoothing/shards ($XDG_CACHE_HOME)",
    )
    group.add(
        "--shard-cache-gb",
        type=float,
        default=64.0,
        metavar="GB",
        help="size of that cache; the least recently used shards are removed; give 2 or more for each process",
    )
    group.add(
        "--inat-category",
        default="name",
        type=str,
        help="level of iNaturalist's labels",
        choices=["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"],
    )
    group.add(
        "--num_workers",
        default=10,
        type=int,
        metavar="N",
        help="loader processes of each process, -1: one for each of its CPU cores; their number changes no result",
    )
    group.add(
        "--pin-mem", action="store_true", default=True, help="page-locked memory: faster copies to a GPU (the default)"
    )
    group.add("--no-pin-mem", action="store_false", dest="pin_mem", help="ordinary memory")
    group.add(
        "--fast-loader",
        action="store_true",
        default=True,
        help="decode only what a crop needs, resize with torch, normalise and erase on the device (the default): the "
        "plain loader's draws and distribution, 1.8 to 3 times its images/s (docs/performance.md)",
    )
    group.add(
        "--no-fast-loader",
        action="store_false",
        dest="fast_loader",
        help="the plain loader: Pillow's resize, float batches; 0.4%% of the pixel values differ, by one level of 255",
    )
    group.add(
        "--eval-crop-ratio",
        type=float,
        default=None,
        metavar="R",
        help="share of the resized image that evaluation keeps; default: the model's own (DeiT 224/256, CaiT 1)",
    )
    group.add(
        "--skip-bad-images",
        type=int,
        default=0,
        metavar="N",
        help="training images that each process may replace because they cannot be read; an evaluation image is never "
        "replaced",
    )
    group.add("--download", action="store_true", help="fetch CIFAR, CIFAR10 or FMNIST into --data-path")
    group.add(
        "--val-split",
        type=float,
        default=0.0,
        metavar="F",
        help="hold out this share of the training images, of each class alike, and let it choose best_checkpoint.pth: "
        "val_* in log.txt; the test set is evaluated beside it and chooses nothing. 0: train on all images, and the "
        "test set chooses. No effect with --eval",
    )
    group.add(
        "--val-split-seed",
        type=int,
        default=0,
        metavar="N",
        help="which images are held out; apart from --seed, so that runs of different seeds hold out the same",
    )


def _run(parser: argparse.ArgumentParser) -> None:
    """Device, precision, seed, and what is written."""
    group = _Group(parser, "run")
    group.add(
        "--output_dir",
        default="",
        metavar="DIR",
        help="checkpoints, log.txt and TensorBoard files go here; empty: nothing is written",
    )
    group.add("--device", default="auto", metavar="NAME", help="auto (CUDA if there is a GPU, else CPU), cuda or cpu")
    group.add(
        "--amp-dtype",
        default=None,
        choices=["float16", "bfloat16", "float32"],
        help="precision of the forward pass; default: float16 with loss scaling on CUDA, float32 on CPU",
    )
    group.add("--seed", default=0, type=int, metavar="N", help="seed of every random draw of a run")
    group.add(
        "--print-freq",
        default=10,
        type=int,
        metavar="N",
        help="steps between console lines, and between checks that the loss is finite",
    )
    group.add(
        "--spectrum-every",
        default=0,
        type=int,
        metavar="N",
        help="every N epochs, log how smooth the features are by layer (spectrum_* in log.txt, TensorBoard); 0: never",
    )
    group.add(
        "--log-wandb",
        action="store_true",
        help="also log to Weights & Biases, under the name of --output_dir; WANDB_MODE=offline needs no network "
        "(docs/watch.md)",
    )
    group.add("--wandb-project", default=None, metavar="NAME", help="its project; default: that of wandb's settings")
    group.add("--wandb-tags", default=[], nargs="+", metavar="TAG", help="tags of the run there")
    group.add(
        "--wandb-resume-id",
        default="",
        metavar="ID",
        help="go on in this run of W&B; default: that of --output_dir, if it is continued, else a new one",
    )
    group.add(
        "--profile",
        default=0,
        type=int,
        metavar="N",
        help="trace N steps of the first epoch on rank 0, print the operators that take longest, and write the trace "
        "to --output_dir/profile/; 0: none",
    )


def _checkpoints(parser: argparse.ArgumentParser) -> None:
    """Where a run starts, and what it keeps."""
    group = _Group(parser, "checkpoints")
    group.add(
        "--auto_reload",
        action="store_true",
        help="continue from the newest valid checkpoint in --output_dir, if there is one, even if --resume is given",
    )
    group.add(
        "--resume",
        default="",
        metavar="FILE",
        help="a whole training state to continue, or weights to start from: a .pth or .safetensors file, its URL, or "
        "hf-hub:owner/name[@revision][/file] on the Hugging Face Hub (docs/weights.md)",
    )
    group.add(
        "--finetune",
        default="",
        metavar="FILE",
        help="weights to start from; head and position embeddings are adapted to another class count or image size",
    )
    group.add(
        "--start_epoch", default=0, type=int, metavar="N", help="first epoch, unless a training state says otherwise"
    )
    group.add("--keep-checkpoints", type=int, default=0, metavar="N", help="keep the last N epochs' checkpoints too")
    group.add(
        "--checkpoint-steps",
        type=int,
        default=0,
        metavar="N",
        help="also save every N steps within an epoch; 0: only at its end",
    )


def _evaluation(parser: argparse.ArgumentParser) -> None:
    """Evaluation without training."""
    group = _Group(parser, "evaluation")
    group.add("--eval", action="store_true", help="evaluate --resume (or --finetune) and exit")
    group.add("--eval-ema", action="store_true", help="evaluate the EMA of the weights too")
    group.add(
        "--real-labels",
        default="",
        metavar="JSON",
        help="with --eval: the accuracy on ReaL labels too, from real.json of google-research/reassessed-imagenet",
    )
    group.add("--throughput", action="store_true", help="measure images/s of the forward pass and exit")
    group.add("--no-dist-eval", action="store_false", dest="shard_eval", help="let every process evaluate everything")


def _processes(parser: argparse.ArgumentParser) -> None:
    """How processes find each other."""
    group = _Group(parser, "processes", "Rank and world size come from torchrun, torch.distributed.launch or Slurm.")
    group.add("--dist_url", default="env://", metavar="URL", help="rendezvous of the processes")
    group.add(
        "--dist-timeout",
        default=600,
        type=int,
        metavar="SECONDS",
        help="how long to wait for a process that does not answer",
    )
    group.add(
        "--local-rank", type=int, default=None, help=argparse.SUPPRESS
    )  # torch.distributed.launch without --use_env


def _without_effect(parser: argparse.ArgumentParser) -> None:
    """Flags of the paper's code that old scripts may pass."""
    group = _Group(parser, "without effect", "Accepted, so that scripts written for DeiT's main.py run as they are.")
    group.add("--world_size", default=1, type=int, metavar="N", help="the launcher's value is used")
    group.add("--dist-eval", action="store_true", help="evaluation is shared unless --no-dist-eval is given")
    group.add("--cooldown-epochs", type=int, default=10, metavar="N", help="--epochs is the whole length of a run")
    group.add("--patience-epochs", type=int, default=10, metavar="N", help="of the plateau schedule, which is refused")
    group.add("--resplit", action="store_true", help="of augmentation splits, which this recipe does not have")


class ArgumentError(ValueError):
    """The flags contradict each other or hold an impossible value; the message names all of them."""


def check_args(args: argparse.Namespace) -> None:
    """Gathers everything that is wrong with the flags and raises once.

    Raises:
        ArgumentError: One line a problem, each with the flag, the value received and the way out.
    """
    problems = []

    def require(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    for name, interval in RANGES.items():
        value = getattr(args, name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            whole = "whole number" if isinstance(values[0], int) else "number"
            require(all(map(interval.holds, values)), f"{spell(args, name)}: give a {whole} {interval}")
    for name, choices in CHOICES.items():
        require(getattr(args, name) in choices, f"{spell(args, name)}: give one of {', '.join(choices)}")
    for name, value in args.model_kwargs.items():  # dropout rates: modules check them only in training
        if name.endswith("_rate"):
            number = isinstance(value, int | float) and Interval(0, 1).holds(value)
            require(number, f"--model-kwargs {name}={value}: give a number from 0 to 1")
    require(
        not (mixup_active(args) and args.batch_size % 2) or args.eval or args.throughput,
        f"--batch-size {args.batch_size} is odd: mixup and cutmix "
        "mix pairs; give an even number, or --mixup 0 --cutmix 0",
    )
    require(
        args.sched in SCHEDULES,
        f"--sched {args.sched}: use one of {', '.join(SCHEDULES)}; plateau depends on the results so far, not on the "
        "epoch alone, so a resumed run would differ",
    )
    opt = args.opt.lower()
    require(
        not opt.removeprefix("lookahead_").startswith("fused"),
        f"--opt {args.opt} is apex's, which is not used here: give --opt {opt.replace('fused', '')}, timm's own",
    )
    require(
        not (args.unscale_lr and args.scale_min_lr),
        "--unscale-lr and --scale-min-lr: give one of them; the bounds of the rate are scaled as the rate is",
    )
    require(
        not args.bce_loss or args.smoothing == 0,
        f"--bce-loss {spell(args, 'smoothing')}: smoothing gives every class a share of the target, and --bce-loss "
        "counts each class with a share as present; give --smoothing 0",
    )
    require(
        not args.three_augment or args.aa.strip().lower() in (RAND_AUGMENT, "none", ""),
        f"--three-augment {spell(args, 'aa')}: give one of them; --three-augment takes the place of --aa",
    )
    require(
        not args.repeated_aug_local or args.repeated_aug,
        "--no-repeated-aug --repeated-aug-local: give one of them; without repeats there is nothing to keep together",
    )
    require(
        not args.src or args.train_interpolation != "random",
        "--src --train-interpolation random: give the one filter to resize with, such as bicubic",
    )
    require(
        not (args.resume and args.finetune),
        f"--resume {args.resume} and --finetune {args.finetune}: give one of them; "
        "--finetune for weights, --resume for a training state",
    )
    require(
        not args.auto_reload or args.output_dir or args.eval,
        "--auto_reload needs --output_dir, where the checkpoints are",
    )
    require(
        not args.spectrum_every or args.output_dir or args.eval or args.throughput,
        f"--spectrum-every {args.spectrum_every} needs --output_dir, where its numbers go",
    )
    require(
        not args.log_wandb or args.output_dir or args.eval or args.throughput,
        "--log-wandb needs --output_dir: its last part names the run, and W&B's files go there",
    )
    of_wandb = [name for name in ("wandb_project", "wandb_tags", "wandb_resume_id") if getattr(args, name)]
    require(args.log_wandb or not of_wandb, f"{spell(args, *of_wandb)}: no effect without --log-wandb: add it")
    require(
        not args.profile or args.output_dir or args.eval or args.throughput,
        f"--profile {args.profile} needs --output_dir, where its trace goes",
    )
    require(
        not args.eval or args.resume or args.finetune or (args.auto_reload and args.output_dir),
        "--eval needs weights: give --resume FILE",
    )
    require(
        not args.real_labels or args.eval,
        f"--real-labels {args.real_labels} needs --eval: these labels are for evaluation alone",
    )
    require(
        args.data_set != "IMNET-V2" or args.eval or args.throughput,
        "--data-set IMNET-V2 has no training images, only some to evaluate: give --eval",
    )
    require(
        args.distillation_type == "none" or args.teacher_path or args.eval,
        f"--distillation-type {args.distillation_type} needs --teacher-path: an untrained teacher teaches nothing",
    )
    minmax = [
        int(args.input_size * ratio) for ratio in args.cutmix_minmax or () if RANGES["cutmix_minmax"].holds(ratio)
    ]
    require(
        args.cutmix_minmax is None or (len(minmax) == len(args.cutmix_minmax) == 2 and minmax[0] < minmax[1]),
        f"{spell(args, 'cutmix_minmax')}: give two ratios, the first below the second by at least a pixel",
    )
    require(
        args.lr_noise is None or len(args.lr_noise) <= 2,
        f"{spell(args, 'lr_noise')}: give where the noise begins, or where it begins and where it ends",
    )
    # timm draws again until the noise is within its limit.
    require(
        args.lr_noise is None or args.lr_noise_std <= 100 * args.lr_noise_pct,
        f"{spell(args, 'lr_noise_std', 'lr_noise_pct')}: the noise is hardly ever within its limit; "
        "give a smaller --lr-noise-std",
    )
    require(
        not args.output_dir or not Path(args.output_dir).is_file(),
        f"--output_dir {args.output_dir} is a file: give a folder",
    )
    for name in PATHS:
        require("\0" not in getattr(args, name), f"{spell(args, name)!r}: a path has no null character")
    if problems:
        raise ArgumentError("\n".join(problems))


def spell(args: argparse.Namespace, *names: str) -> str:
    """Flags with their values as on the command line: ``--opt-betas 0.9 0.99 --opt lion``."""

    def words(value: Any) -> Iterable[Any]:
        if value is True:  # a switch
            return ()
        if isinstance(value, dict):
            return (f"{key}={entry}" for key, entry in value.items())
        return value if isinstance(value, list | tuple) else [value]

    spelled = (f"--{'output_dir' if name == 'output_dir' else name.replace('_', '-')}" for name in names)
    return " ".join(
        " ".join(map(str, [flag, *words(getattr(args, name))])) for flag, name in zip(spelled, names, strict=True)
    )


def mixup_active(args: argparse.Namespace) -> bool:
    """Whether batches are mixed at all, which decides the loss: soft targets or label smoothing."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
