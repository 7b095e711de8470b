"""The optimizer's state in a checkpoint: exact for every optimizer, and never taken by one that did not write it."""

import argparse
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT
from states import small_vit
from timm.optim import get_optimizer_info, kron, list_optimizers
from torch import nn

import checkpoints
import optim
import oversmoothing
import utils
from options import get_args_parser
from oversmoothing.weights import CheckpointError, read_checkpoint

OPTIMIZERS_PAGE = ROOT / "docs" / "optimizers.md"
NOT_HERE = ("bnb", "fused")  # of bitsandbytes and apex, which need a GPU
OPTIMIZERS = [n for n in list_optimizers() if not n.startswith(NOT_HERE) and not get_optimizer_info(n).second_order]


class Tiny(nn.Module):
    """A parameter of each kind that models have: matrices, a kernel, a vector, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(6, 4), (6, 4), (4,), (1, 5, 4), (3, 2, 2, 2), ()]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)


def vit_with_remedies() -> nn.Module:
    """Its remedies' parameters are vectors, of heads and of channels, and matrices."""
    return oversmoothing.add_remedy(small_vit(depth=1), ["attnscale", "gated", "featscale"])


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(autouse=True, scope="module")
def eager() -> Iterator[None]:
    """Kron compiles its step, which takes half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def build(name: str, build_model: Callable[[], nn.Module] = Tiny) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build_model()
    return model, optim.build_optimizer(get_args_parser().parse_args(["--opt", name]), model, 1e-3)


def trained(name: str, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = build(name)
    for number in range(steps):
        step(model, optimizer, number)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, rank: int = 0) -> None:
    """As training does it: the global generators differ from rank to rank, gradients do not."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optim.set_lr(optimizer, 1e-3 / (1 + number))
    optim.seed_draws(optimizer, 0, 0, number)
    utils.seed_everything(0, rank, 0, number)
    optimizer.step()


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


EVERY = [*OPTIMIZERS, *(f"lookahead_{name}" for name in OPTIMIZERS)]


