"""The documentation, followed literally: commands and Python blocks of README.md and docs/*.md are run.

A page is run from top to bottom in a folder of its own, which holds what its reader has: a few pictures in place of
each data set, and tiny files in place of the checkpoints (`readers_folder`). Commands run as printed but for

- ``TINY``, flags put behind those of the page: a model of 30,000 parameters, small pictures, one epoch, no workers;
- ``INSTEAD``, text that names what the reader fills in;
- the launcher, which is left out: ``tests/test_commands.py`` tests launchers;
- variables before a command, likewise.

Python blocks have the installed library and nothing of the checkout.

What a page says is printed (a ``text`` block after the command's) must be printed, line by line, but for the numbers.
Commands that are not run are in ``NOT_RUN``, with the reason or the test that runs them; the flags of all others, those
in running text included, pass the parser that they are for.
"""

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from PIL import Image
from runs import ROOT, call_main, environment, tiny_tree
from states import swin_code_state

import entry
import models  # noqa: F401 (registers the zoo)
from options import check_args, get_args_parser
from scripts import compare

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SIZE = ("embed_dim=32", "depth=2", "num_heads=2", "patch_size=8")
TINY = {
    "main.py": ("--model-kwargs", *SIZE, "--input-size", "32", "--batch-size", "4", "--epochs", "1"),
    "scripts/analyze.py": ("--num-images", "0", "--batch-size", "4"),
    "scripts/benchmark.py": ("--rounds", "1", "--warmup", "0", "--batch-size", "1", "--threads", "1"),
    "scripts/benchmark_data.py": ("--rounds", "1", "--images", "8"),
    "scripts/probe_features.py": ("--num_workers", "0", "--device", "cpu"),
}
SWIN_SIZE = ("embed_dim=12", "depths=(2,2)", "num_heads=(1,2)", "patch_size=2", "window_size=4")
TINY["main.py"] += ("--num_workers", "0", "--device", "cpu", "--print-freq", "1")
TINY["scripts/compare.py"] = ("--seeds", "1", "--jobs", "1", *TINY["main.py"], "--spectrum-every", "1")
INSTEAD = {
    "/data/imagenet": "data/imagenet",
    "--device cuda": "--device cpu",
    "--layer 10": "--layer 1",  # of two
    "/path/to/this/repository": str(ROOT),
    "scripts/reproduce/studies/": f"{ROOT}/scripts/reproduce/studies/",
}  # fmt: skip
REST = "--model attnscale_small_12 --data-set FOLDER --data-path data/imagenet"  # of the flags of main.py: "…"

