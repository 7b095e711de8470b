"""The command line: the paper's flags with their names, types and defaults, both spellings, and a complete help."""

import argparse
import json
from typing import Any

import pytest
from runs import ROOT

from options import ArgumentError, check_args, get_args_parser, spell

GOLDEN = ROOT.parent / "shared" / "golden" / "cli_flags.json"
# auto: CUDA where there is one, as "cuda" was, and CPU where there is none, where "cuda" only failed.
CHANGED_DEFAULTS = {"device": "auto"}


def papers_flags() -> list[dict[str, Any]]:
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else []


def actions() -> dict[str, argparse.Action]:
    """Every spelling of every flag."""
    return {spelling: action for action in get_args_parser()._actions for spelling in action.option_strings}


def test_the_golden_flags_are_here() -> None:
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not here")
    assert len(papers_flags()) == 67


@pytest.mark.parametrize("flag", papers_flags(), ids=lambda flag: flag["flags"][0])
def test_a_flag_of_the_paper_is_as_it_was(flag: dict[str, Any]) -> None:
    parser, ours = get_args_parser(), actions()
    for spelling in flag["flags"]:
        action = ours[spelling]
        assert action.dest == flag["dest"]
        assert type(action).__name__.lstrip("_") == flag["kind"]
        assert str(action.nargs) == str(flag["nargs"])
        assert (action.type or str).__name__ == (flag["type"] or "str")
        assert set(flag["choices"] or []) <= set(action.choices or [])
    default = parser.get_default(flag["dest"])
    expected = CHANGED_DEFAULTS.get(flag["dest"], flag["default"])
    assert default == expected and type(default) is type(expected)
    assert getattr(parser.parse_args([]), flag["dest"]) == expected


@pytest.mark.parametrize(
    "spelling", sorted(s for s in actions() if "-" in s[2:] or "_" in s[2:]), ids=lambda spelling: spelling
)
def test_every_flag_has_both_spellings(spelling: str) -> None:
    body = spelling[2:]
    ours = actions()
    for other in (body.replace("-", "_"), body.replace("_", "-")):
        assert f"--{other}" in ours, f"--{other} is missing"
        assert ours[f"--{other}"].dest == ours[spelling].dest


def test_the_defaults_pass_their_own_check_and_are_never_mutated() -> None:
    args = get_args_parser().parse_args([])
    before = json.dumps(vars(args), sort_keys=True)
    check_args(args)
    assert json.dumps(vars(args), sort_keys=True) == before
    # A run with other values leaves nothing behind for the next one.
    other = get_args_parser().parse_args(["--model-kwargs", "depth=2", "--lr-noise", "3", "4", "--no-model-ema"])
    other.model_kwargs["embed_dim"] = 8
    assert json.dumps(vars(get_args_parser().parse_args([])), sort_keys=True) == before


def test_help_is_grouped_and_complete() -> None:
    parser = get_args_parser()
    text = parser.format_help()
    for group in ("model:", "optimizer:", "learning rate:", "augmentation:", "distillation:", "data:", "run:"):
        assert f"\n{group}\n" in text
    for action in parser._actions:
        assert action.help, f"{action.option_strings} has no help text"
        if action.help != argparse.SUPPRESS:
            assert action.option_strings[0] in text
        if action.help != argparse.SUPPRESS and action.nargs != 0:
            assert action.metavar or action.choices, f"{action.option_strings} shows its variable's name for a value"
    # "options:" is argparse's own group and holds --help alone: every flag of ours stands under a title.
    assert [action.dest for action in parser._optionals._group_actions] == ["help"]


def test_the_help_states_each_default_once() -> None:
    text = " ".join(get_args_parser().format_help().split())
    assert "passes over the data; the paper's recipe is 500 [500]" in text
    assert "[None]" not in text and "[]" not in text and "[{}]" not in text


def test_model_kwargs_are_values_not_strings() -> None:
    words = ["--model-kwargs", "embed_dim=96", "drop_rate=0.5", "qk_norm=True", "pool=avg", "--epochs", "3"]
    args = get_args_parser().parse_args(words)
    assert args.model_kwargs == {"embed_dim": 96, "drop_rate": 0.5, "qk_norm": True, "pool": "avg"}
    assert args.epochs == 3


def test_a_mistyped_flag_is_an_error_not_an_abbreviation() -> None:
    with pytest.raises(SystemExit) as left:
        get_args_parser().parse_args(["--batch", "3"])
    assert left.value.code == 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch-size", "0"], "--batch-size 0"),
        (["--batch-size", "5"], "--batch-size 5 is odd"),
        (["--epochs", "-1"], "--epochs -1"),
        (["--grad-accum", "0"], "--grad-accum 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--drop-path", "1.5"], "--drop-path 1.5"),
        (["--smoothing", "nan"], "--smoothing nan"),
        (["--clip-grad", "-1"], "--clip-grad -1"),
        (["--mixup-mode", "pairs"], "--mixup-mode pairs"),
        (["--sched", "plateau"], "--sched plateau"),
        (["--resume", "a", "--finetune", "b"], "--resume a and --finetune b"),
        (["--auto_reload"], "--auto_reload needs --output_dir"),
        (["--eval"], "--eval needs weights"),
        (["--distillation-type", "hard"], "--teacher-path"),
        (["--eval-crop-ratio", "0"], "--eval-crop-ratio 0"),
        (["--layer-decay", "0"], "--layer-decay 0.0: give a number above 0, at most 1"),
        (["--layer-decay", "1.5"], "--layer-decay 1.5"),
        (["--opt", "fusedlamb"], "--opt fusedlamb is apex's, which is not used here: give --opt lamb, timm's"),
        (["--no-repeated-aug", "--repeated-aug-local"], "--no-repeated-aug --repeated-aug-local: give one of them"),
        (["--bce-loss"], "--bce-loss --smoothing 0.1: smoothing gives every class a share"),
        (["--three-augment", "--aa", "original"], "--three-augment --aa original: give one of them"),
        (["--src", "--train-interpolation", "random"], "--src --train-interpolation random"),
        (["--unscale-lr", "--scale-min-lr"], "--unscale-lr and --scale-min-lr: give one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_impossible_value_is_named(flags: list[str], named: str) -> None:
    with pytest.raises(ArgumentError, match=".+") as raised:
        check_args(get_args_parser().parse_args(flags))
    assert named in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_the_flags_of_deit_iii_are_accepted_as_its_authors_write_them() -> None:
    words = "--opt lamb --unscale-lr --bce-loss --smoothing 0.0 --ThreeAugment --src --color-jitter 0.3 --reprob 0.0"
    args = get_args_parser().parse_args(words.split())
    check_args(args)
    assert (args.three_augment, args.src, args.bce_loss, args.unscale_lr) == (True,) * 4
    assert spell(args, "three_augment", "color_jitter", "src") == "--three-augment --color-jitter 0.3 --src"


def test_all_problems_are_reported_at_once() -> None:
    flags = ["--batch-size", "7", "--epochs", "0", "--drop", "2", "--auto_reload", "--mixup-mode", "none"]
    with pytest.raises(ArgumentError) as raised:
        check_args(get_args_parser().parse_args(flags))
    lines = str(raised.value).splitlines()
    assert len(lines) == 5
    for flag in ("--batch-size 7", "--epochs 0", "--drop 2", "--auto_reload", "--mixup-mode none"):
        assert any(line.startswith(flag) for line in lines)


def test_an_odd_batch_is_fine_where_nothing_is_mixed() -> None:
    check_args(get_args_parser().parse_args(["--batch-size", "7", "--mixup", "0", "--cutmix", "0"]))
