"""The loops: the reference's trajectories, exact means, accumulation, clipping, finiteness."""

import argparse
import logging
import math

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, golden_json, golden_rules
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import engine
import fit
import models  # noqa: F401  (registers the zoo)
import optim
from losses import build_criterion
from options import get_args_parser
from utils import Meters, Preempted, World, seed_everything

CPU = torch.device("cpu")


def build_trainer(model: nn.Module, *flags: str, smoothing: float = 0.1, lr: float = 1e-4, **kwargs) -> engine.Trainer:
    """The recipe's trainer around ``model``, as ``build.build_trainer`` makes it, on one CPU process."""
    args = get_args_parser().parse_args(flags)
    return engine.Trainer(
        model=model,
        bare_model=model,
        criterion=build_criterion(mixup_active=kwargs.get("mixup") is not None, smoothing=smoothing),
        optimizer=optim.build_optimizer(args, model, lr),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=CPU,
        **kwargs,
    )


def random_loader(batches: int = 4, batch_size: int = 4, **tiny) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(batches * batch_size, 3, 32, 32, generator=generator)
    labels = torch.randint(0, TINY["num_classes"], (batches * batch_size,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def train(trainer: engine.Trainer, loader: DataLoader, **kwargs) -> dict[str, float]:
    return engine.train_one_epoch(trainer, loader, 0, meters=Meters(CPU), **kwargs)


# ---- golden ----------------------------------------------------------------------------------------------------------
class TrajectorySteps(Dataset):
    """The batch of each golden step."""

    def __init__(self, steps: range, dtype: torch.dtype) -> None:
        self.steps, self.dtype = steps, dtype

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = golden_rules().trajectory_batch(0, self.steps[position])
        return torch.from_numpy(images).to(self.dtype), torch.from_numpy(targets)

    def __len__(self) -> int:
        return len(self.steps)


def check_norms(model: nn.Module, expected: dict[str, float], rel: float) -> None:
    state = model.state_dict()
    for key, norm in expected.items():
        assert state[key].norm().item() == pytest.approx(norm, rel=rel), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, precision",
    [
        *((name, "float64") for name in ("attnscale_small_12", "featscale_small_12", "attnscale_cait_XXS24_224")),
        ("attnscale_small_12", "float32"),
    ],
)
def test_eight_training_steps_follow_the_reference(name: str, precision: str) -> None:
    record = golden_json("public/trajectory.json")[name][precision]
    dtype = getattr(torch, precision)
    loss_atol, rel = (1e-8, 1e-9) if dtype == torch.float64 else (1e-4, 1e-3)
    torch.set_default_dtype(dtype)
    try:
        model = timm.create_model(name, num_classes=10)
        fill = golden_rules().fill
        model.load_state_dict({k: torch.from_numpy(fill(k, v.shape, 0)) for k, v in model.state_dict().items()})
        trainer = build_trainer(model, ema=engine.Ema(model, decay=record["ema_decay"]))
        losses = []

        def watch(images: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor, inner=trainer.criterion):
            losses.append(inner(images, outputs, targets))
            return losses[-1]

        trainer.criterion = watch
        train(trainer, DataLoader(TrajectorySteps(range(3), dtype), batch_size=None))
        check_norms(trainer.ema.module, record["ema_after_3_updates_l2"], rel)
        check_norms(model, record["model_after_3_steps_l2"], rel)
        trainer.ema = None
        train(trainer, DataLoader(TrajectorySteps(range(3, 8), dtype), batch_size=None))
        check_norms(model, record["model_after_8_steps_l2"], rel)
        np.testing.assert_allclose([loss.item() for loss in losses], record["losses"], rtol=0, atol=loss_atol)
    finally:
        torch.set_default_dtype(torch.float32)


def test_mixup_follows_the_reference_where_timm_still_does() -> None:
    """timm 1.x makes odd CutMix boxes one pixel larger: those batches differ, the others are the reference's."""
    golden = golden_json("public/mixup_timm0412.json")["cases"]
    settings = {"batch_default": dict(mixup_alpha=0.8, cutmix_alpha=1.0), "mixup_only": dict(mixup_alpha=0.8)}
    least_equal = {"batch_default": 13, "mixup_only": 16}
    for case, alphas in settings.items():
        mixup = Mixup(**({"cutmix_alpha": 0.0} | alphas), switch_prob=0.5, label_smoothing=0.1, num_classes=10)
        np.random.seed(0)
        equal = 0
        for k, record in enumerate(golden[case]):
            images = torch.from_numpy(np.random.RandomState(900 + k).standard_normal((4, 3, 32, 32)))
            labels = torch.from_numpy(np.random.RandomState(950 + k).randint(0, 10, 4))
            images, targets = mixup(images, labels)
            same_target = np.allclose(targets, record["target"], atol=1e-6)
            equal += same_target and math.isclose(images.norm().item(), record["x_norm"], rel_tol=1e-6)
        assert equal >= least_equal[case], case


def test_the_ema_is_timms_to_the_bit() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))  # BatchNorm counts its batches in an integer
    ours, theirs = engine.Ema(model, 0.9), ModelEmaV3(model, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 3))
        ours.update(model)
        theirs.update(model)
    for a, b in zip(ours.module.state_dict().values(), theirs.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_an_ema_in_host_memory_returns_there_after_its_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``--model-ema-force-cpu --eval-ema``, also if a signal ends it: elsewhere the next update fails."""
    moves = []

    class Moved(nn.Linear):
        def to(self, device: torch.device) -> nn.Module:
            moves.append(str(device))
            return self

    def evaluate(model: nn.Module, *args: object, **kwargs: object) -> dict[str, float]:
        raise Preempted

    monkeypatch.setattr(engine, "evaluate", evaluate)
    ema = engine.Ema(Moved(3, 2), 0.9)
    world, args = World(0, 0, 1, torch.device("cuda:0")), argparse.Namespace(print_freq=1, shard_eval=True)
    with pytest.raises(Preempted):
        fit.evaluate_with_ema(args, ema.module, None, DataLoader([0]), world, torch.float32)
    assert moves == ["cuda:0", "cpu"]


def test_an_ema_goes_on_after_an_evaluation_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A move to another device and back replaces buffers; here, a change of precision and back."""

    def evaluate(model: nn.Module, *args: object, **kwargs: object) -> dict[str, float]:
        model.double().float()
        return {"acc1": 0.0, "loss": 0.0}

    monkeypatch.setattr(engine, "evaluate", evaluate)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = engine.Ema(model, 0.5)
    ema.update(model)
    args = argparse.Namespace(print_freq=1, shard_eval=True)
    fit.evaluate_with_ema(args, nn.Linear(3, 2), ema, DataLoader([0]), World(0, 0, 1, CPU), torch.float32)
    model(torch.randn(5, 3))
    ema.update(model)
    assert torch.allclose(ema.module[1].running_mean, model[1].running_mean / 2)


# ---- training --------------------------------------------------------------------------------------------------------
def test_accumulated_batches_give_the_gradient_of_one_large_batch() -> None:
    model = timm.create_model("attnfeatscale_tiny_12", **TINY)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    results = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        model.load_state_dict(state)
        # SGD: AdamW would blow up the rounding of gradients that are zero but for it, such as the keys' bias.
        trainer = build_trainer(model, "--opt", "sgd", lr=0.1, grad_accum=accumulate)
        train(trainer, random_loader(16 // batch_size, batch_size))
        results.append({key: value.clone() for key, value in model.state_dict().items()})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_smaller_last_group_is_averaged_over_its_own_batches() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, TINY["num_classes"]))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    steps = []
    train(build_trainer(model, grad_accum=3), random_loader(4, 2), after_step=steps.append)
    assert steps == [3, 4]
    accumulated = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    images, labels = random_loader(1, 8).dataset.tensors
    batches = DataLoader(TensorDataset(images, labels), batch_sampler=[range(6), range(6, 8)])
    train(build_trainer(model), batches)
    torch.testing.assert_close(accumulated, dict(model.state_dict()))


@pytest.mark.parametrize("clip_grad, clipped", [(None, False), (0.0, False), (1e-3, True)])
def test_zero_or_no_clipping_leaves_the_gradient_alone(clip_grad: float | None, clipped: bool) -> None:
    model = timm.create_model("deit_tiny_12", **TINY)
    trainer = build_trainer(model, clip_grad=clip_grad)
    norms = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *args: (
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()),
        step(*args),
    )
    train(trainer, random_loader(1))
    assert (norms[0] < 1.1e-3) == clipped and norms[0] > 0


