"""A study from its TOML file, or from arms on the command line; each fault in it becomes one sentence."""

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scripts.comparison.flags import StudyError, flags_of, merged, normalised, placeholder
from scripts.comparison.study import Study

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OURS = ("output_dir", "auto_reload", "seed", "eval", "throughput", "list_models", "resume", "local_rank")
NAME = re.compile(r"[\w.,+=-]+( [\w.,+=-]+)*")  # becomes a folder's name
KEYS = {
    "title": str, "about": str, "baseline": str, "seeds": (int, list), "processes": int, "prepare": list,
    "flags": dict, "arms": dict, "settings": dict, "first": dict, "scales": dict,
}  # fmt: skip


def read_study(path: Path, scale: str | None = None) -> Study:
    """The study of a TOML file.

    Args:
        path: See docs/compare.md for its keys.
        scale: Name of one of its ``[scales.NAME]``, whose flags override those of all runs.

    Raises:
        StudyError: If there is no such file, it is not TOML, or a key or value is not valid.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}): give the TOML file of a study") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not TOML: {error}") from error
    return make_study(table, str(path), scale, default_title=path.stem)


def make_study(table: Mapping[str, Any], source: str, scale: str | None = None, default_title: str = "") -> Study:
    """A study from its table, checked.

    Raises:
        StudyError: One line a problem, each with ``source``, the key and the value.
    """
    problems = list(_problems(table))
    scales = table.get("scales", {})
    if scale is not None and isinstance(scales, dict) and scale not in scales:
        problems.append(f"--scale {scale}: [scales] has {', '.join(scales) or 'none'}")
    if problems:
        raise StudyError("\n".join(f"{source}: {text}" for text in problems))
    seeds = table.get("seeds", 5)
    return Study(
        title=table.get("title", default_title),
        about=table.get("about", ""),
        source=source,
        baseline=table.get("baseline", next(iter(table["arms"]))),
        arms={name: normalised(flags) for name, flags in table["arms"].items()},
        settings=table.get("settings", {"": {}}),
        flags=merged(table.get("flags", {}), scales[scale] if scale is not None else {}),
        seeds=list(range(seeds)) if isinstance(seeds, int) else seeds,
        first=table.get("first", {}),
        processes=table.get("processes", 1),
        prepare=table.get("prepare", []),
    )


def _problems(table: Mapping[str, Any]) -> Iterable[str]:
    """Everything wrong with a study's table, except its flags, which :meth:`Study.runs` checks."""
    for key, value in table.items():
        if key not in KEYS:
            yield f"key {key!r} is unknown: use {', '.join(KEYS)}"
        elif not isinstance(value, KEYS[key]) or isinstance(value, bool):
            kinds = KEYS[key] if isinstance(KEYS[key], tuple) else (KEYS[key],)
            names = {str: "a string", int: "a whole number", list: "a list", dict: "a table"}
            yield f"{key} = {value!r}: give {' or '.join(names[kind] for kind in kinds)}"
    groups = {
        key: found for key in ("arms", "settings", "first", "scales") if isinstance(found := table.get(key, {}), dict)
    }
    for key, group in groups.items():
        for name, flags in group.items():
            if not NAME.fullmatch(name):
                yield f"[{key}.{name}]: use letters, digits, spaces and . , _ + = - in names"
            if not isinstance(flags, dict):
                yield f"{key}.{name} = {flags!r}: give a table of main.py's flags"
    tables = [*(flags for group in groups.values() for flags in group.values()), table.get("flags", {})]
    for flags in tables:
        for name in normalised(flags) if isinstance(flags, dict) else ():
            if name in OURS:
                yield f"{name} = {flags.get(name, '')!r}: compare.py sets this flag itself, leave it out"
    arms = groups.get("arms", {})
    if len(arms) < 1:
        yield "no arms: give at least one table [arms.NAME] with main.py's flags"
    elif isinstance(table.get("baseline", ""), str) and table.get("baseline", next(iter(arms))) not in arms:
        yield f"baseline = {table['baseline']!r}: the arms are {', '.join(arms)}"
    for name, flags in arms.items():
        if isinstance(flags, dict) and (before := placeholder(flags)[1]) and before not in groups.get("first", {}):
            given = ", ".join(groups.get("first", {})) or "none"
            yield f"arms.{name} starts from {{{before}}}: there is no table [first.{before}] (given: {given})"
    yield from _seed_problems(table.get("seeds", 5))
    if isinstance(table.get("processes", 1), int) and table.get("processes", 1) < 1:
        yield f"processes = {table['processes']}: give 1 or more"
    for command in table.get("prepare", []) if isinstance(table.get("prepare", []), list) else ():
        if not isinstance(command, str) or not shlex.split(command):
            yield f"prepare = {command!r}: give the words after python, as 'scripts/prepare_digits.py --output data'"


def _seed_problems(seeds: Any) -> Iterable[str]:
    if isinstance(seeds, int) and seeds < 1:
        yield f"seeds = {seeds}: give how many (1 or more), or a list of seeds"
    if isinstance(seeds, list):
        if not seeds or any(not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 for seed in seeds):
            yield f"seeds = {seeds}: give whole numbers of 0 or more"
        elif len(set(seeds)) < len(seeds):
            yield f"seeds = {seeds}: give each seed once, a copy of a run is no second measurement"


def arms_from_words(arms: Iterable[str], flags: list[str]) -> dict[str, Any]:
    """The table of a study that the command line describes.

    Args:
        arms: ``NAME=FLAGS`` each, such as ``"attnscale=--model attnscale_small_12"``.
        flags: Words of ``main.py``'s flags for all runs.

    Raises:
        StudyError: If an arm has no name, or one twice.
    """
    table: dict[str, Any] = {"flags": flags_of(flags), "arms": {}}
    for text in arms:
        name, sign, words = text.partition("=")
        if not sign or not NAME.fullmatch(name):
            raise StudyError(f"--arm {text}: give NAME=FLAGS, as --arm 'attnscale=--model attnscale_small_12'")
        if name in table["arms"]:
            raise StudyError(f"--arm {text}: there is an arm {name} already")
        table["arms"][name] = flags_of(shlex.split(words))
    return table
