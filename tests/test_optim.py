"""Parameter groups and learning rates: the reference's, epoch by epoch."""

import pytest
import timm
import torch
from conftest import golden_json

import models  # noqa: F401  (registers the zoo)
import optim
from options import get_args_parser


def parse(argv: str):
    return get_args_parser().parse_args(argv.split())


def test_learning_rates_equal_the_reference_in_every_epoch() -> None:
    for name, record in golden_json("lr_schedule.json").items():
        args = parse(record["argv"])
        lr = optim.scaled_lr(args, record["world_size"])
        assert lr == pytest.approx(record["scaled_lr"], rel=1e-12), name
        assert optim.lr_plan(args, lr) == pytest.approx(record["lr_per_epoch"], rel=1e-12), name


def test_parameter_groups_equal_the_reference() -> None:
    for name, record in golden_json("optimizer_groups.json").items():
        with torch.device("meta"):
            model = timm.create_model(name)
        names = {parameter: key for key, parameter in model.named_parameters()}
        weight_decay = max(group["weight_decay"] for group in record["groups"])
        optimizer = optim.build_optimizer(parse(f"--weight-decay {weight_decay}"), model, record["defaults"]["lr"])
        assert type(optimizer).__name__ == "AdamW"
        assert len(optimizer.param_groups) == len(record["groups"])
        for ours, theirs in zip(optimizer.param_groups, record["groups"], strict=True):
            assert [names[parameter] for parameter in ours["params"]] == theirs["names"]
            assert ours["weight_decay"] == theirs["weight_decay"]
            assert list(ours["betas"]) == theirs["betas"] and ours["eps"] == theirs["eps"]


def test_no_lambda_token_or_position_embedding_decays() -> None:
    model = timm.create_model("attnfeatscale_tiny_12", img_size=32, depth=1)
    optimizer = optim.build_optimizer(parse(""), model, 1e-3)
    no_decay = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        expected = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        assert (id(parameter) in no_decay) == expected, name


def test_the_rate_grows_with_the_effective_batch() -> None:
    assert optim.scaled_lr(parse("--batch-size 64 --grad-accum 4"), 2) == optim.scaled_lr(parse("--batch-size 512"), 1)


def test_the_plan_is_described_with_its_turning_points() -> None:
    args = parse("--epochs 10 --batch-size 512")
    plan = optim.lr_plan(args, 1e-3)
    text = optim.describe_plan(args, 1e-3, plan, 2)
    assert "base 0.001" in text and f"9: {plan[9]:.4g}" in text


@pytest.mark.parametrize(
    "name, fused", [("adamw", True), ("sgd", True), ("lookahead_adamw", True), ("nadamw", None), ("lamb", None)]
)
def test_kinds_that_have_a_fused_kernel_use_it(name: str, fused: bool | None) -> None:
    model = timm.create_model("attnscale_tiny_12", img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    args = get_args_parser().parse_args(["--opt", name])
    optimizer = optim.build_optimizer(args, model, 1e-3)
    assert all(group.get("fused") == fused for group in optimizer.param_groups)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