@pytest.mark.parametrize(
    ("name", "build_model"),
    [(name, Tiny) for name in OPTIMIZERS]
    + [(name, vit_with_remedies) for name in EVERY if kron.has_opt_einsum or "kron" not in name],
)
def test_every_optimizer_goes_on_as_if_it_had_never_stopped(
    name: str, build_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """Through a file. Lookahead's copies of the weights begin with its sixth step, here after the stop."""
    model, optimizer = build(name, build_model)
    other, resumed = build(name, build_model)
    for number in range(9):
        if number == 4:
            state = checkpoints.assemble(
                model=model, model_ema=None, optimizer=optimizer, scaler=None, epoch=0, step=0, meters={},
                max_accuracy={}, args=argparse.Namespace(),
            )  # fmt: skip
            checkpoints.write(state, tmp_path / "checkpoint.pth")
            saved = read_checkpoint(tmp_path / "checkpoint.pth")
            other.load_state_dict(saved["model"])
            checkpoints.load_optimizer(resumed, saved["optimizer"], saved["optimizer_class"])
        step(model, optimizer, number)
        if number >= 4:
            step(other, resumed, number)
    assert_equal(other, model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rank_makes_the_same_step(name: str) -> None:
    """The processes exchange gradients, never weights, so an optimizer's draws must not depend on the rank."""
    (model, optimizer), (other, others) = build(name), build(name)
    for number in range(3):
        step(model, optimizer, number)
        step(other, others, number, rank=1)
    assert_equal(other, model)


def test_the_page_says_what_is_tested_here() -> None:
    """docs/optimizers.md: which optimizers resume exactly, and the arguments of each."""
    rows = re.findall(r"^\| (?:timm|torch)'s .* \| (.*) \| (.*) \| (.*) \|$", OPTIMIZERS_PAGE.read_text(), re.MULTILINE)
    found = {}
    for names, verdict, own in rows:
        for name in re.findall(r"`(\w+)`", names):
            found[name] = verdict
            assert re.findall(r"`(\w+)`", own) == list(optim.own_arguments(name)), name
    assert set(found) == {name for name in list_optimizers() if not name.startswith(NOT_HERE)}
    assert {name for name in found if found[name].startswith("yes")} == set(OPTIMIZERS)
    assert {name for name in found if "opt_einsum" in found[name]} == {name for name in OPTIMIZERS if "kron" in name}


def test_no_optimizer_takes_the_state_of_another() -> None:
    """By its class; and where a file does not say that, by the entries, wherever these differ at all."""
    states = {}
    for name in OPTIMIZERS:
        _, optimizer = trained(name, steps=1)
        forms = [
            {k: k == "step" or checkpoints._form(v, k) for k, v in s.items()}  # a count may be a number or a tensor
            for s in optimizer.state_dict()["state"].values()
        ]
        states.setdefault(type(optimizer).__name__, (name, optimizer, forms))
    assert len(states) > 25
    for (theirs, (_, old, old_forms)), (ours, (name, _, forms)) in itertools.permutations(states.items(), 2):
        _, fresh = build(name)
        with pytest.raises(
            CheckpointError, match=rf"its optimizer is {theirs}, this run's --opt is {ours}: resume with"
        ):
            checkpoints.load_optimizer(fresh, old.state_dict(), theirs)
        if forms != old_forms and any(old_forms):
            with pytest.raises(CheckpointError, match="the state of its optimizer does not fit --opt"):
                checkpoints.load_optimizer(fresh, old.state_dict())


def spoiled_states() -> list[tuple[str, Any]]:
    return [
        ("exp_avg", torch.zeros(2)),
        ("exp_avg", torch.zeros(10**6)),
        ("exp_avg", torch.zeros(6, 4, dtype=torch.float64)),
        ("exp_avg", torch.zeros(4, 6)),
        ("exp_avg", None),
        ("exp_avg", 0.0),
        ("step", -1),
        ("step", float("nan")),
        ("step", torch.tensor(-1.0)),
        ("step", torch.tensor(float("inf"))),
        ("step", "many"),
        ("step", torch.zeros(3)),
        ("more", torch.zeros(6, 4)),
    ]


@pytest.mark.parametrize(("entry", "value"), spoiled_states(), ids=lambda value: str(value)[:30])
def test_a_state_that_would_write_beyond_a_tensor_is_refused(entry: str, value: Any) -> None:
    _, optimizer = trained("adamw")
    saved = optimizer.state_dict()
    saved["state"][0][entry] = value
    _, fresh = build("adamw")
    with pytest.raises(
        CheckpointError, match=rf"x\.pth: the state of its optimizer .*'{entry}' of a parameter of shape"
    ):
        checkpoints.load_optimizer(fresh, saved, source="x.pth")
    assert not fresh.state
    del saved["state"][0][entry]
    if entry != "more":
        with pytest.raises(CheckpointError, match=rf"'{entry}' of .* is missing"):
            checkpoints.load_optimizer(fresh, saved, source="x.pth")


def test_muons_choice_of_matrices_is_part_of_its_state() -> None:
    """Its step would orthogonalise a vector, or look for moments that are not there."""
    _, optimizer = trained("muon")
    saved = optimizer.state_dict()
    kinds = {number: entry["use_muon"] for number, entry in saved["state"].items()}
    assert set(kinds.values()) == {True, False}
    for number, kind in kinds.items():
        saved["state"][number]["use_muon"] = not kind
        with pytest.raises(CheckpointError, match=f"'use_muon' of a parameter of shape .* is {not kind}, not {kind}"):
            checkpoints.load_optimizer(build("muon")[1], saved)
        saved["state"][number]["use_muon"] = kind


def test_the_check_costs_no_second_copy_of_a_deep_model() -> None:
    model = small_vit(depth=12)
    optimizer = torch.optim.AdamW(model.parameters())
    stand_ins, _ = checkpoints._dry_run(optimizer, optimizer.param_groups[0])
    assert len(stand_ins) < 15 < len(list(model.parameters()))
