"""What the attention of vision transformers does to the features, layer by layer: numbers, figures and a report.

    python scripts/analyze.py --data-path my_photos --model deit_small_patch16_224 --pretrained
    python scripts/analyze.py --data-path data/imagenet --data-set IMNET --num-images 512 --device cuda \\
        --model deit_small_24 --resume plain.pth --model attnscale_small_24 --resume attnscale.pth
    python scripts/analyze.py --image cat.jpg --layer 10 --model attnscale_small_12 --resume attnscale.pth

Models are from this zoo or timm; --resume, --pretrained, --label and --model-kwargs belong to the --model before them.
Without weights a model is analysed as initialised. --output_dir gets report.html (self-contained, with all figures),
analysis.csv and analysis.json (every number in a figure), and the figures as PNG. Several models also give
differences.csv; --cka, --probe and --sweep give cka.csv, linear_probe.csv and sweep_*.csv; --image gives token_map.csv
and .png, and tokens_image and rollout_image if --quantities has these groups. docs/analysis.md explains each.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import timm
import torch
from torch import Tensor
from tqdm import tqdm

import models  # noqa: F401  (registers the zoo with timm)
from datasets import DATA_SETS, build_transform
from options import RANGES, KeyValues
from oversmoothing import list_remedies
from oversmoothing.analysis import probe
from oversmoothing.analysis.figures import Picture
from oversmoothing.analysis.layer_maps import draw_layer_maps, layer_map_rows, layer_maps
from oversmoothing.analysis.measurement import measure
from oversmoothing.analysis.quantities import DEFAULT, GROUPS, choose
from oversmoothing.analysis.report import write_analysis
from oversmoothing.analysis.results import Result, write_csv
from oversmoothing.analysis.subject import RANDOM_WEIGHTS, ModelSpec, Subject, build_subject, unique_labels
from oversmoothing.analysis.token_map import draw_token_maps, token_map, token_map_rows
from readers.images import load_image
from scripts import analysis_studies
from scripts.analysis_images import build_loader, options_of
from scripts.explanations import explain_images, why_unwritable
from utils import SetupError, resolve_device


class _AddModel(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.models = [*(namespace.models or []), ModelSpec(values)]


class _OfLastModel(argparse.Action):
    """Stores a flag in the --model before it."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if not namespace.models:
            parser.error(f"{option_string} belongs to the --model before it: give --model first")
        setattr(namespace.models[-1], self.dest, True if self.nargs == 0 else values)


