"""Whatever the flags say, a run is built or refused in one sentence, before it reads anything."""

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import timm
from runs import TINY, call_main, tiny_tree
from torch import nn

import entry
import preflight
import utils
from options import ArgumentError, KeyValues, check_args, get_args_parser
from oversmoothing.weights import ModelError

MODEL = ("--model", "attnscale_small_12", "--input-size", "32", "--epochs", "4", "--device", "cpu")
KWARGS = ("--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8")
SIZE = (*MODEL, *KWARGS)
MUON = ("--opt", "muon", "--opt-kwargs")


def parse(*words: str) -> argparse.Namespace:
    return get_args_parser().parse_args([str(word) for word in words])


def check(*words: str) -> nn.Module:
    """What main.py does with its flags before anything else."""
    args = parse(*words)
    check_args(args)
    return preflight.check_flags(args)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--input-size", "4"], "images of 4 pixels"),
        (["--warmup-epochs", "-3"], "--warmup-epochs -3: give a whole number"),
        (["--min-lr", "nan"], "--min-lr nan: give a number 0 or more"),
        (["--lr", "inf"], "--lr inf"),
        (["--lr", "1e308", "--batch-size", "1024"], "--lr 1e+308"),
        (["--opt-betas", "0.9"], "--opt-betas 0.9"),
        (["--opt", "adamx"], "--opt adamx"),
        (["--opt", "sgd", "--momentum", "-1"], "--momentum -1.0"),
        (["--opt", "adahessian"], "--opt adahessian: it needs second derivatives"),
        ([*MUON, "ns_stps=3"], "--opt-kwargs ns_stps=3: --opt muon takes no ns_stps, but ns_steps; its own"),
        ([*MUON, "ns_steps=many"], "--opt-kwargs ns_steps=many: give a whole number from 0 to 100"),
        ([*MUON, "ns_steps=1000000000"], "--opt-kwargs ns_steps=1000000000: give a whole number from 0 to 100"),
        ([*MUON, "safety_factor=-1"], "safety_factor=-1: give a number of 0 or more"),
        ([*MUON, "safety_factor=1e999"], "safety_factor=inf: give a number of 0 or more"),
        ([*MUON, "safety_factor=0"], "--opt muon --opt-kwargs safety_factor=0: not possible"),
        ([*MUON, "conv_mode=x"], "--opt muon --opt-kwargs conv_mode=x: not possible (ValueError: Invalid conv_mode"),
        ([*MUON, "nesterov=1"], "nesterov=1: give True or False"),
        ([*MUON, "fallback_list=head.*"], "fallback_list=head.*: give a list, each a word"),
        ([*MUON, "fallback_list=['hed.*']"], "no parameter of --model attnscale_small_12 is named 'hed.*'"),
        ([*MUON, "lr=0.1"], "--opt-kwargs lr=0.1: use --lr"),
        ([*MUON, "betas=(0.9,0.99)"], "--opt-kwargs betas=(0.9, 0.99): use --opt-betas"),
        (["--opt-kwargs", "ns_steps=3"], "--opt adamw takes no ns_steps; its own arguments: amsgrad=False"),
        (["--opt", "mars", "--opt-kwargs", "betas_1d=3"], "betas_1d=3: give (a number of 0 or more, a number of"),
        (["--opt", "rmsprop", "--opt-kwargs", "alpha=2"], "alpha=2: not possible (ValueError: three steps"),
        (["--sched", "step", "--decay-epochs", "0"], "--decay-epochs 0.0"),
        (
            ["--sched", "step", "--decay-epochs", "1", "--decay-rate", "1e308", "--warmup-epochs", "0"],
            "--decay-rate 1e+308",
        ),
        (["--recount", "-1"], "--recount -1"),
        (["--smoothing", "1", "--mixup", "0", "--cutmix", "0"], "--smoothing 1.0"),
        (["--cutmix-minmax", "0.5"], "--cutmix-minmax 0.5: give two ratios"),
        (["--cutmix-minmax", "0.2", "0.4", "0.6"], "--cutmix-minmax 0.2 0.4 0.6"),
        (["--cutmix-minmax", "0.8", "0.2"], "--cutmix-minmax 0.8 0.2"),
        (["--cutmix-minmax", "0.5", "0.51"], "--cutmix-minmax 0.5 0.51"),
        (["--cutmix-minmax", "0", "2"], "--cutmix-minmax 0.0 2.0: give a number from 0 to 1"),
        (["--cutmix-minmax", "nan", "nan"], "--cutmix-minmax nan nan"),
        (["--aa", "rand-m9-w7"], "--aa rand-m9-w7"),
        (["--aa", "rand-mx"], "--aa 'rand-mx': 'mx' has no number"),
        (["--aa", "rand-m9-pnan"], "'pnan' has no number"),
        (["--aa", "foo"], "--aa 'foo'"),
        (["--aa", "none", "--color-jitter", "-1"], "--color-jitter -1.0"),
        (["--train-interpolation", "foo"], "--train-interpolation foo: give one of random, bilinear, bicubic"),
        (["--remode", "foo"], "--remode foo: give one of const, rand, pixel"),
        (["--lr-noise", "0", "--lr-noise-pct", "-1"], "--lr-noise-pct -1.0"),
        (["--lr-noise", "0", "--lr-noise-pct", "1e-9"], "--lr-noise-std 1.0 --lr-noise-pct 1e-09"),
        (["--lr-noise", "0", "1", "2"], "--lr-noise 0.0 1.0 2.0"),
        (["--eval-crop-ratio", "1e-6"], "--eval-crop-ratio 1e-06"),
        (["--seed", "1" + 400 * "0"], "--seed 1000"),
        (["--epochs", "10000000000"], "--epochs 10000000000"),
        (["--data-path", "a\0b"], "null character"),
        (["--distillation-type", "hard", "--teacher-path", "x"], "has no distillation token"),
    ],
    ids=lambda value: " ".join(value)[:40].replace("\0", "0") if isinstance(value, list) else "",
)
def test_a_value_without_meaning_is_one_sentence(words: list[str], named: str) -> None:
    with pytest.raises((ArgumentError, ModelError, preflight.DataError)) as raised:
        check(*SIZE, *words)
    assert named in str(raised.value) and max(map(len, str(raised.value).split(" "))) < 500


