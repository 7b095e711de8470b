"""The optimizer's state in a checkpoint: exact for every optimizer, and never taken by one that did not write it."""

import copy
import itertools
from typing import Any

import pytest
import torch
from states import small_vit
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

import checkpoints
from oversmoothing.weights import CheckpointError

# They need a GPU, a gradient of the gradient, or half a minute to compile their step.
NOT_HERE = ("bnb", "fused", "adahessian", "kron")
OPTIMIZERS = [name for name in list_optimizers() if not name.startswith(NOT_HERE)]


class Tiny(nn.Module):
    """A parameter of each kind that models have: matrices, a kernel, a vector, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(6, 4), (6, 4), (4,), (1, 5, 4), (3, 2, 2, 2), ()]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)


def trained(name: str, steps: int = 2) -> tuple[Tiny, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.05)
    for number in range(steps):
        step(model, optimizer, number)
    return model, optimizer


def step(model: Tiny, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    torch.manual_seed(number)  # as training seeds each step
    optimizer.step()


@pytest.mark.parametrize("name", [*OPTIMIZERS, "lookahead_adamw"])
def test_every_optimizer_goes_on_as_if_it_had_never_stopped(name: str) -> None:
    """Counters that an optimizer keeps in its groups belong to the state too: Lamb's and Adan's steps, Lookahead's."""
    model, optimizer = trained(name, steps=4)
    other = copy.deepcopy(model)
    resumed = create_optimizer_v2(other, opt=name, lr=1e-3, weight_decay=0.05)
    saved = copy.deepcopy(optimizer.state_dict())
    checkpoints.load_optimizer(resumed, saved, checkpoints.optimizer_class(optimizer))
    for number in range(4, 9):
        step(model, optimizer, number)
        step(other, resumed, number)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_no_optimizer_takes_the_state_of_another() -> None:
    """By its class; and where a file does not say that, by the entries, wherever these differ at all."""
    states = {}
    for name in OPTIMIZERS:
        model, optimizer = trained(name, steps=1)
        forms = [
            {k: k == "step" or checkpoints._form(v, k) for k, v in s.items()}  # a count may be a number or a tensor
            for s in optimizer.state_dict()["state"].values()
        ]
        states.setdefault(type(optimizer).__name__, (name, model, optimizer, forms))
    assert len(states) > 25
    for (theirs, (_, _, old, old_forms)), (ours, (name, model, _, forms)) in itertools.permutations(states.items(), 2):
        fresh = create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.05)
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
    model, optimizer = trained("adamw")
    saved = optimizer.state_dict()
    saved["state"][0][entry] = value
    fresh = create_optimizer_v2(model, opt="adamw", weight_decay=0.05, fused=True)
    with pytest.raises(
        CheckpointError, match=rf"x\.pth: the state of its optimizer .*'{entry}' of a parameter of shape"
    ):
        checkpoints.load_optimizer(fresh, saved, source="x.pth")
    assert not fresh.state
    del saved["state"][0][entry]
    if entry != "more":
        with pytest.raises(CheckpointError, match=rf"'{entry}' of .* is missing"):
            checkpoints.load_optimizer(fresh, saved, source="x.pth")


def test_the_check_costs_no_second_copy_of_a_deep_model() -> None:
    model = small_vit(depth=12)
    optimizer = torch.optim.AdamW(model.parameters())
    stand_ins, _ = checkpoints._dry_run(optimizer, optimizer.param_groups[0])
    assert len(stand_ins) < 15 < len(list(model.parameters()))
