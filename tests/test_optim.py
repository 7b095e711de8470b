"""Parameter groups and learning rates: the reference's, epoch by epoch."""

import copy

import pytest
import timm
import torch
from conftest import golden_json
from timm.optim import list_optimizers
from timm.scheduler import CosineLRScheduler

import models  # noqa: F401  (registers the zoo)
import optim
import oversmoothing
from checkpoints import load_optimizer
from options import get_args_parser
from oversmoothing.weights import CheckpointError

SIZE = dict(img_size=32, patch_size=8, embed_dim=12, depth=3, num_heads=3)


def parse(argv: str):
    return get_args_parser().parse_args(argv.split())


def test_learning_rates_equal_the_reference_in_every_epoch() -> None:
    for name, record in golden_json("lr_schedule.json").items():
        args = parse(record["argv"])
        assert optim.scaled_lr(args, record["world_size"]) == pytest.approx(record["scaled_lr"], rel=1e-12), name
        plan = optim.LRPlan(args, record["world_size"])
        assert [plan(epoch) for epoch in range(args.epochs)] == pytest.approx(record["lr_per_epoch"], rel=1e-12), name
        assert plan(1, 7) == plan(1, 0), "the rate changes within an epoch"


def test_learning_rates_of_steps_equal_timms_schedule_moved_after_each_step() -> None:
    """In any order: a run that is resumed within an epoch asks for those of its own steps alone."""
    words = "--lr 2e-3 --warmup-lr 1e-6 --min-lr 1e-5 --warmup-epochs 2 --epochs 6 --batch-size 64 --grad-accum 2"
    args = parse(f"{words} --sched-on-updates")
    steps_per_epoch = 5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3 * 2)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=30, lr_min=1e-5, warmup_t=10, warmup_lr_init=1e-6, t_in_epochs=False
    )
    expected = []
    for step in range(args.epochs * steps_per_epoch):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step)
    plan = optim.LRPlan(args, 8, steps_per_epoch)
    for step in reversed(range(len(expected))):
        assert plan(*divmod(step, steps_per_epoch)) == expected[step], step


@pytest.mark.parametrize("processes", [1, 4])
def test_the_bounds_of_the_rate_grow_with_the_batch_where_asked(processes: int) -> None:
    words = "--batch-size 256 --warmup-lr 5e-7 --min-lr 5e-6 --warmup-epochs 3 --epochs 2000"
    for flag, factor in (("", 1), ("--scale-min-lr", processes / 2)):
        plan = optim.LRPlan(parse(f"{words} {flag}"), processes)
        assert plan(0) == pytest.approx(5e-7 * factor) and plan(1999) == pytest.approx(5e-6 * factor, rel=1e-2)
        assert plan(4) == pytest.approx(5e-4 * processes / 2, rel=1e-3)


def test_an_unscaled_rate_is_that_of_any_batch() -> None:
    words = "--lr 4e-3 --warmup-lr 1e-6 --min-lr 1e-5 --warmup-epochs 5 --epochs 800 --batch-size 256"
    of_one = optim.LRPlan(parse(f"{words} --unscale-lr"), 1)
    for more, processes in (("", 8), ("--batch-size 32", 3), ("--grad-accum 4", 2)):
        args = parse(f"{words} --unscale-lr {more}")
        plan = optim.LRPlan(args, processes)
        assert optim.scaled_lr(args, processes) == 4e-3
        assert all(plan(epoch) == of_one(epoch) for epoch in range(800))
    assert of_one(0) == 1e-6 and of_one(799) == pytest.approx(1e-5, rel=1e-2)
    assert max(map(of_one, range(800))) == pytest.approx(4e-3, rel=1e-3)
    assert "base 0.004 = 0.004 whatever the batch (--unscale-lr); cosine" in optim.describe_plan(args, of_one, 1)


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
    plan = optim.LRPlan(args, 2)
    text = optim.describe_plan(args, plan, 2)
    assert "base 0.001" in text and f"LR by epoch: 0: {plan(0):.4g}" in text and f"9: {plan(9):.4g}" in text
    args = parse("--epochs 10 --batch-size 512 --sched-on-updates --scale-min-lr")
    plan = optim.LRPlan(args, 2, steps_per_epoch=7)
    text = optim.describe_plan(args, plan, 2)
    assert f"LR at the first step of epoch: 0: {plan(0):.4g}" in text and f"9: {plan(9):.4g}" in text
    assert "--min-lr and --warmup-lr scaled likewise" in text


