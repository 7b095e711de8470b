"""A study's file: which runs it asks for, when two runs are the same, and what is wrong with a file."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT
from studies import ARMS, FLAGS, study_of

from options import get_args_parser
from scripts.comparison.flags import StudyError, as_words, merged, parse
from scripts.comparison.study_file import arms_from_words, make_study, read_study

STUDIES = sorted((ROOT / "scripts" / "reproduce" / "studies").glob("*.toml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def test_a_study_is_arms_times_seeds_times_settings(tmp_path: Path) -> None:
    path = write(tmp_path, """
        seeds = [3, 5]
        baseline = "b"
        [flags]
        epochs = 4
        model-kwargs = { depth = 2, embed_dim = 32, num_heads = 2 }
        [settings.short]
        [settings.long]
        epochs = 8
        [arms.a]
        model = "deit_small_12"
        [arms.b]
        model = "attnscale_small_12"
        model-kwargs = { depth = 3 }
        lr = 1e-3
    """)  # fmt: skip
    runs = read_study(path).runs()
    assert [(run.seed, run.setting, run.arm) for run in runs] == [
        (seed, setting, arm) for seed in (3, 5) for setting in ("short", "long") for arm in ("a", "b")
    ]
    last = runs[-1].args
    assert (last.model, last.epochs, last.lr, last.seed) == ("attnscale_small_12", 8, 1e-3, 5)
    assert last.model_kwargs == {"depth": 3, "embed_dim": 32, "num_heads": 2} and last.auto_reload
    assert runs[0].args.epochs == 4 and runs[0].args.model_kwargs == {"depth": 2, "embed_dim": 32, "num_heads": 2}


def test_values_of_toml_become_words_of_the_command_line() -> None:
    flags = merged(
        {"no-repeated-aug": True, "hflip": 0, "aa": "none"},
        {"model_kwargs": {"depth": 2}, "cutmix-minmax": [0.2, 0.8], "grad-checkpointing": True, "download": False},
    )
    args = parse(as_words(flags))
    assert (args.repeated_aug, args.hflip, args.aa, args.cutmix_minmax) == (False, 0, "none", [0.2, 0.8])
    assert args.model_kwargs == {"depth": 2} and args.grad_checkpointing and not args.download
    # An arm can take back what all runs have, in either spelling.
    assert parse(as_words(merged(flags, {"repeated-aug": True, "no_grad_checkpointing": True}))).repeated_aug


def test_a_run_is_known_by_what_its_result_depends_on() -> None:
    run = study_of().runs()[0]
    same = [
        replace(run, arm="another name", setting="elsewhere"),
        replace(run, flags=run.flags | {"num_workers": 4, "print_freq": 7, "checkpoint_steps": 5}),
        replace(run, flags=run.flags | {"log_wandb": True, "wandb_tags": ["a", "b"], "profile": 4}),
        replace(run, flags=run.flags | {"lr": get_args_parser().get_default("lr")}),
        replace(run, flags=dict(reversed(run.flags.items()))),
    ]
    assert {one.identity for one in same} == {run.identity}
    other = [
        replace(run, seed=1),
        replace(run, processes=2),
        replace(run, flags=run.flags | {"lr": 1e-3}),
        replace(run, flags=run.flags | {"epochs": 3}),
        replace(run, flags=run.flags | {"data_path": "elsewhere"}),
        replace(run, flags=run.flags | {"spectrum_every": 1}),
        replace(run, flags=run.flags | {"model_kwargs": run.flags["model_kwargs"] | {"depth": 3}}),
    ]
    assert len({one.identity for one in [run, *other]}) == len(other) + 1


def test_an_arm_may_start_from_another_run() -> None:
    study = study_of(
        first={"half": {"model": "deit_small_12", "epochs": 1}},
        arms={"plain": {"model": "deit_small_12", "finetune": "{half}"}, "scratch": {"model": "deit_small_12"}},
    )
    half, plain, scratch = study.runs()[:3]
    assert (half.arm, plain.after, plain.starts_from, scratch.after) == ("half", half, "finetune", None)
    assert parse(plain.words("out", "half.pth")).finetune == "half.pth"
    # Another first run is another run, wherever its file is.
    changed = study_of(first={"half": {"model": "deit_small_12", "epochs": 2}}, arms=study.arms).runs()[1]
    assert changed.identity != plain.identity and plain.identity != scratch.identity
    assert [run.arm for run in study.only([]).runs()[:2]] == ["half", "plain"]
    alone = make_study({"flags": FLAGS, "first": study.first, "arms": {"scratch": study.arms["scratch"]}}, "x")
    assert {run.arm for run in alone.runs()} == {"scratch"}  # nobody needs the first run


def test_arms_can_be_given_as_words() -> None:
    table = arms_from_words(
        ["plain=--model deit_small_12", "slow=--model deit_small_12 --lr 5e-4"], ["--lr", "1e-3", "--no-repeated-aug"]
    )
    plain, slow = make_study(table, "the command line").runs()[:2]
    assert plain.args.lr == 1e-3 and slow.args.lr == 5e-4  # which is main.py's default
    assert not plain.args.repeated_aug and not slow.args.repeated_aug
    for arm, said in (("plain", "give NAME=FLAGS"), ("=--lr 1", "give NAME=FLAGS"), ("a=--lrr 1", "no such flag")):
        with pytest.raises(StudyError, match=said):
            arms_from_words([arm], [])
    with pytest.raises(StudyError, match="there is an arm a already"):
        arms_from_words(["a=--lr 1", "a=--lr 2"], [])


def test_a_scale_and_a_choice_of_arms() -> None:
    table = {
        "flags": FLAGS,
        "arms": ARMS | {"both": {}},
        "scales": {"large": {"epochs": 9, "model-kwargs": {"depth": 9}}},
    }
    study = make_study(table, "study.toml", scale="large")
    run = study.runs()[0]
    assert run.epochs == 9 and run.args.model_kwargs["depth"] == 9 and run.args.model_kwargs["embed_dim"] == 32
    assert list(study.only(["both"]).arms) == ["plain", "both"]
    with pytest.raises(StudyError, match="--only 'bth': study.toml has 'plain', 'attnscale', 'both'"):
        study.only(["bth"])


def test_a_choice_of_settings() -> None:
    study = study_of(settings={"6 layers": {"epochs": 1}, "12 layers": {}})
    assert {run.setting for run in study.within(["12 layers"]).runs()} == {"12 layers"}
    chosen = {run.identity for run in study.within(["6 layers"]).runs()}
    assert chosen < {run.identity for run in study.runs()}  # the same runs
    with pytest.raises(StudyError, match="--settings '7 layers': study.toml has '6 layers', '12 layers'"):
        study.within(["7 layers"])
    with pytest.raises(StudyError, match="study.toml has nothing to choose from"):
        study_of().within(["7 layers"])


@pytest.mark.parametrize(("keys", "said"), [
    ({"sedes": 3}, "key 'sedes' is unknown: use title"),
    ({"seeds": 0}, "seeds = 0: give how many"),
    ({"seeds": [1, 1]}, "seeds = [1, 1]: give each seed once"),
    ({"seeds": [-1]}, "seeds = [-1]: give whole numbers of 0 or more"),
    ({"seeds": "five"}, "seeds = 'five': give a whole number or a list"),
    ({"title": 3}, "title = 3: give a string"),
    ({"baseline": "plian"}, "baseline = 'plian': the arms are plain, attnscale"),
    ({"arms": {}}, "no arms: give at least one table [arms.NAME]"),
    ({"arms": {"a/b": {}}}, "[arms.a/b]: use letters"),
    ({"arms": {"a": 3}}, "arms.a = 3: give a table of main.py's flags"),
    ({"flags": {"seed": 3}}, "seed = 3: compare.py sets this flag itself"),
    ({"arms": {"a": {"output_dir": "x"}}}, "output_dir = 'x': compare.py sets this flag itself"),
    ({"arms": {"a": {"finetune": "{half}"}}}, "arms.a starts from {half}: there is no table [first.half]"),
    ({"processes": 0}, "processes = 0: give 1 or more"),
    ({"prepare": [3]}, "prepare = 3: give the words after python"),
])  # fmt: skip
def test_a_file_that_means_nothing_is_explained_by_key_and_value(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError) as raised:
        study_of(**keys)
    assert f"study.toml: {said}" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(("flags", "said"), [
    ({"modle": "x"}, "--modle x: main.py has no such flag"),
    ({"epochs": "many"}, "argument --epochs: invalid int value: 'many'"),
    ({"mixup": 0.8, "batch-size": 5}, "--batch-size 5 is odd"),
    ({"model": "deit_smal_12"}, "--model deit_smal_12: no such model"),
    ({"data-set": "MNIST"}, "argument --data-set/--data_set: invalid choice: 'MNIST'"),
])  # fmt: skip
def test_a_flag_that_main_would_refuse_is_refused_before_any_run(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError) as raised:
        study_of(arms=ARMS | {"bad": flags}, settings={"digits": {}}).runs()
    assert said in str(raised.value)
    lines = str(raised.value).splitlines()
    assert all(line.startswith("study.toml, arms.bad in settings.digits: ") for line in lines)
    assert len(set(lines)) == len(lines)  # not once a seed


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="none.toml: cannot be read .No such file"):
        read_study(tmp_path / "none.toml")
    with pytest.raises(StudyError, match="study.toml is not TOML: .*line 1"):
        read_study(write(tmp_path, "seeds = \n"))
    with pytest.raises(StudyError, match=r"--scale large: \[scales\] has none"):
        read_study(write(tmp_path, "[arms.a]\n"), scale="large")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_published_studies_can_be_run(path: Path) -> None:
    study = read_study(path)
    assert study.title and study.about and len(study.seeds) >= 5
    assert f"python scripts/compare.py scripts/reproduce/studies/{path.name}" in path.read_text()
    for run in study.runs():
        assert run.args.spectrum_every and run.args.epochs % run.args.spectrum_every == 0, run.folder


def test_the_page_s_example_is_a_study(tmp_path: Path) -> None:
    [text] = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "docs" / "compare.md").read_text(), re.MULTILINE | re.DOTALL)
    runs = read_study(write(tmp_path, text), scale="wide").runs()
    assert len(runs) == 2 * 2 * 10
    assert runs[-1].args.model_kwargs == {"embed_dim": 384, "num_heads": 6, "patch_size": 8, "depth": 24}
