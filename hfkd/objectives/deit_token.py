"""A token that learns from the teacher beside one that learns from the labels (Touvron et al. 2021, arXiv 2012.12877)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from hfkd.objectives.distillation import Distillation, checked_choice, checked_positive
from hfkd.objectives.kd import KD
from hfkd.objectives.pseudo_label import PseudoLabel
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput, Terms

ALPHAS = {"hard": 0.5, "soft": 0.1}  # the paper's weights of the distillation term
TWO_HEADS = {
    "deit": "DeiTForImageClassificationWithTeacher",
    "levit": "LevitForImageClassificationWithTeacher",
}


class DeiTToken(Distillation):
    """Trains DeiTForImageClassificationWithTeacher and LevitForImageClassificationWithTeacher of transformers.

    hard: L = (1 - alpha) * CE(y, z_cls) + alpha * CE(argmax z_t, z_dist), equation 3 of the paper, alpha = 0.5. A teacher that
    answers labels (a vote, say) is taken at its word, as by `PseudoLabel`.
    soft: L = (1 - alpha) * CE(y, z_cls) + alpha * T^2 * KL(softmax(z_t / T) || softmax(z_dist / T)), equation 2, as `KD`, with
    the paper's T = 3 and alpha = 0.1. The authors' code divides the KL by the number of classes too; the equation does not.

    Each term trains the head that its logits come from. Predictions, metrics and `eval_loss` are of the model's `logits`,
    the mean of both heads (the paper adds the two softmaxes). Labels of the teacher are not smoothed.

    student.cls_logits, student.distillation_logits, teacher.logits: (batch, num_labels); single-label heads only, also with
    labels that are probabilities (mixup). Raises ValueError for a student without the two heads, and for an alpha of 0 or 1,
    at which one of them never learns and still counts in the prediction.
    """

    paper = "2012.12877"
    problem_types = ("single_label_classification",)

    def __init__(
        self,
        kind: str = "hard",
        temperature: float = 3.0,
        alpha: float | None = None,
        label_smoothing: float = 0.0,
    ):
        usual = ALPHAS[checked_choice("kind", kind, tuple(ALPHAS))]
        alpha = usual if alpha is None else alpha
        if not 0 < alpha < 1:
            raise ValueError(
                f"alpha must lie between 0 and 1, both excluded, got {alpha}: the head without a loss would stay as it is and "
                "count in every prediction; use CrossEntropy or KD, which train the mean of both heads"
            )
        super().__init__(alpha, label_smoothing)
        self.kind = kind
        self.temperature = checked_positive("temperature", temperature)
        self.of_token = PseudoLabel(alpha=1.0) if kind == "hard" else KD(temperature, alpha=1.0)
        distilled = (
            r"\mathrm{CE}(\arg\max z_t, z_{\mathrm{dist}})"
            if kind == "hard"
            else r"T^2 \, \mathrm{KL}(\sigma(z_t / T) \| \sigma(z_{\mathrm{dist}} / T))"
        )
        self.equation = rf"L = (1 - \alpha) \, \mathrm{{CE}}(y, z_{{\mathrm{{cls}}}}) + \alpha \, {distilled}"

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        model_type = getattr(student_config, "model_type", None)
        if model_type in CONFIG_MAPPING_NAMES and model_type not in TWO_HEADS:
            raise ValueError(wrong_student(f"the student is a {model_type!r} model"))

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        if getattr(student, "cls_logits", None) is None or getattr(student, "distillation_logits", None) is None:
            raise ValueError(wrong_student(f"this one answers {type(student).__name__}"))
        heads = SimpleNamespace(logits=student.cls_logits, distillation_logits=student.distillation_logits)
        return super().forward(heads, teacher, batch, progress)

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        head = SimpleNamespace(logits=student.distillation_logits)
        return self.of_token.distill(head, teacher, batch, progress)


def wrong_student(found: str) -> str:
    return (
        f"DeiTToken needs a student that answers cls_logits and distillation_logits, and {found}: load it as "
        f"{' or '.join(TWO_HEADS.values())}, or use KD, which trains any classifier"
    )
