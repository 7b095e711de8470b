"""Flags of ``main.py`` in a study's form: from TOML, and back to the words of a command."""

import argparse
import contextlib
import io
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from options import get_args_parser

Flags = dict[str, Any]  # name without dashes, words joined by _ -> value as TOML has it


class StudyError(ValueError):
    """A study that cannot be run; the message names the file, the key and the value, and the way out."""


def normalised(flags: Mapping[str, Any]) -> Flags:
    """Flags under ``main.py``'s own names; ``no-x = true`` becomes ``x = false``."""
    result = {}
    for name, value in flags.items():
        name = name.replace("-", "_")
        if name.startswith("no_") and isinstance(value, bool):
            name, value = name[3:], not value
        result[name] = value
    return result


def merged(*layers: Mapping[str, Any]) -> Flags:
    """Flags of all layers; later layers override earlier ones, and tables (``model-kwargs``) are merged key by key."""
    result: Flags = {}
    for layer in layers:
        for name, value in normalised(layer).items():
            both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
            result[name] = {**result[name], **value} if both else value
    return result


def as_words(flags: Flags) -> list[str]:
    """Words of the command line: ``true`` is the flag alone, ``false`` its ``--no-`` form, a table ``KEY=VALUE`` words.

    ``false`` gives no words for a flag without a ``--no-`` form: that flag is off anyway.
    """
    known = parser()._option_string_actions
    words = []
    for name, value in flags.items():
        flag, negated = f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"
        if value is True:
            words += [flag]
        elif value is False:
            words += [negated] if negated in known else []
        elif isinstance(value, Mapping):
            words += [flag, *(f"{key}={inner}" for key, inner in value.items())]
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


parser = cache(get_args_parser)


def parse(words: list[str], values: argparse.Namespace | None = None) -> argparse.Namespace:
    """Flags as ``main.py`` parses them.

    Args:
        words: Words of the command line.
        values: Values of the flags that are not in it; None: their defaults.

    Raises:
        StudyError: If ``main.py`` would exit with a message; with that message.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args, unknown = parser().parse_known_args(words, values)
    except SystemExit as left:  # how argparse exits
        raise StudyError(said.getvalue().strip().rpartition("error: ")[2]) from left
    if unknown:
        raise StudyError(f"{' '.join(unknown)}: main.py has no such flag (see python main.py --help)")
    return args


def placeholder(flags: Mapping[str, Any]) -> tuple[str, str]:
    """The flag whose value is ``{name}``, and that name; two empty strings without one."""
    for flag, value in normalised(flags).items():
        if isinstance(value, str) and (match := re.fullmatch(r"\{(.+)\}", value)):
            return flag, match.group(1)
    return "", ""


def flags_of(words: list[str]) -> Flags:
    """The flags of ``main.py`` in ``words``, in the form of a study's table."""
    absent = "\0"  # a word, since paths are expanded; no flag can have it
    found = parse(words, argparse.Namespace(**dict.fromkeys(vars(parse([])), absent)))
    return {name: value for name, value in vars(found).items() if value != absent}