# Pattern of a command -> why it is not run here, or the test that runs it.
NOT_RUN = {
    r"bash scripts/(quickstart|test)\.sh": "makes an environment, trains for minutes, or runs this very test",
    r"python -m torch\.distributed\.launch .*</data_path>": (
        "tests/test_commands.py::test_the_scripts_hold_the_papers_seven_commands"
    ),
    r"python scripts/prepare_digits\.py": "tests/test_prepare.py::test_digits_are_split_by_class_and_disjoint",
    r"torchrun .*--real-labels": (
        "tests/test_evaluation.py::test_real_accuracy_is_printed_beside_the_plain_one_and_as_json"
    ),
    r"python main\.py .*IMNET-V2": "tests/test_evaluation.py::test_imagenet_v2_folders_are_labels",
    r"(torchrun|python) .*scripts/probe_features\.py .*(--pretrained|nproc_per_node)": (
        "downloads weights, or starts two processes: tests/test_probe_features.py::test_two_processes_give_the_same"
    ),
    r"tensorboard --logdir": "tests/test_reporting.py::test_every_chart_of_the_layout_has_curves",
    r"(HF_HUB_OFFLINE=1 )?python main\.py .*hf-hub:": (
        "needs the Hub; from a local one: tests/test_fetch.py::test_a_run_takes_an_address_where_it_takes_a_file"
    ),
    r"python scripts/push_to_hub\.py logs/run owner/name --private": (
        "needs the Hub; tests/test_push_to_hub.py::test_a_push_is_read_again_from_the_hub_and_keeps_a_readme"
    ),
    r"python scripts/prepare_imagenet\.py": "tests/test_prepare.py::test_imagenet_becomes_an_image_folder",
    r"python scripts/prepare_wds\.py --index": "tests/test_prepare_wds.py",
    r"pip install \.": "tests/test_layout.py::test_the_installed_library_works_beside_a_users_own_modules",
    r"python scripts/analyze\.py .*--pretrained": (
        "downloads weights; with checkpoints: tests/test_analyze.py::test_the_report_needs_no_other_file"
    ),
    r"python main\.py .*(https:|pipe:aws)": "needs the network; from a local server: tests/test_shards.py",
    r"tar -cf|\(cd ": "tests/test_archives.py",
    r"python main\.py .*imagenet\.(tar|zip)": "tests/test_archives.py",
    r"export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": "tests/test_clusters.py",
    r"(WANDB_MODE=offline )?python main\.py .*--log-wandb": (
        "needs a login; offline: tests/test_watch.py::test_a_run_of_wandb_has_the_configuration"
        "_and_begins_after_the_loaders_processes"
    ),
    r"sbatch ": "needs Slurm; under an emulated one: tests/test_clusters.py",
    r"python scripts/run_with_submitit\.py": "needs Slurm; with submitit's local executor: tests/test_submitit.py",
    r"python scripts/compare\.py study\.toml --submitit": (
        "needs Slurm; tests/test_compare.py::test_runs_can_be_queued_as_run_with_submitit_queues_them"
    ),
    r"python scripts/compare\.py scripts/reproduce/studies/(?!.* --list)": (
        "takes hours; tests/test_comparison_study.py::test_the_published_studies_can_be_run"
    ),
    r"python scripts/export\.py ": "tests/test_export.py::test_the_page_works_as_printed",
}
# Page -> the test that runs its Python blocks, where not this file.
PYTHON_ELSEWHERE = {
    "notebook.md": "tests/test_notebook.py::test_the_cells_of_the_page_run_and_leave_no_trace",
    "weights.md": "tests/test_fetch.py::test_published_files_are_read_as_strictly_as_any_other",
    "export.md": "tests/test_export.py::test_the_page_works_as_printed",
}


# ---- what is on a page -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Block:
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def commands(text: str) -> list[str]:
    """The commands of a ``bash`` block, each in one line, without comments."""
    lines = (" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines())
    return [re.sub(r" #.*", "", line) for line in lines if line and not line.startswith("#")]


def all_commands(page: Path) -> list[str]:
    return [command for block in blocks(page) if block.language == "bash" for command in commands(block.text)]


def reason_not_to_run(command: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, command)), None)


def program_and_flags(command: str) -> tuple[str, list[str]]:
    """``main.py`` or ``scripts/<name>.py``, and its flags.

    Raises:
        AssertionError: If the command starts neither: it belongs into ``NOT_RUN``.
    """
    for text, ours in INSTEAD.items():
        command = command.replace(text, ours)
    words = shlex.split(command.replace("…", REST if "main.py" in command else ""))
    while re.match(r"\w+=", words[0]):  # variables of the environment
        words.pop(0)
    program = next((word for word in words if re.fullmatch(r"main\.py|scripts/\w+\.py", word)), None)
    launchers = ("python", "python3", "torchrun", "srun")
    assert program and words[0] in launchers, f"neither a command of this repository nor in NOT_RUN: {command}"
    return program, words[words.index(program) + 1 :]


def file_blocks(page: Path, language: str = "python") -> dict[str, str]:
    """Files that the reader is to write, or to change: blocks whose first line is ``# <path>``."""
    found = (re.match(r"# (\S+/\S+\.py)\n", block.text) for block in blocks(page) if block.language == language)
    return {match.group(1): match.string for match in found if match}


def python_script(page: Path) -> str:
    """All Python blocks of a page, the cells of one session."""
    written = file_blocks(page).values()
    script = "\n".join(b.text for b in blocks(page) if b.language == "python" and b.text not in written)
    for text, ours in INSTEAD.items():
        script = script.replace(text, ours)
    return script