class _KwargsOfLastModel(KeyValues):
    """main.py's KEY=VALUE parser, stored in the --model before it."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        holder = argparse.Namespace()
        super().__call__(parser, holder, values, option_string)
        _OfLastModel([option_string], self.dest)(parser, namespace, getattr(holder, self.dest), option_string)


def get_parser() -> argparse.ArgumentParser:
    """The flags; those that main.py has too mean the same here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("models (repeat --model for more; the others belong to the --model before them)")
    group.add_argument("--model", action=_AddModel, dest="models", metavar="NAME", help="of this zoo or of timm")
    group.add_argument(
        "--resume",
        type=os.path.expanduser,
        action=_OfLastModel,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="checkpoint (file, URL, hf-hub:owner/name), loaded strictly; ours also give --model-kwargs, --input-size",
    )
    group.add_argument(
        "--pretrained", action=_OfLastModel, nargs=0, default=argparse.SUPPRESS, help="published weights (downloads)"
    )
    group.add_argument(
        "--label",
        action=_OfLastModel,
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="name in the figures (default: the model's)",
    )
    group.add_argument(
        "--model-kwargs",
        dest="kwargs",
        action=_KwargsOfLastModel,
        nargs="*",
        default=argparse.SUPPRESS,
        metavar="KEY=VALUE",
        help="constructor arguments, e.g. depth=24",
    )
    group.add_argument(
        "--remedy",
        action=_OfLastModel,
        nargs="+",
        choices=list_remedies(),
        default=argparse.SUPPRESS,
        metavar="NAME",
        help=f"remedies to add to the model, of {', '.join(list_remedies())}; left out: as the checkpoint says",
    )
    group.add_argument(
        "--remedy-kwargs",
        action=_KwargsOfLastModel,
        nargs="*",
        default=argparse.SUPPRESS,
        metavar="KEY=VALUE",
        help="their options, e.g. layers=6: K=3",
    )

    group = parser.add_argument_group("images")
    group.add_argument(
        "--data-path",
        default="",
        metavar="DIR",
        help="without --data-set: any folder of images, with or without sub-folders; val/ if it has one",
    )
    group.add_argument("--data-set", choices=DATA_SETS, default=None, help="evaluation images of one of main.py's sets")
    group.add_argument("--inat-category", default="name", metavar="LEVEL", help="as in main.py")
    group.add_argument("--download", action="store_true", help="fetch CIFAR or Fashion-MNIST to --data-path")
    group.add_argument(
        "--num-images", type=int, default=64, metavar="N", help="images, drawn by --seed; 0 takes all (default: 64)"
    )
    group.add_argument("--input-size", type=int, default=None, metavar="PX", help="default: each model's own")
    group.add_argument("--eval-crop-ratio", type=float, default=None, metavar="R", help="default: each model's own")
    group.add_argument(
        "--tokens",
        choices=("all", "patches"),
        default="all",
        help="tokens in the feature quantities: the whole sequence, as in the paper, or patches only",
    )
    group.add_argument(
        "--image",
        type=os.path.expanduser,
        default=None,
        metavar="FILE",
        help="one image: the attention of --layer over it",
    )
    group.add_argument(
        "--layer",
        type=int,
        default=-1,
        metavar="L",
        help="block of --image, from 0; negative counts from the last (default: -1)",
    )

    group = parser.add_argument_group("quantities")
    group.add_argument(
        "--quantities",
        nargs="+",
        choices=[*GROUPS, "all"],
        default=list(DEFAULT),
        metavar="NAME",
        help=f"groups of them, or all (default: {' '.join(DEFAULT)}): "
        + "; ".join(f"{name}, {group.about}" for name, group in GROUPS.items()),
    )

    analysis_studies.add_flags(parser)

    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir",
        "--output-dir",
        type=os.path.expanduser,
        default="analysis",
        metavar="DIR",
        help="default: analysis",
    )
    group.add_argument("--device", default="auto", metavar="NAME", help="auto (CUDA if there is a GPU), cuda or cpu")
    group.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="images at a time; memory grows with it, not with --num-images (default: 8)",
    )
    group.add_argument(
        "--num_workers",
        "--num-workers",
        type=int,
        default=0,
        metavar="N",
        help="loader processes; -1 takes all cores (default: 0, the images are loaded in this process)",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the choice of images and of initial weights")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Gathers everything wrong with the flags and raises once.

    Raises:
        ValueError: One line a problem.
    """
    problems = []
    if not args.models:
        problems.append("--model is missing: name a model of this zoo or of timm")
    if not args.data_path and not args.image and any(group.needs_images for group in choose(args.quantities)):
        problems.append("--data-path is missing: give a folder of images (or --image FILE for one image's maps)")
    if args.data_set and not args.data_path:
        problems.append(f"--data-set {args.data_set} needs --data-path, the folder of its files")
    ranges = {"batch_size": 1, "num_images": 0, "num_workers": -1, "seed": 0, "input_size": 1}
    for flag, least in ranges.items():
        value = getattr(args, flag)
        if value is not None and not least <= value < 2**62:
            problems.append(f"--{flag.replace('_', '-')} {value}: give a whole number, {least} or more")
    ratio = args.eval_crop_ratio
    if ratio is not None and not RANGES["eval_crop_ratio"].holds(ratio):
        problems.append(f"--eval-crop-ratio {ratio}: give a number {RANGES['eval_crop_ratio']}")
    for spec in args.models or []:
        if not timm.is_model(spec.name):
            problems.append(f"--model {spec.name}: neither this zoo nor timm knows it; timm.list_models() lists all")
        if spec.resume and spec.pretrained:
            problems.append(f"--model {spec.name}: --resume and --pretrained exclude each other")
    problems += analysis_studies.problems(args)
    if problems:
        raise ValueError("\n".join(problems))


def build_subjects(args: argparse.Namespace, device: torch.device) -> list[Subject]:
    """The models of the command line."""
    labels = unique_labels(args.models)
    given = dict(device=device, input_size=args.input_size, seed=args.seed)
    return [build_subject(spec, label, **given) for spec, label in zip(args.models, labels, strict=True)]


def measure_images(args: argparse.Namespace, subjects: Sequence[Subject], device: torch.device) -> list[Result]:
    """One pass over the chosen images through all models; without images, only the quantities that need none."""
    groups = choose(args.quantities)
    if not args.data_path or not any(group.needs_images for group in groups):
        names = [group.name for group in groups if not group.needs_images]
        return measure(subjects, [], quantities=names) if names else []
    batches = passes(args, subjects, device)
    return measure(subjects, (images for images, _ in batches("layers")), args.tokens == "patches", args.quantities)


def passes(args: argparse.Namespace, subjects: Sequence[Subject], device: torch.device) -> analysis_studies.Batches:
    """A function that makes a pass over the images: batches of (one input a model, labels), with a progress bar."""
    loader, views = build_loader(args, subjects)

    def batches(title: str) -> Iterator[tuple[list[Tensor], Tensor]]:
        with tqdm(total=len(loader.dataset), unit="image", desc=title, disable=None) as bar:
            for images, labels in loader:
                inputs = [view.to(device, non_blocking=True) for view in images]
                yield [inputs[view] for view in views], labels
                bar.update(len(labels))

    return batches


def describe_settings(args: argparse.Namespace, device: torch.device, num_images: int) -> dict[str, Any]:
    """What a reader needs to reproduce the numbers."""
    return {
        "images": num_images,
        "data": args.data_path,
        "data_set": args.data_set or "folder of images",
        "quantities": " ".join(group.name for group in choose(args.quantities)),
        "tokens_in_feature_quantities": args.tokens,
        "image": args.image or "",
        "seed": args.seed,
        "device": str(device),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
    }


def main(args: argparse.Namespace) -> Path:
    """Measures, draws and writes; returns the path of the report.

    Raises:
        ValueError: With one sentence about the flag, the model or the data at fault.
    """
    check_args(args)
    folder = Path(args.output_dir)
    check_files(args, folder)
    device = torch.device(resolve_device(args.device))
    subjects = build_subjects(args, device)
    for subject in subjects:
        check_input(subject, device)
        if args.image and not -len(subject.layers) <= args.layer < len(subject.layers):
            raise ValueError(f"--layer {args.layer}: {subject.label} has {len(subject.layers)} of them, counted from 0")
        if subject.weights == RANDOM_WEIGHTS:
            print(f"note: {subject.label} has random weights: give it --resume or --pretrained", file=sys.stderr)
    analysis_studies.check_models(args, subjects, device)
    folder.mkdir(parents=True, exist_ok=True)
    with explain_images():
        results = measure_images(args, subjects, device)
        pictures = draw_image(args, subjects, device, folder) if args.image else []
        if args.cka or args.probe or args.sweep:
            pictures += analysis_studies.run_studies(args, subjects, passes(args, subjects, device), folder)
    settings = describe_settings(args, device, results[0].num_images if results else 0)
    return write_analysis(results, folder, settings, pictures)


def check_files(args: argparse.Namespace, folder: Path) -> None:
    """Reads ``--image`` and tries ``--output_dir``, or where it will be made, before anything that takes time.

    Raises:
        DataError: If the image cannot be read.
        ValueError: If there is no such image, or the folder cannot be made or written.
    """
    if args.image and not Path(args.image).is_file():
        raise ValueError(f"--image {args.image}: there is no such file")
    if args.image:
        with explain_images():
            load_image(args.image)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    reason = why_unwritable(there) if there.is_dir() else f"{there} is a file"
    if reason:
        raise ValueError(f"--output_dir {folder} cannot be written ({reason}): give another folder")


def check_input(subject: Subject, device: torch.device) -> None:
    """Passes one empty image through a model, before any image is read.

    Raises:
        NonFiniteError: If its features are not finite.
        ValueError: If it does not take images of that size.
    """
    image = torch.zeros(1, 3, subject.input_size, subject.input_size, device=device)
    try:
        with torch.inference_mode(), probe.visiting(subject.model, lambda view: None, finite=subject.label):
            subject.model(image)
    except probe.NonFiniteError:
        raise
    except Exception as error:  # a model's complaint can be of any kind
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"--model {subject.name} takes no RGB images of {subject.input_size} pixels ({reason}): give another "
            "--input-size or --model-kwargs"
        ) from error


def draw_image(
    args: argparse.Namespace, subjects: Sequence[Subject], device: torch.device, folder: Path
) -> list[Picture]:
    """Figures of ``--image``: the attention of ``--layer``, and the maps of the chosen groups; writes both as CSV."""
    picture, name = load_image(args.image), Path(args.image).name
    transforms = [build_transform(False, options_of(args, subject), subject.data_config) for subject in subjects]
    inputs = [(subject, t(picture).to(device)) for subject, t in zip(subjects, transforms, strict=True)]
    pictures = []
    for group in choose(args.quantities):
        if not group.image_map:
            continue
        layers = [layer_maps(subject, image, group.name) for subject, image in inputs]
        if any(item.maps for item in layers):
            file, title = f"{group.name}_image", f"{name}, layer by layer: {group.image_map}"
            write_csv(folder / f"{file}.csv", layer_map_rows(layers, group.name))
            caption = "Models that have no such map over the picture are left out."
            figure = draw_layer_maps(layers, group.image_map)
            pictures.append(Picture(f"{file}.png", title, caption, figure))
    maps = [token_map(subject, image, args.layer) for subject, image in inputs]
    write_csv(folder / "token_map.csv", token_map_rows(maps))
    caption = (
        "Averaged over heads and multiplied by the number of tokens N: uniform attention is 1 in the second "
        "column and 0 in the third."
    )
    return [Picture("token_map.png", f"Attention over {name}", caption, draw_token_maps(maps)), *pictures]


def cli() -> int:
    """Command line; see the head of this file. Returns the exit code."""
    args = get_parser().parse_args()
    return entry.explained(lambda: print(f"wrote {main(args)}"), ValueError, OSError, SetupError)


if __name__ == "__main__":
    entry.run(cli)
