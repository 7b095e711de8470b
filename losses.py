"""The training criterion: cross entropy in the form that fits the targets, or binary, with or without a teacher."""

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn


def build_criterion(
    *,
    mixup_active: bool,
    smoothing: float,
    bce: bool = False,
    teacher: nn.Module | None = None,
    distillation_type: str = "none",
    alpha: float = 0.5,
    tau: float = 1.0,
) -> "DistillationLoss":
    """The recipe's criterion.

    Args:
        mixup_active: Mixup or CutMix is on, so targets are distributions (B, num_classes) that carry the smoothing.
        smoothing: Label smoothing for class-index targets.
        bce: Binary cross entropy of each class, averaged over classes and images; a class is present (1) if it has any
            share in the target, else absent (0). Targets must not be smoothed: that would give every class a share.
            As in the code of DeiT III (arXiv 2204.07118).
        teacher: The frozen teacher; needed unless ``distillation_type`` is "none".
        distillation_type: "none", "soft" or "hard".
        alpha: Weight of the distillation loss, 0 to 1.
        tau: Temperature of the soft loss.
    """
    if bce:
        base = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    elif mixup_active:
        base = SoftTargetCrossEntropy()
    elif smoothing:
        base = LabelSmoothingCrossEntropy(smoothing=smoothing)
    else:
        base = nn.CrossEntropyLoss()
    return DistillationLoss(base, teacher, distillation_type, alpha, tau)


class DistillationLoss(nn.Module):
    """``(1 - alpha) base(class logits, targets) + alpha distillation(distillation logits, teacher logits)``.

    "hard" is the cross entropy with the teacher's decision. "soft" is the KL divergence between the distributions at
    temperature ``tau``, times ``tau**2``, divided by the number of logits B * num_classes: DeiT's convention, small by
    design (arXiv 2012.12877, section 4).

    Args:
        base_criterion: Loss of the class logits.
        teacher_model: Maps images to logits (B, num_classes); put into evaluation mode, never trained.
        distillation_type: "none", "soft" or "hard".
        alpha: Weight of the distillation loss.
        tau: Temperature of the soft loss.

    Raises:
        ValueError: If the type is unknown, or a teacher is missing.
    """

    def __init__(
        self,
        base_criterion: nn.Module,
        teacher_model: nn.Module | None,
        distillation_type: str,
        alpha: float,
        tau: float,
    ) -> None:
        super().__init__()
        if distillation_type not in ("none", "soft", "hard"):
            raise ValueError(f"--distillation-type {distillation_type}: give none, soft or hard")
        if distillation_type != "none" and teacher_model is None:
            raise ValueError(f"--distillation-type {distillation_type} needs --teacher-model and --teacher-path")
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau

    def forward(self, inputs: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """The scalar loss.

        Args:
            inputs: The student's images (B, 3, H, W), which the teacher sees too.
            outputs: Class logits (B, num_classes), or the pair (class logits, distillation logits).
            labels: Class indices (B,) or distributions (B, num_classes), as ``base_criterion`` takes them.

        Raises:
            ValueError: If distillation is on and the student gives no distillation logits.
        """
        logits, distillation_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
        base_loss = self.base_criterion(logits, labels)
        if self.distillation_type == "none":
            return base_loss
        if distillation_logits is None:
            raise ValueError(
                "--distillation-type needs a student that returns a pair of logits in training, such as "
                "deit_small_distilled_patch16_224"
            )
        with torch.no_grad():
            teacher_logits = self.teacher_model(inputs)
        if self.distillation_type == "hard":
            distillation_loss = F.cross_entropy(distillation_logits, teacher_logits.argmax(dim=1))
        else:
            distillation_loss = (
                F.kl_div(
                    F.log_softmax(distillation_logits / self.tau, dim=1),
                    F.log_softmax(teacher_logits / self.tau, dim=1),
                    reduction="sum",
                    log_target=True,
                )
                * self.tau**2
                / distillation_logits.numel()
            )
        return (1 - self.alpha) * base_loss + self.alpha * distillation_loss