@pytest.mark.parametrize(
    "word",
    ["depth=0", "depth=-1", "depth=x", "in_chans=1", "num_classes=0", "features_only=True", "embed_dim=33", "foo=1",
     "embed_dim=1.5", "patch_size=0", "num_heads=0", "mlp_ratio=-1", "img_size=64", "global_pool=foo", "norm_layer=foo",
     "drop_path_rate=7", "pretrained=True", "checkpoint_path=/etc/passwd", "pretrained_cfg_overlay={'url':'x'}"],
)  # fmt: skip
def test_impossible_model_kwargs_are_one_sentence(word: str) -> None:
    with pytest.raises((ArgumentError, ModelError), match="--model") as raised:
        check(*SIZE, word)
    assert word.partition("=")[0] in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("words", [
    ["muon", "ns_coefficients=polar_express", "fallback_no_weight_decay=True", "fallback_list=['head.*']"],
    ["nadamuon", "ns_coefficients=[(3.4,-4.8,2.0),(2.8,-3.1,1.2)]"], ["mars", "betas_1d=(0.5,0.9)"],
    ["adafactor", "decay_rate=-0.7"], ["adafactorbv", "momentum_dtype=float32"], ["lookahead_lion", "caution=True"],
])  # fmt: skip
def test_an_optimizers_own_arguments_pass(words: list[str]) -> None:
    check(*SIZE, "--opt", words[0], "--opt-kwargs", *words[1:])


def test_kron_without_opt_einsum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.kron, "has_opt_einsum", False)
    with pytest.raises(ArgumentError, match="--opt kronw: without the package opt_einsum"):
        check(*SIZE, "--opt", "kronw")
    monkeypatch.setattr(preflight.kron, "has_opt_einsum", True)
    check(*SIZE, "--opt", "kronw")


