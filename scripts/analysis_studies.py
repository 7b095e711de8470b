"""The flags of an analysis that ask for more: similarity of layers (CKA), linear probes, sweeps of a parameter.

Each is another pass over the same images.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from oversmoothing import RemedyError
from oversmoothing.analysis.cka import check_pool, compare_layers
from oversmoothing.analysis.figures import Picture
from oversmoothing.analysis.linear_probe import probe_layers
from oversmoothing.analysis.pooled import POOLS
from oversmoothing.analysis.results import write_csv
from oversmoothing.analysis.subject import Subject
from oversmoothing.analysis.sweep import VALUES, check_remedy, parameters_of, sweep_parameter, sweep_picture

Batches = Callable[[str], Iterable[Any]]  # a line for the progress bar -> one pass over the images


def add_flags(parser: argparse.ArgumentParser) -> None:
    """``--cka``, ``--probe``, ``--sweep`` and what belongs to them."""
    group = parser.add_argument_group("further studies (each another pass over the images)")
    group.add_argument(
        "--cka",
        nargs="?",
        const="patches",
        choices=list(POOLS),
        default=None,
        help="similarity of all layers, of each model and between models (linear CKA): of the mean of the patch "
        "tokens, or with 'class' of the class token",
    )
    group.add_argument(
        "--probe",
        action="store_true",
        help="accuracy of a linear classifier on each layer's output; needs --data-set, for labels",
    )
    group.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="REMEDY",
        help="accuracy, loss and token similarity with a remedy's parameter set by hand, without training: attnscale, "
        "or featscale.lamb2 for one parameter of several; needs --data-set. A plain model gets the remedy for that",
    )
    group.add_argument(
        "--sweep-values", nargs="+", type=float, default=None, metavar="V", help="default: -1 to 1 in steps of 0.25"
    )
    group.add_argument(
        "--sweep-layers",
        choices=("all", "each"),
        default="all",
        help="all layers at once, or each alone, which costs as many passes as there are layers (default: all)",
    )


def problems(args: argparse.Namespace) -> Iterator[str]:
    """Everything wrong with these flags."""
    asked = {"--cka": args.cka, "--probe": args.probe, "--sweep": args.sweep}
    for flag in (flag for flag, value in asked.items() if value):
        if not args.data_path:
            yield f"{flag} needs --data-path, a folder of images"
        elif flag != "--cka" and not args.data_set:
            yield f"{flag} needs labels: give --data-set (FOLDER for a tree with one folder a class)"
    for word in args.sweep:
        remedy, _, parameter = word.partition(".")
        try:
            names = parameters_of(remedy)
        except RemedyError as error:
            yield f"--sweep {word}: {error}"
            continue
        if parameter and parameter not in names:
            yield f"--sweep {word}: {remedy} has {', '.join(f'{remedy}.{name}' for name in names)}"
    if args.sweep_values is not None and not args.sweep:
        yield "--sweep-values without --sweep: name a remedy, as --sweep attnscale"
    wrong = [value for value in args.sweep_values or () if not math.isfinite(value)]
    if wrong:
        yield f"--sweep-values {wrong[0]}: give finite numbers"


def check_models(args: argparse.Namespace, subjects: Sequence[Subject], device: torch.device) -> None:
    """Refuses models that a study does not fit, before any image is read.

    Raises:
        RemedyError: If a remedy to sweep does not fit a model.
        ValueError: If a model has no class token in its blocks, for ``--cka class``.
    """
    models = {subject.label: subject.model for subject in subjects}
    for word in args.sweep:
        check_remedy(models, word.partition(".")[0])
    if args.cka == "class":
        empty = [torch.zeros(1, 3, s.input_size, s.input_size, device=device) for s in subjects]
        check_pool(models, empty, args.cka)


def run_studies(args: argparse.Namespace, subjects: Sequence[Subject], batches: Batches, folder: Path) -> list[Picture]:
    """Makes what the flags ask for, writes cka.csv, linear_probe.csv and sweep_<remedy>.csv; returns the figures.

    Args:
        args: Of the command.
        subjects: The models.
        batches: Gives a pass over the images, as :func:`inputs.inputs_and_labels` takes them.
        folder: ``--output_dir``.
    """
    models = {subject.label: subject.model for subject in subjects}
    pictures = []
    if args.cka:
        cka = compare_layers(models, batches("CKA"), pool=args.cka)
        write_csv(folder / "cka.csv", cka.rows())
        pictures.append(cka.picture())
    if args.probe:
        probes = probe_layers(models, batches("linear probes"), seed=args.seed)
        write_csv(folder / "linear_probe.csv", probes.rows())
        pictures.append(probes.picture())
    for word in dict.fromkeys(args.sweep):
        remedy, _, parameter = word.partition(".")
        chosen = dict(parameter=parameter or None, values=args.sweep_values or VALUES, layers=args.sweep_layers)
        sweeps = sweep_parameter(models, batches(f"sweep of {word}"), remedy, **chosen)
        write_csv(folder / f"sweep_{word}.csv", (row for sweep in sweeps for row in sweep.rows()))
        pictures.append(replace(sweep_picture(sweeps), file=f"sweep_{word}.png"))
    return pictures
