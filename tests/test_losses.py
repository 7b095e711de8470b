"""The criterion: the reference's values, the right loss for the targets, clear refusals."""

import pytest
import torch
from conftest import golden_json, golden_rules
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from losses import DistillationLoss, build_criterion


class FixedTeacher(nn.Module):
    """Answers with the golden teacher's logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def base_criterion(name: str) -> nn.Module:
    kind, targets = name.split("/")
    if kind.startswith("LabelSmoothing"):
        return LabelSmoothingCrossEntropy(float(kind.split("(")[1][:-1]) if "(" in kind else 0.1)
    return {"CrossEntropyLoss": nn.CrossEntropyLoss(), "SoftTargetCrossEntropy": SoftTargetCrossEntropy()}[kind]


def test_distillation_equals_the_reference(float64: None) -> None:
    records = golden_json("public/losses.json")["distillation"]
    assert len(records) > 10
    for record in records:
        tensors = {key: torch.from_numpy(value) for key, value in golden_rules().loss_tensors(0).items()}
        cls, dist = tensors["cls"].requires_grad_(), tensors["dist"].requires_grad_()
        labels = tensors["soft" if "soft" in record["base"].split("/")[1] else "labels"]
        outputs = (cls, dist) if record["output"] == "tuple" else cls
        criterion = DistillationLoss(
            base_criterion(record["base"]),
            FixedTeacher(tensors["teacher"]),
            record["type"],
            record["alpha"],
            record["tau"],
        )
        if "loss" not in record:
            with pytest.raises(ValueError):
                criterion(torch.zeros(6), outputs, labels)
            continue
        loss = criterion(torch.zeros(6), outputs, labels)
        loss.backward()
        assert loss.item() == pytest.approx(record["loss"], rel=1e-12), record
        for tensor, norm in ((cls, record["grad_cls_norm"]), (dist, record["grad_dist_norm"])):
            found = None if tensor.grad is None else tensor.grad.norm().item()
            assert found == (norm if norm is None else pytest.approx(norm, rel=1e-12)), record


@pytest.mark.parametrize(
    "mixup_active, smoothing, expected",
    [
        (True, 0.1, SoftTargetCrossEntropy),
        (True, 0.0, SoftTargetCrossEntropy),
        (False, 0.1, LabelSmoothingCrossEntropy),
        (False, 0.0, nn.CrossEntropyLoss),
    ],
)
def test_the_loss_fits_the_targets(mixup_active: bool, smoothing: float, expected: type) -> None:
    criterion = build_criterion(mixup_active=mixup_active, smoothing=smoothing)
    assert type(criterion.base_criterion) is expected


@pytest.mark.parametrize("mix", [dict(mixup_alpha=0.8), dict(mixup_alpha=0.0, cutmix_alpha=1.0)], ids=str)
def test_binary_cross_entropy_has_every_class_of_a_mixed_image_present(float64: None, mix: dict) -> None:
    """DeiT III's loss: the mean over images and classes of -y log p - (1 - y) log(1 - p), y = 1 for any share."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 3, 3, 1])
    logits = torch.randn(4, 5, requires_grad=True)
    _, targets = Mixup(**mix, label_smoothing=0.0, num_classes=5)(torch.randn(4, 1, 8, 8), labels)
    present = torch.zeros(4, 5)
    for row, pair in enumerate(zip(labels, labels.flip(0), strict=True)):
        present[row, list(pair)] = 1
    assert 0 < targets[0].max() < 1  # shares, not yet decisions

    loss = build_criterion(mixup_active=True, smoothing=0.0, bce=True)(torch.zeros(4), logits, targets.to(logits))
    p = torch.sigmoid(logits.detach())
    expected = -(present * p.log() + (1 - present) * (1 - p).log()).sum() / 20
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss, nn.BCEWithLogitsLoss()(logits, present))
    loss.backward()
    torch.testing.assert_close(logits.grad, (p - present) / 20)


def test_binary_cross_entropy_of_unmixed_images_has_their_one_class_present(float64: None) -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([2, 0, 3])
    criterion = build_criterion(mixup_active=False, smoothing=0.0, bce=True)
    torch.testing.assert_close(
        criterion(torch.zeros(3), logits, labels), nn.BCEWithLogitsLoss()(logits, torch.eye(4)[labels])
    )


def test_binary_cross_entropy_is_the_class_token_s_part_of_a_distillation(float64: None) -> None:
    logits, distilled, teacher = torch.randn(3, 3, 4)
    labels = torch.tensor([2, 0, 3])
    criterion = build_criterion(
        mixup_active=False, smoothing=0.0, bce=True, teacher=FixedTeacher(teacher), distillation_type="hard", alpha=0.3
    )
    expected = 0.7 * nn.BCEWithLogitsLoss()(logits, torch.eye(4)[labels])
    expected += 0.3 * nn.CrossEntropyLoss()(distilled, teacher.argmax(1))
    torch.testing.assert_close(criterion(torch.zeros(3), (logits, distilled), labels), expected)


def test_a_missing_teacher_and_an_unknown_type_are_refused() -> None:
    with pytest.raises(ValueError, match="--teacher-path"):
        build_criterion(mixup_active=False, smoothing=0.0, distillation_type="soft")
    with pytest.raises(ValueError, match="loud"):
        build_criterion(mixup_active=False, smoothing=0.0, distillation_type="loud")


def test_the_teacher_gets_no_gradient() -> None:
    teacher = nn.Linear(4, 3)
    criterion = build_criterion(mixup_active=False, smoothing=0.1, teacher=teacher, distillation_type="hard")
    logits = torch.randn(2, 3, requires_grad=True)
    criterion(torch.randn(2, 4), (logits, logits), torch.tensor([0, 2])).backward()
    assert teacher.weight.grad is None and logits.grad is not None