@pytest.mark.parametrize("word", ["foo", "=3", "a b=3", "1x=2"])
def test_model_kwargs_of_another_form_are_a_usage_error(word: str, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-kwargs", nargs="*", action=KeyValues)
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--model-kwargs", "depth=2", word])
    assert left.value.code == 2 and "KEY=VALUE" in capsys.readouterr().err


def test_a_teacher_for_other_images_is_named() -> None:
    student = ("--model", "deit_small_distilled_patch16_224", "--input-size", "32", "--device", "cpu", *KWARGS)
    words = (*student, "--distillation-type", "hard", "--teacher-path", "x")
    check(*words, "--teacher-model", "resnet18")
    with pytest.raises(ModelError, match="--teacher-model deit_tiny_patch16_224 takes no RGB images of 32 pixels"):
        check(*words, "--teacher-model", "deit_tiny_patch16_224")


def test_a_model_that_computes_while_it_is_built_is_built_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of timm's do; then the meta device is no help, and no reason to refuse them."""
    build_model = preflight.build.build_model

    def needs_values(*given: object) -> nn.Module:
        model = build_model(*given)
        next(model.parameters()).sum().item()
        return model

    monkeypatch.setattr(preflight.build, "build_model", needs_values)
    assert next(check(*SIZE).parameters()).is_meta


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "cait_xxs24_224", "featscale_cait_XXS24"])
def test_models_as_they_are_pass(name: str) -> None:
    check("--model", name, "--input-size", str(timm.get_pretrained_cfg(name).input_size[-1]), "--epochs", "2")


@pytest.mark.parametrize("loader", ["--fast-loader", "--no-fast-loader"])
@pytest.mark.parametrize("size", ["16", "224"])
def test_the_augmentations_of_deit_iii_pass_on_both_loaders(loader: str, size: str) -> None:
    words = ("--input-size", size, "--three-augment", "--src", "--bce-loss", "--smoothing", "0", "--opt", "lamb")
    check("--model", "attnscale_small_12", *KWARGS, "--epochs", "2", *words, "--unscale-lr", loader)


def test_a_class_count_below_the_data_s_is_named(tmp_path: Path) -> None:
    data = tiny_tree(tmp_path, train=3, val=3)
    done = call_main(*TINY, "--data-path", data, "--num-classes", 2, code=2)
    assert f"error: --num-classes 2: --data-path {data} holds 3 classes; give 3 or more" in done.stderr