# ---- what its reader has ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets and checkpoints by the names that the pages have for them; to be copied, not written to."""
    folder = tmp_path_factory.mktemp("reader")
    tiny_tree(folder / "data" / "digits", train=16, val=12)  # four a class, which a linear probe needs
    for name in ("data/imagenet", "photos", "my_photos"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(folder / "data" / "digits")
    Image.new("RGB", (60, 40), "orange").save(folder / "cat.jpg")
    data = ("--data-set", "FOLDER", "--data-path", folder / "data" / "digits")
    for name, run_folder in {
        "attnscale_small_12": "logs/digits", "deit_small_24": "plain", "attnscale_small_24": "attnscale",
        "featscale_small_24": "featscale",
    }.items():  # fmt: skip
        call_main("--model", name, *data, *TINY["main.py"], "--output_dir", folder / run_folder)
        if run_folder != "logs/digits":
            shutil.move(folder / run_folder / "checkpoint.pth", folder / f"{run_folder}.pth")
    shutil.copytree(folder / "logs" / "digits", folder / "logs" / "run")
    size = {name: int(value) for name, value in (word.split("=") for word in SIZE)} | {"img_size": 32}
    cait = timm.create_model("cait_S24_224", **size).state_dict()  # as its authors publish it
    torch.save({"model": {f"module.{name}": tensor for name, tensor in cait.items()}}, folder / "S24_224.pth")
    swin_size = dict(embed_dim=12, depths=(2, 2), num_heads=(1, 2), patch_size=2, window_size=4)
    swin = timm.create_model("swin_small_patch4_window7_224", img_size=32, num_classes=3, **swin_size)
    torch.save({"model": swin_code_state(swin)}, folder / "swin_small_patch4_window7_224.pth")
    torch.save(timm.create_model("attnscale_small_12", num_classes=3, **size).state_dict(),
               folder / "attnscale_small_12.pth")  # fmt: skip
    return folder


@pytest.fixture
def folder(readers_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page's own folder; the test works in it."""
    shutil.copytree(readers_folder, tmp_path / "reader", symlinks=True)
    monkeypatch.chdir(tmp_path / "reader")
    return tmp_path / "reader"


def copy_code(folder: Path) -> None:
    """The repository's code, to be changed by a page that says so."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for package in ("models", "oversmoothing", "readers"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))


def apply_diff(file: Path, text: str) -> None:
    """Puts the lines with ``+`` behind the line before them, which must be there once."""
    for before, added in re.findall(r"^ (.*\n)((?:\+.*\n)+)", text, re.MULTILINE):
        assert file.read_text().count(before) == 1, f"{file.name} has no such line: {before}"
        file.write_text(file.read_text().replace(before, before + re.sub(r"^\+", "", added, flags=re.MULTILINE)))


# ---- running ---------------------------------------------------------------------------------------------------------
def run(program: str, flags: list[str], *, in_folder: Path | None) -> str:
    """Runs one program in this process, or that of ``in_folder``'s code in its own; returns all that it prints."""
    tiny = TINY.get(program, ())
    if program == "main.py" and "_swin_" in " ".join(flags):
        tiny = (tiny[0], *SWIN_SIZE, *tiny[1 + len(SIZE) :])
    flags = [*flags, *tiny]
    if program == "main.py" and (get_args_parser().parse_args(flags[: -len(tiny)]).input_size) > 224:
        flags += ["--input-size", "48"]
    if in_folder is not None:
        return run_python([str(in_folder / program), *flags])
    if program == "main.py":
        done = call_main(*flags)
        return done.stdout + done.stderr
    printed, argv, path = io.StringIO(), sys.argv, sys.path[:]
    sys.argv = [program, *flags]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), in_this_process():
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as left:
        assert not left.code, f"{program} {flags}: {printed.getvalue()}"
    finally:
        sys.argv, sys.path[:] = argv, path
    return printed.getvalue()


def in_this_process() -> contextlib.AbstractContextManager:
    """Within it a script leaves by SystemExit, as ``entry.run`` does not, and keeps this process's signal handlers."""

    def leave(command: Callable[[], int | None]) -> None:
        sys.exit(command() or 0)

    return patch.multiple(entry, run=leave, begin=lambda: None)


def run_python(words: list[str], script: str | None = None, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], input=script, env=environment(MPLBACKEND="agg", **variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{words}\n{script or ''}\n{done.stdout}"
    return done.stdout


def masked(text: str) -> str:
    """Without the numbers, in which the reader's run and ours differ."""
    return re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", text)


def assert_printed(promised: str, printed: str) -> None:
    for line in promised.splitlines():
        pattern = ".*".join(re.escape(part) for part in masked(line).split("…"))
        assert re.search(f"^{pattern}$", masked(printed), re.MULTILINE), f"not printed: {line}\n---\n{printed}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_can_be_followed(page: Path, folder: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks have the installed library alone, or the page's own copy of the code if the page changes that."""
    monkeypatch.setenv("HOME", str(folder))
    own_code = folder if file_blocks(page) else None
    printed = ""
    script = python_script(page) if page.name not in PYTHON_ELSEWHERE else ""
    if own_code:
        copy_code(folder)
    for name, text in file_blocks(page).items():
        (folder / name).write_text(text)
    for name, text in file_blocks(page, "diff").items():
        apply_diff(folder / name, text)
    run_here = [command for command in all_commands(page) if not reason_not_to_run(command)]
    for written in re.findall(r"--output_dir (logs/\w+)", " ".join(run_here)):
        shutil.rmtree(folder / written, ignore_errors=True)  # the page makes it
    for block in blocks(page):
        if block.language == "python" and script and block.text in script:
            printed, script = run_python(["-"], script, PYTHONPATH=str(own_code or installed)), ""
        elif block.language == "bash":
            runs = [command for command in commands(block.text) if not reason_not_to_run(command)]
            printed = "".join(run(*program_and_flags(os.path.expandvars(c)), in_folder=own_code) for c in runs)
        elif block.language == "text" and page.name != "export.md":  # its own test compares what is printed
            assert_printed(block.text, printed)


# ---- the rest --------------------------------------------------------------------------------------------------------
def test_nothing_is_excused_that_is_not_there() -> None:
    every = [command for page in PAGES for command in all_commands(page)]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in every), f"no page has this command any more: {pattern}"
    assert set(PYTHON_ELSEWHERE) <= {page.name for page in PAGES}


def test_the_tests_that_stand_in_for_a_command_exist() -> None:
    for name in [*NOT_RUN.values(), *PYTHON_ELSEWHERE.values()]:
        for file, test in re.findall(r"(tests/\w+\.py)(?:::(\w+))?", name):
            assert f"def {test}" in (ROOT / file).read_text(), name


class Parsed(Exception):
    """The parser has accepted the flags; the program is not to begin."""


def inline_commands(page: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        span = " ".join(span.split())
        if re.match(r"(python|torchrun|srun) .*(main\.py|scripts/\w+\.py) -", span) or re.match(
            r"scripts/\w+\.py", span
        ):
            yield span if span.startswith(("python", "torchrun", "srun")) else f"python {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_parsers_know_every_flag_of_a_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what is not run, and of commands within a sentence."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(*args: object) -> None:
        raise Parsed(parse(*args))

    for command in [*all_commands(page), *inline_commands(page)]:
        if not re.search(r"\bmain\.py|scripts/\w+\.py", command) or re.search(r"\bsbatch\b", command):
            continue
        program, flags = program_and_flags(command)
        if program == "main.py":
            if flags not in ([], ["--help"]):
                check_args(get_args_parser().parse_args(flags))
        elif program == "scripts/compare.py" and flags:
            known, of_main = compare.parse_args(flags)
            if known.study is None or known.study.exists():
                compare.build_study(known, of_main).runs()
        elif flags:
            with monkeypatch.context() as patched:
                patched.setattr(argparse.ArgumentParser, "parse_args", parse_only)
                patched.setattr(sys, "argv", [program, *flags])
                patched.setattr(sys, "path", sys.path[:])
                with pytest.raises(Parsed), in_this_process():
                    runpy.run_path(str(ROOT / program), run_name="__main__")


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)), target


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in PAGES[1:] if page.name != "README.md" and f"({page.name})" not in index]
    assert not missing, f"docs/README.md does not list {missing}"
