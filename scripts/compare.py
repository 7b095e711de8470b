"""Compares models fairly: every arm at every seed, paired by seed, with intervals and corrected p-values.

    python scripts/compare.py scripts/reproduce/studies/digits_depth24.toml
    python scripts/compare.py --arm "plain=--model deit_small_12" --arm "attnscale=--model attnscale_small_12" \\
        --seeds 5 --output_dir logs/compare/photos --data-set FOLDER --data-path photos --epochs 20

A study is a TOML file (docs/compare.md), or arms on the command line; flags that are not in this script's --help are
main.py's, for all runs. The same command continues a study that was stopped, and nothing is run twice.
In --output_dir come report.html (one page with all figures), table.md, results.csv (each epoch of each run),
layers.csv, comparison.csv (means, differences, intervals), figures as PNG, and runs/, one folder of main.py each.
"""

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import torch

import utils
from datasets import DataError
from epochlog import LogError
from scripts.comparison import report, run
from scripts.comparison.flags import StudyError
from scripts.comparison.launch import Launcher, Local, Queue
from scripts.comparison.records import epochs_done, find_folder, is_finished
from scripts.comparison.study import Run, Study
from scripts.comparison.study_file import arms_from_words, make_study, read_study


def get_parser() -> argparse.ArgumentParser:
    """The flags of a comparison; all others are ``main.py``'s."""
    parser = argparse.ArgumentParser(
        prog="compare.py",
        usage="compare.py [STUDY.toml] [flags below] [flags of main.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("study", "A TOML file, the first word of all, or arms.")
    group.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="an arm, with flags of main.py; repeat it. The first is the baseline",
    )
    group.add_argument("--seeds", type=int, default=None, metavar="N", help="0 to N-1 (default: the study's, or 5)")
    group.add_argument("--scale", default=None, metavar="NAME", help="flags of the study's [scales.NAME] for all runs")
    group.add_argument("--only", nargs="+", default=None, metavar="ARM", help="these arms alone, and the baseline")
    group.add_argument("--settings", nargs="+", default=None, metavar="NAME", help="these settings of the study alone")

    group = parser.add_argument_group("execution")
    group.add_argument(
        "--output_dir",
        "--output-dir",
        type=entry.user_path,
        default=None,
        metavar="DIR",
        help="default: logs/compare/<study>",
    )
    group.add_argument(
        "--jobs",
        type=int,
        default=None,
        metavar="N",
        help="runs at a time (default: as many as there are GPUs or cores)",
    )
    group.add_argument("--threads", type=int, default=1, metavar="N", help="of each process on a CPU (default: 1)")
    group.add_argument(
        "--submitit",
        default=None,
        metavar="FLAGS",
        help="queue each run on Slurm, with flags of run_with_submitit.py: '--ngpus 1 --partition gpu --timeout 600'",
    )
    group.add_argument("--list", action="store_true", help="print the runs and their commands, and leave")
    group.add_argument("--report", action="store_true", help="only the report of the runs that are there")
    return parser


def build_study(args: argparse.Namespace, flags: list[str]) -> Study:
    """The study of the command line.

    Raises:
        StudyError: With everything that is wrong with it.
    """
    if (args.study is None) == (not args.arm):
        raise StudyError("give either a study's TOML file or arms (--arm NAME=FLAGS): python scripts/compare.py --help")
    if args.seeds is not None and args.seeds < 1:
        raise StudyError(f"--seeds {args.seeds}: give 1 or more")
    if args.jobs is not None and args.jobs < 1:
        raise StudyError(f"--jobs {args.jobs}: give 1 or more")
    if args.study is not None:
        study = read_study(args.study, args.scale)
        over = arms_from_words([], flags)["flags"]
        study = study.scaled(over) if over else study
    else:
        study = make_study(arms_from_words(args.arm, flags), "the command line", args.scale, default_title="comparison")
    if args.seeds is not None:
        study = replace(study, seeds=list(range(args.seeds)))
    study = study.within(args.settings) if args.settings is not None else study
    return study.only(args.only) if args.only is not None else study


def build_launcher(args: argparse.Namespace, study: Study) -> Launcher:
    """Where the runs are made, and how many at a time."""
    if args.submitit is not None:
        return Queue(shlex.split(args.submitit), args.jobs or 64)
    available = torch.cuda.device_count() or len(os.sched_getaffinity(0)) // args.threads
    return Local(study.processes, args.jobs or max(1, available // study.processes), args.threads)


def main(args: argparse.Namespace, flags: list[str]) -> int:
    """Makes the runs, then the report; returns the exit code.

    Raises:
        StudyError: If the study or a flag is wrong.
        Stopped: After a signal.
    """
    study = build_study(args, flags)
    runs = study.runs()
    folder = args.output_dir or Path("logs", "compare", args.study.stem if args.study else "comparison")
    if args.list:
        list_runs(runs, folder / "runs")
        return 0
    with utils.claimed_folder(str(folder), utils.World(0, 0, 1, torch.device("cpu")), timeout_s=10):
        failed = []
        if not args.report:
            run.prepare(study)
            failed = run.make_runs(runs, folder / "runs", build_launcher(args, study))
        if {one.identity for one in failed} == {one.identity for one in runs}:
            raise report.ReportError(f"{folder}: every run failed; the reasons are above")
        written = report.write(study, runs, folder, command=shlex.join(sys.argv))
    print(f"wrote {written}")
    if failed:
        names = ", ".join(sorted({one.folder for one in failed}))
        print(f"error: {len(failed)} runs are missing from the report: {names}", file=sys.stderr)
    return 1 if failed else 0


def list_runs(runs: list[Run], folder: Path) -> None:
    """Prints each run, how far it is, and its command."""
    for one in {one.identity: one for one in runs}.values():
        where = find_folder(folder, one)
        state = "done" if is_finished(where) else f"epoch {epochs_done(where)} of {one.epochs}"
        start = find_folder(folder, one.after) / "checkpoint.pth" if one.after is not None else None
        print(f"{where.name} ({state}): {shlex.join(['main.py', *one.words(where, start)])}")


def parse_args(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of :func:`get_parser` with ``study``, and those of ``main.py``.

    The study is taken from the first word. As a positional argument, argparse would confuse it with the value of one of
    ``main.py``'s flags.
    """
    study, rest = (entry.user_path(words[0]), words[1:]) if words and not words[0].startswith("-") else (None, words)
    return get_parser().parse_known_args(rest, argparse.Namespace(study=study))


def cli(words: list[str] | None = None) -> int:
    """Command line; see the head of this file."""
    args, flags = parse_args(sys.argv[1:] if words is None else words)
    try:
        return main(args, flags)
    except (StudyError, report.ReportError, LogError, DataError, utils.SetupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return entry.EXIT_BAD_INPUT
    except run.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code


if __name__ == "__main__":
    entry.run(cli)
