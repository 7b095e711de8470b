"""Sentences of the commands that read images and write results: what is wrong, in terms of their own flags."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import DataError
from readers.images import OR_SKIP
from readers.loader import explain_loader_errors, sentence_of


@contextmanager
def explain_images() -> Iterator[None]:
    """Around reading images, in a command without ``--skip-bad-images``: errors of workers become one sentence.

    Raises:
        DataError: In place of a worker's error, which is its whole traceback, and without advice of that flag.
    """
    with explain_loader_errors():
        try:
            yield
        except DataError as error:
            raise DataError(sentence_of(error).removesuffix(OR_SKIP)) from error


def why_unwritable(path: Path) -> str | None:
    """Why no file can be written to a folder, or over a file; None if it can. An existing file is left as it is."""
    try:
        if path.is_dir():
            with tempfile.TemporaryFile(dir=path):
                return None
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            with path.open("ab"):
                pass
    except OSError as error:
        return error.strerror or type(error).__name__
    return None
