"""Relations between the examples of a batch (Park et al. 2019, arXiv 1904.05068)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkd.functional import at_least_float32, masked_mean
from hfkd.objectives.distillation import checked_choice, checked_weight
from hfkd.objectives.features import FeatureDistillation, entries_of, token_mask
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput

FEATURES = ("cls", "mean", "logits")


class RelationalKD(FeatureDistillation):
    """distill_loss = distance_weight * RKD-D + angle_weight * RKD-A, both with Huber's loss l (delta = 1).

    RKD-D: mean over pairs of l(|f_i - f_j| / m_s, |g_i - g_j| / m_t), m the mean distance of the batch's pairs.
    RKD-A: mean over triples of l(cos of the angle at i between j and k), of the student's features f and the teacher's g.

    As in the authors' code (read), the means run over all batch^2 pairs and batch^3 triples, also those with i = j, which
    cost 0, so that the loss falls a little in small batches. Example i's value is the mean over its pairs and over the
    triples with the angle at i: the mean over examples is the authors' loss. The weights 1 : 2 are theirs for embeddings
    (their README; 25 : 50 for classifiers is the paper's as remembered, not verified). Widths may differ.

    Every micro-batch is a batch of its own (`batch_coupled`): gradient accumulation and more processes change the loss; a
    batch of one costs 0. Memory grows with batch^2 * width and batch^3.

    feature: "cls", the first token (padding, where a tokenizer pads on the left), or "mean", over tokens, of the last
    hidden state, (batch, tokens, hidden); or "logits", (batch, num_labels). Raises ValueError for a weight that is
    negative or not finite, for token heads with "logits", and for feature maps of convolutions without.
    """

    paper = "1904.05068"
    equation = (
        r"L = (1 - \alpha) \, \mathrm{CE} + \alpha \, (w_d \, l(\psi_D(f), \psi_D(g)) + w_a \, l(\psi_A(f), \psi_A(g)))"
    )

    def __init__(
        self,
        distance_weight: float = 1.0,
        angle_weight: float = 2.0,
        feature: str = "cls",
        alpha: float = 0.5,
        label_smoothing: float = 0.0,
    ):
        super().__init__(alpha, label_smoothing, needs=() if feature == "logits" else ("hidden_states",))
        self.distance_weight = checked_weight("distance_weight", distance_weight)
        self.angle_weight = checked_weight("angle_weight", angle_weight)
        self.feature = checked_choice("feature", feature, FEATURES)
        self.batch_coupled = alpha > 0 and distance_weight + angle_weight > 0

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        ours = self.features(student, "student", batch)
        theirs = self.features(teacher, "teacher", batch).detach()
        (our_distances, our_angles), (their_distances, their_angles) = relations(ours), relations(theirs)
        distance = F.smooth_l1_loss(our_distances, their_distances, reduction="none").mean(1)
        angle = F.smooth_l1_loss(our_angles, their_angles, reduction="none").mean((1, 2))
        return self.distance_weight * distance + self.angle_weight * angle

    def features(self, output: StudentOutput | TeacherOutput, whose: str, batch: Batch) -> Tensor:
        """(batch, width)."""
        if self.feature == "logits":
            if output.logits is None or output.logits.dim() != 2:
                shape = None if output.logits is None else tuple(output.logits.shape)
                raise ValueError(f"feature='logits' needs logits (batch, num_labels), the {whose} answered {shape}")
            return at_least_float32(output.logits)
        advice = "use a model that returns them, or feature='logits'"
        last = at_least_float32(entries_of(output, "hidden_states", whose, advice)[-1])
        if last.dim() != 3:
            raise ValueError(
                f"feature={self.feature!r} needs hidden states (batch, tokens, hidden), the {whose} answered "
                f"{tuple(last.shape)}, as networks of convolutions do: {advice}"
            )
        view = "teacher_" if whose == "teacher" else ""  # two tokenizers are two masks
        return last[:, 0] if self.feature == "cls" else masked_mean(last, token_mask(batch, last, view))


def relations(features: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, width) -> distances over their mean, (batch, batch), and cosines, (batch, batch, batch), the angle at the first.

    Equal features have distance 0 and direction 0, without a gradient: that of a root or a unit vector is infinite there.
    """
    differences = features.unsqueeze(0) - features.unsqueeze(1)  # [i, j] = f_j - f_i
    squared = differences.square().sum(-1)
    apart = squared > 0
    lengths = torch.where(apart, squared, torch.ones_like(squared)).sqrt()
    directions = differences * (apart / lengths).unsqueeze(-1)
    distances = lengths * apart
    pairs = len(features) * (len(features) - 1)
    mean = distances.sum() / max(pairs, 1)
    return distances / torch.where(mean > 0, mean, torch.ones_like(mean)), directions @ directions.transpose(1, 2)
