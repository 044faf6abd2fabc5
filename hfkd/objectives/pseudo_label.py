"""Labels from the teacher (pseudo-labels), hard or soft."""

from __future__ import annotations

from torch import Tensor

from hfkd.functional import at_least_float32, cross_entropy
from hfkd.objectives.distillation import Distillation
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput


class PseudoLabel(Distillation):
    """L = (1 - alpha) * CE(y, z_s) + alpha * CE(c, z_s), c the class that the teacher names.

    Bad Models Can Be Good Role Models (arXiv 2203.14649): with `EnsembleTeacher(members, "vote")` this is EPL, with "sample"
    RPL, with "logits" the EPL of the released code. Hard labels and no task term are the code's; the paper's text was not
    at hand (reconstruction, not verified). The pool must not overlap the test data: `hfkd.fingerprint.refuse_shared_rows`.

    soft=False: c is what the teacher answers as `labels`, or else the argmax of its logits.
    soft=True: c is a distribution, softmax(z_t) at temperature 1, or what the teacher answers as probabilities (the shares of
    votes of an `EnsembleTeacher(..., soft=True)`). This is another method than the paper's: what RPL's labels are on average.
    Its gradient is that of KD(temperature=1), which subtracts the teacher's entropy.
    alpha is 1 by default: the method is for unlabelled or wrongly labelled data. A student equal to its teacher still has
    something to learn, confidence, and its loss is not 0 either way.

    student.logits: (batch, num_labels) or (batch, tokens, num_labels); single-label heads only. Raises ValueError for answers
    of another shape, for class ids where probabilities are needed, and for probabilities where class ids are.
    """

    paper = "2203.14649"
    equation = r"L = (1 - \alpha) \, \mathrm{CE}(y, z_s) + \alpha \, \mathrm{CE}(c, z_s)"
    problem_types = ("single_label_classification",)

    def __init__(self, alpha: float = 1.0, label_smoothing: float = 0.0, soft: bool = False):
        super().__init__(alpha, label_smoothing)
        self.soft = soft

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        if teacher.labels is None and teacher.logits is None:
            raise ValueError("the teacher answered neither labels nor logits: use a model with a head, or an ensemble")
        labels = soft_labels(teacher) if self.soft else hard_labels(teacher)
        expected = student.logits.shape if self.soft else student.logits.shape[:-1]
        if labels.shape != expected:
            raise ValueError(
                f"the teacher's labels are {tuple(labels.shape)}, the student's logits {tuple(student.logits.shape)}: both "
                "must have the same labels and, for token heads, the same tokens"
            )
        return cross_entropy(student.logits, labels)


def hard_labels(teacher: TeacherOutput) -> Tensor:
    """(...) class ids: the teacher's labels, or the argmax of its logits (..., num_labels)."""
    if teacher.labels is None:
        assert teacher.logits is not None
        return teacher.logits.argmax(-1)
    if teacher.labels.is_floating_point():
        raise ValueError(
            "the teacher answers probabilities, and these pseudo-labels are hard: PseudoLabel(soft=True), or an "
            "EnsembleTeacher with soft=False"
        )
    return teacher.labels


def soft_labels(teacher: TeacherOutput) -> Tensor:
    """(..., num_labels) probabilities: the teacher's, or the softmax of its logits."""
    if teacher.labels is not None and teacher.labels.is_floating_point():
        return teacher.labels.detach()
    if teacher.logits is None:
        raise ValueError(
            "the teacher answers class ids, and these pseudo-labels are soft: EnsembleTeacher(..., soft=True) answers shares "
            "of votes, or the drawn member's logits"
        )
    return at_least_float32(teacher.logits.detach()).softmax(-1)
