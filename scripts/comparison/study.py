"""A study, which says what runs of ``main.py`` are compared, and its runs.

A run is one arm at one seed in one setting (a data set, a depth, a length of the schedule). It is identified by a hash
of everything that its result depends on, so no run is made twice, even under another name or for another study.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import build
import preflight
from options import check_args
from scripts.comparison.flags import Flags, StudyError, as_words, merged, parse, parser, placeholder

# Flags for where and how a run computes and what it writes; they do not change its result.
NO_EFFECT = frozenset({
    *("output_dir", "auto_reload", "num_workers", "pin_mem", "print_freq", "download", "keep_checkpoints"),
    *("checkpoint_steps", "shard_cache", "shard_cache_gb", "dist_eval", "shard_eval", "world_size", "dist_url"),
    *("dist_timeout", "local_rank", "log_wandb", "wandb_project", "wandb_tags", "wandb_resume_id", "profile"),
})  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of ``main.py``.

    Attributes:
        arm: Name of its arm.
        setting: Name of its setting.
        seed: ``--seed`` of ``main.py``.
        flags: All of its flags except ``--seed``, ``--output_dir`` and ``--auto_reload``.
        processes: Number of its processes.
        after: The run whose checkpoint it starts from, if there is one.
        starts_from: The flag that gets this checkpoint.
    """

    arm: str
    setting: str
    seed: int
    flags: Flags
    processes: int
    after: "Run | None" = None
    starts_from: str = ""

    @cached_property
    def args(self) -> argparse.Namespace:
        """Its flags as ``main.py`` parses them."""
        return parse(self.words("run", "weights.pth"))

    @cached_property
    def identity(self) -> str:
        """Hash of what the result depends on: the flags that are not at their default, the seed, the processes.

        Flags in ``NO_EFFECT`` are left out; a checkpoint's path is replaced by the identity of the checkpoint's run.
        """
        default = parser().get_default
        matters = {name: value for name, value in vars(self.args).items() if name not in NO_EFFECT}
        matters = {name: value for name, value in matters.items() if value != default(name)}
        matters |= {"seed": self.seed, "processes": self.processes}
        if self.after is not None:
            matters[self.starts_from] = self.after.identity
        return hashlib.sha256(json.dumps(matters, sort_keys=True, default=str).encode()).hexdigest()[:10]

    @property
    def folder(self) -> str:
        """Name of its folder, which ends with its identity."""
        words = (self.arm, *([self.setting] if self.setting else []), f"seed{self.seed}", self.identity)
        return "-".join(words).replace(" ", "_")

    @property
    def epochs(self) -> int:
        return self.args.epochs

    def words(self, output_dir: str | Path, checkpoint: str | Path | None = None) -> list[str]:
        """The words of the command after ``main.py``."""
        flags = self.flags | ({self.starts_from: str(checkpoint)} if self.after is not None else {})
        return [*as_words(flags), "--seed", str(self.seed), "--output_dir", str(output_dir), "--auto_reload"]


@dataclass(frozen=True)
class Study:
    """What is compared: every arm at every seed in every setting.

    Attributes:
        title: Title of the page.
        about: A paragraph for the page.
        source: The file, for messages; or "the command line".
        baseline: The arm that the others are compared with.
        arms: Name -> flags, in the order of the tables.
        settings: Name -> flags; arms are compared within each.
        flags: Flags of all runs; those of the setting override them, and those of the arm override both.
        first: Name -> flags of runs that arms start from: ``finetune = "{name}"`` in an arm.
        seeds: Seeds of ``main.py``.
        processes: Processes of each run.
        prepare: Commands (of Python, from the root) to be run before the first run.
    """

    title: str
    source: str
    baseline: str
    arms: dict[str, Flags]
    settings: dict[str, Flags]
    flags: Flags
    seeds: list[int]
    first: dict[str, Flags] = field(default_factory=dict)
    about: str = ""
    processes: int = 1
    prepare: list[str] = field(default_factory=list)

    def runs(self) -> list[Run]:
        """All runs, also those that others start from, seed after seed: so even an unfinished study compares all arms.

        Raises:
            StudyError: With everything that ``main.py`` would refuse.
        """
        runs = []
        problems = []
        for seed in self.seeds:
            for setting, extra in self.settings.items():
                first = {
                    name: Run(name, setting, seed, merged(self.flags, extra, flags), self.processes)
                    for name, flags in self.first.items()
                }
                needed = {name for arm in self.arms if (name := self.starts_from(arm))}
                arms = [self._run(name, setting, seed, merged(self.flags, extra, self.arms[name]), first)
                        for name in self.arms]  # fmt: skip
                runs += [*(run for name, run in first.items() if name in needed), *arms]
        for run in (run for run in runs if run.seed == self.seeds[0]):
            where = f"first.{run.arm}" if run.arm in self.first else f"arms.{run.arm}"
            where += f" in settings.{run.setting}" if run.setting else ""
            problems += [f"{self.source}, {where}: {text}" for text in refusals(run)]
        if problems:
            raise StudyError("\n".join(problems))
        return runs

    def _run(self, arm: str, setting: str, seed: int, flags: Flags, first: Mapping[str, Run]) -> Run:
        flag, name = placeholder(flags)
        if not flag:
            return Run(arm, setting, seed, flags, self.processes)
        rest = {key: value for key, value in flags.items() if key != flag}
        return Run(arm, setting, seed, rest, self.processes, first[name], flag)

    def starts_from(self, arm: str) -> str:
        """Name of the run that an arm starts from; empty if it starts from random weights."""
        return placeholder(merged(self.flags, self.arms[arm]))[1]

    def only(self, names: Iterable[str]) -> "Study":
        """The study with these arms alone, and the baseline.

        Raises:
            StudyError: If an arm is unknown.
        """
        return replace(self, arms=self._chosen("--only", self.arms, names, self.baseline))

    def within(self, names: Iterable[str]) -> "Study":
        """The study in these settings alone.

        Raises:
            StudyError: If a setting is unknown.
        """
        return replace(self, settings=self._chosen("--settings", self.settings, names))

    def _chosen(self, flag: str, tables: dict[str, Flags], names: Iterable[str], *always: str) -> dict[str, Flags]:
        names = {*names, *always}
        if unknown := sorted(names - {*tables}):
            given = ", ".join(repr(name) for name in tables if name) or "nothing to choose from"
            raise StudyError(f"{flag} {unknown[0]!r}: {self.source} has {given}")
        return {name: flags for name, flags in tables.items() if name in names}

    def scaled(self, flags: Flags) -> "Study":
        """The study with these flags overriding those of all runs."""
        return replace(self, flags=merged(self.flags, flags))


def refusals(run: Run) -> list[str]:
    """What ``main.py`` would refuse in a run, one sentence each."""
    try:
        args = run.args
        check_args(args)
        build.check_model_names(args)
        preflight.check_flags(args, run.processes)
    except (StudyError, *preflight.OWN_ERRORS) as error:
        return str(error).splitlines()
    return []