def test_the_epoch_loss_is_the_mean_over_all_images() -> None:
    model = timm.create_model("deit_tiny_12", **TINY)
    trainer = build_trainer(model, lr=0.0)
    images, labels = random_loader(2, 5).dataset.tensors
    stats = train(trainer, DataLoader(TensorDataset(images, labels), batch_size=4))  # batches of 4, 4 and 2
    expected = trainer.criterion(images, model(images), labels).item()
    assert stats["loss"] == pytest.approx(expected, rel=1e-5)


def test_draws_of_a_step_depend_on_its_address_alone() -> None:
    def run(first: int) -> dict[str, torch.Tensor]:
        seed_everything(0)
        model = timm.create_model("deit_tiny_12", **TINY, drop_path_rate=0.5, proj_drop_rate=0.3)
        mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=TINY["num_classes"])
        trainer = build_trainer(model, lr=1e-3, mixup=mixup)
        images, labels = random_loader(4, 4).dataset.tensors
        for start, stop in ((0, first), (first, 4)):
            torch.rand(first + 7)  # whatever else was drawn before must not matter
            part = TensorDataset(images[4 * start : 4 * stop], labels[4 * start : 4 * stop])
            train(trainer, DataLoader(part, batch_size=4), start_step=start, seed_step=lambda s: seed_everything(3, s))
        return model.state_dict()

    torch.testing.assert_close(run(1), run(3), rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stops_within_the_interval_and_names_the_step() -> None:
    model = timm.create_model("deit_tiny_12", **TINY)
    images, labels = random_loader(12, 2).dataset.tensors
    images[2 * 5] = float("nan")
    done = []
    with pytest.raises(engine.NonFiniteLossError, match="epoch 0, step 5"):
        loader = DataLoader(TensorDataset(images, labels), batch_size=2)
        train(build_trainer(model), loader, print_freq=3, after_step=done.append)
    assert len(done) <= 5 + 3


def test_weights_that_are_not_finite_are_noticed() -> None:
    model = timm.create_model("deit_tiny_12", **TINY)
    engine.check_weights_are_finite(model, 0, 0)
    with torch.no_grad():
        model.norm.weight[3] = float("inf")
    with pytest.raises(engine.NonFiniteLossError, match="epoch 4, step 2"):
        engine.check_weights_are_finite(model, 4, 2)


def test_progress_lines_show_loss_rate_eta_and_images_per_second(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    train(build_trainer(timm.create_model("deit_tiny_12", **TINY)), random_loader(3), print_freq=2)
    lines = [line for line in caplog.messages if line.startswith("Epoch: [0]")]
    assert len(lines) == 2 and all(part in lines[0] for part in ("[0/3]", "eta: ", "loss: ", "lr: ", "images/s: "))


# ---- evaluation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_evaluation_is_the_same_for_any_batch_size(batch_size: int) -> None:
    model = timm.create_model("attnscale_tiny_12", **TINY)
    images, labels = random_loader(1, 11).dataset.tensors
    with torch.no_grad():
        logits = model.eval()(images)
    result = engine.evaluate(model, DataLoader(TensorDataset(images, labels), batch_size=batch_size), CPU)
    assert result["acc1"] == 100 * (logits.argmax(-1) == labels).sum().item() / 11
    assert result["acc5"] == 100 * (logits.topk(5).indices == labels[:, None]).any(-1).sum().item() / 11
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_fewer_than_five_classes_are_no_problem() -> None:
    model = timm.create_model("attnscale_tiny_12", **(TINY | {"num_classes": 3}))
    loader = DataLoader(TensorDataset(torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1])), batch_size=2)
    assert engine.evaluate(model, loader, CPU)["acc5"] == 100.0


def test_throughput_is_a_positive_rate_in_evaluation_mode() -> None:
    model = timm.create_model("attnscale_tiny_12", **TINY).train()
    assert engine.throughput(model, torch.randn(2, 3, 32, 32), warmup=1, steps=2) > 0
    assert not model.training