def layer_of(name: str) -> int:
    """Depth of a parameter of a three-layer model: 0 is the stem, 4 the head; class attention counts as last blocks."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    if name.startswith("blocks_token_only."):
        return int(name.split(".")[1]) + 2
    return {"norm": 3, "head": 4}.get(name.split(".")[0], 0)


@pytest.mark.parametrize("name", ["attnfeatscale_tiny_12", "attnfeatscale_cait_XXS24"])
def test_layer_decay_slows_each_layer_and_keeps_the_rules_of_weight_decay(name: str) -> None:
    model = timm.create_model(name, **SIZE)
    plain = optim.build_optimizer(parse(""), model, 1e-3)
    optimizer = optim.build_optimizer(parse("--layer-decay 0.5"), model, 1e-3)
    optim.set_lr(optimizer, 0.2)
    groups, decay = {}, {}
    for group in optimizer.param_groups:
        groups |= {id(parameter): group for parameter in group["params"]}
        assert group["fused"]
    for group in plain.param_groups:
        decay |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        assert groups[id(parameter)]["lr"] == pytest.approx(0.2 * 0.5 ** (4 - layer_of(key))), key
        assert groups[id(parameter)]["weight_decay"] == decay[id(parameter)], key
    assert optim.describe_layer_decay(optimizer).endswith("plan: 0.0625  0.125  0.25  0.5  1")


def step(optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(7)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_an_optimizer_with_layer_decay_goes_on_from_its_saved_state() -> None:
    optimizers = []
    for _ in range(2):
        torch.manual_seed(0)
        optimizers.append(
            optim.build_optimizer(parse("--layer-decay 0.5"), timm.create_model("attnscale_tiny_12", **SIZE), 1e-3)
        )
    first, second = optimizers
    step(first)
    with torch.no_grad():
        for ours, theirs in zip(second.param_groups, first.param_groups, strict=True):
            for mine, other in zip(ours["params"], theirs["params"], strict=True):
                mine.copy_(other)
    load_optimizer(second, copy.deepcopy(first.state_dict()))
    for optimizer in optimizers:
        optim.set_lr(optimizer, 0.1)
        step(optimizer)
    for ours, theirs in zip(second.param_groups, first.param_groups, strict=True):
        assert ours["lr"] == theirs["lr"] == 0.1 * ours["lr_scale"]
        torch.testing.assert_close(ours["params"], theirs["params"], rtol=0, atol=0)


def test_a_state_without_layer_decay_is_refused_by_a_run_with_it() -> None:
    model = timm.create_model("attnscale_tiny_12", **SIZE)
    saved = optim.build_optimizer(parse(""), model, 1e-3).state_dict()
    with pytest.raises(CheckpointError, match="parameter groups"):
        load_optimizer(optim.build_optimizer(parse("--layer-decay 0.5"), model, 1e-3), saved)


def test_lamb_makes_the_steps_of_its_definition(float64: None) -> None:
    """arXiv 1904.00962, algorithm 2, as apex has it: the gradient clipped at norm 1, no trust ratio without decay."""
    torch.manual_seed(0)
    model = timm.create_model("attnscale_tiny_12", **SIZE, init_values=1e-2)
    optimizer = optim.build_optimizer(parse("--opt lamb --weight-decay 0.05"), model, 1e-3)
    named = dict(model.named_parameters())
    expected = {name: parameter.detach().clone() for name, parameter in named.items()}
    means, squares = ({name: torch.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    for number in range(1, 4):
        optim.set_lr(optimizer, lr := 1e-3 * number)
        gradients = {name: torch.randn_like(value) for name, value in expected.items()}
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert norm > 1
        for name, parameter in named.items():
            parameter.grad = gradients[name].clone()
            gradient = gradients[name] / norm
            means[name] = 0.9 * means[name] + 0.1 * gradient
            squares[name] = 0.999 * squares[name] + 0.001 * gradient**2
            update = means[name] / (1 - 0.9**number) / ((squares[name] / (1 - 0.999**number)).sqrt() + 1e-8)
            if parameter.ndim > 1 and name not in ("cls_token", "pos_embed"):
                update += 0.05 * expected[name]
                update *= expected[name].norm() / update.norm()
            expected[name] -= lr * update
        optimizer.step()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12, msg=name)


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


# ---- arguments of the optimizer's own ----
@pytest.mark.parametrize("remedy", oversmoothing.list_remedies())
def test_muon_takes_matrices_and_leaves_vectors_to_adamw(remedy: str) -> None:
    """A remedy's weights of heads or channels are vectors; without weight decay, as everywhere."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    oversmoothing.add_remedy(model, remedy)
    optimizer = optim.build_optimizer(parse("--opt muon"), model, 1e-3)
    step(optimizer)
    kinds = {name: optimizer.state[parameter]["use_muon"] for name, parameter in model.named_parameters()}
    added = [name for name in kinds if oversmoothing.is_remedy_parameter(name)]
    matrices = [name for name in added if dict(model.named_parameters())[name].ndim > 1]
    assert {name for name in added if kinds[name]} == set(matrices)
    assert bool(matrices) == (remedy in ("gated", "reattention"))
    assert kinds["blocks.0.attn.qkv.weight"] and kinds["patch_embed.proj.weight"] and kinds["head.weight"]
    assert not any(kinds[name] for name in ("cls_token", "pos_embed", "norm.weight", "head.bias"))
    decaying = {id(parameter) for parameter in optimizer.param_groups[1]["params"]}
    assert not any(id(parameter) in decaying for parameter in model.parameters() if parameter.ndim < 2)