@pytest.mark.parametrize("name", ["foo", "", "meta", "xpu", "mps", "cpu:3", "cuda:99", "privateuseone"])
def test_a_device_that_is_not_here_is_named(name: str) -> None:
    if name == "mps" and __import__("torch").mps.is_available():
        pytest.skip("there is one")
    with pytest.raises(utils.SetupError, match="--device"):
        utils.this_process(name)


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "abc", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"}, {"RANK": "2", "WORLD_SIZE": "2"},
     {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "x"},
     {"SLURM_PROCID": "0", "SLURM_NTASKS": "0"}, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "a"}],
    ids=str,
)  # fmt: skip
def test_a_launcher_s_variables_without_meaning_are_named(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(utils.SetupError, match="let torchrun or srun set"):
        utils.this_process("cpu")


def test_home_is_replaced_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--output_dir=~/run``: the shell leaves the ``~`` there."""
    monkeypatch.setenv("HOME", "/home/me")
    paths = {name: f"~/{name}" for name in preflight_paths()}
    args = parse(*(f"--{name.replace('_', '-')}={value}" for name, value in paths.items()))
    assert {name: getattr(args, name) for name in paths} == {name: f"/home/me/{name}" for name in paths}
    assert parse("--resume", "https://host/~me/x.pth").resume == "https://host/~me/x.pth"
    assert entry.user_path("~/x") == Path("/home/me/x")


def preflight_paths() -> Sequence[str]:
    from options import PATHS

    assert {"output_dir", "resume", "finetune", "teacher_path", "data_path", "shard_cache"} <= set(PATHS)
    return PATHS


# ---- any flags -------------------------------------------------------------------------------------------------------
NUMBERS = ("0", "1", "2", "3", "7", "-1", "0.5", "1.5", "-0.0", "1e-8", "1e9", "1e308", "nan", "inf", "-inf", "",
           "100000", "99999999999")  # fmt: skip
WORDS = {
    "opt": ("adamw", "sgd", "lamb", "lion", "adan", "lookahead_adam", "adafactor", "muon", "foo", "", "none"),
    "sched": ("cosine", "step", "poly", "tanh", "plateau", "foo"),
    "aa": ("none", "", "rand", "rand-m9", "rand-m-9", "rand-n0", "rand-n99-tweights", "rand-m9-p7", "augmix-w0",
           "augmix-m5-w4-d2", "original-mstdnan", "v0", "3a", "rand-mstdinf", "rand--", "-", "rand-m9-inc1-t3aw"),
    "train_interpolation": ("random", "bilinear", "bicubic", "nearest", "lanczos", "foo", ""),
    "remode": ("const", "rand", "pixel", "foo"),
    "mixup_mode": ("batch", "pair", "elem", "foo"),
    "distillation_type": ("none", "soft", "hard"),
    "device": ("cpu", "auto", "", "foo", "meta"),
    "model": ("attnscale_small_12", "featscale_tiny_12", "deit_small_12", "vit_tiny_patch16_224", "", "foo"),
}  # fmt: skip
KEYS = ("depth", "embed_dim", "num_heads", "patch_size", "in_chans", "mlp_ratio", "gain", "qk_norm", "class_token",
        "img_size", "num_classes", "global_pool", "drop_rate", "init_values", "reg_tokens", "no_such")  # fmt: skip
VALUES = ("0", "1", "2", "3", "8", "32", "-1", "0.5", "True", "None", "avg", "token", "(2,2)", "[]", "{}", "1e9", "'")
LARGE = ("torchcompile", "list_models", "throughput", "help")  # not drawn: they do other things
MODEL_FLAGS = ("model", "model_kwargs", "input_size", "num_classes")


def draw(rng: random.Random, with_model: bool) -> list[str]:
    """Flags and values at random, mostly such that could be meant."""
    words = []
    actions = [
        a for a in get_args_parser()._actions if a.dest not in LARGE and (a.dest not in MODEL_FLAGS or with_model)
    ]
    for action in rng.sample(actions, rng.choice((1, 1, 2, 3))) + ([a for a in actions if a.dest in MODEL_FLAGS[:2]]):
        if action.nargs == 0:
            words += [action.option_strings[0]]
        elif action.dest == "model_kwargs":
            pairs = (f"{rng.choice(KEYS)}={rng.choice(VALUES)}" for _ in range(rng.choice((0, 1, 1, 2))))
            words += [*KWARGS, *pairs]
        else:
            values = WORDS.get(action.dest) or ([*action.choices, "foo"] if action.choices else NUMBERS)
            number = rng.choice((1, 2, 2, 3)) if action.nargs == "+" else 1
            values = [rng.choice(values) for _ in range(number)]
            words += [f"{action.option_strings[0]}={values[0]}"] if number == 1 else [action.option_strings[0], *values]
    return words


def outcome(words: list[str], model: nn.Module | None) -> str:
    """How flags end: "built", the class of our error, or argparse's refusal. Any other exception passes."""
    try:
        with redirect_stderr(StringIO()):
            args = parse(*words)
        check_args(args)
        utils.resolve_device(args.device)
        if model is None:
            preflight.check_flags(args)
        else:
            preflight.check_recipe(args, model)
    except preflight.OWN_ERRORS as error:
        assert str(error).strip() and "--" in str(error)
        return type(error).__name__
    except SystemExit as left:
        assert left.code == 2
        return "usage"
    return "built"


def fuzz(seed: int, recipes: int, models: int) -> Counter:
    """Outcomes of so many draws of the recipe's flags (on one model) and of the model's."""
    rng, model = random.Random(seed), check(*SIZE)
    outcomes = Counter()
    for number in range(recipes + models):
        with_model = number >= recipes
        words = [*(MODEL if with_model else SIZE), *draw(rng, with_model)]
        try:
            outcomes[outcome(words, None if with_model else model)] += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}; from: {' '.join(map(repr, words))}") from error
    return outcomes


def test_random_flags_are_built_or_refused_in_a_sentence() -> None:
    outcomes = fuzz(seed=0, recipes=1850, models=150)
    assert outcomes.total() == 2000
    assert min(outcomes[kind] for kind in ("built", "ArgumentError", "ModelError", "usage")) > 20, outcomes