def test_muon_gets_its_own_arguments_and_the_parameters_for_adamw() -> None:
    model = timm.create_model("attnscale_tiny_12", **SIZE)
    args = parse("--opt nadamuon --momentum 0.95 --opt-kwargs ns_steps=6 nesterov=False fallback_list=['head.*']")
    optimizer = optim.build_optimizer(args, model, 1e-3)
    step(optimizer)
    for group in optimizer.param_groups:
        assert (group["ns_steps"], group["nesterov"], group["algo"], group["momentum"]) == (6, False, "adamuon", 0.95)
    assert (
        not optimizer.state[model.head.weight]["use_muon"]
        and optimizer.state[model.blocks[0].mlp.fc1.weight]["use_muon"]
    )


@pytest.mark.parametrize(("words", "fused"), [("amsgrad=True", True), ("foreach=True", None), ("fused=False", False)])
def test_the_fused_kernel_gives_way_to_what_was_asked_for(words: str, fused: bool | None) -> None:
    optimizer = optim.build_optimizer(parse(f"--opt-kwargs {words}"), torch.nn.Linear(2, 2), 1e-3)
    assert optimizer.defaults["fused"] == fused


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_types_are_given_by_name(dtype: str) -> None:
    optimizer = optim.build_optimizer(parse(f"--opt kron --opt-kwargs mu_dtype={dtype}"), torch.nn.Linear(2, 2), 1e-3)
    assert optimizer.defaults["mu_dtype"] == getattr(torch, dtype)


def test_no_argument_of_any_optimizer_is_without_a_type() -> None:
    """And its default is of that type, or there would be values that nobody can give."""
    for name in list_optimizers(exclude_filters=["bnb*", "fused*"]):
        for own, argument in optim.own_arguments(name).items():
            default = "bfloat16" if argument.default is torch.bfloat16 else argument.default
            assert argument.wants() and (default is None or argument.takes(default)), (name, own)
