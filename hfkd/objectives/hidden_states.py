"""Hidden states, layer by layer (FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351; DistilBERT, arXiv 1910.01108)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hfkd.functional import at_least_float32
from hfkd.objectives.distillation import checked_choice
from hfkd.objectives.features import (
    FeatureDistillation,
    Layers,
    entries_of,
    even_layers,
    refuse_missing_layers,
    refuse_other_tokens,
    settings_of,
    token_mask,
    token_mean,
    whole_layers,
)
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput, with_entry

LOSSES = ("mse", "cosine")


class HiddenStates(FeatureDistillation):
    """distill_loss = mean over mapped layers and an example's tokens of d(W h_s, h_t); padding never counts.

    d is "mse": (W h_s - h_t)^2, **mean** over the hidden dimension as in TinyBERT's equation 8 (`SelfDistill` sums), or
    "cosine": 1 - cos(W h_s, h_t), as DistilBERT has on its last layer. W is the identity where both hidden sizes are equal;
    otherwise one linear map with a bias per mapped layer, trained with the student (`attached`: it runs inside the student's
    forward) and dropped afterwards. TinyBERT shares one map among layers; one each is a convention of ours, as is the mean
    over layers (TinyBERT sums).

    layers: {student's: teacher's} indices into `hidden_states`, where 0 is the embeddings and n the last of n layers; None
    maps layer k of n to round(k * teacher_layers / n), the embeddings too. Note that ViT's last state is not yet normalised.

    student.hidden_states: (batch, tokens, hidden) each. Raises ValueError in `build` for layers that a model does not have,
    and in a step for other token counts: states are compared position by position.
    """

    token_by_token = True
    paper = "1909.10351"
    equation = r"L = (1 - \alpha) \, \mathrm{CE} + \alpha \, \mathrm{mean}_{l, i} \, d(W_l h^s_{l,i}, h^t_{l,i})"

    def __init__(
        self, layers: Layers | None = None, loss: str = "mse", alpha: float = 0.5, label_smoothing: float = 0.0
    ):
        super().__init__(alpha, label_smoothing, needs=("hidden_states",))
        self.loss = checked_choice("loss", loss, LOSSES)
        self.layers = whole_layers(layers)
        self.mapped: dict[int, int] = self.layers or {}

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        if self.alpha == 0:
            return
        depths = settings_of(student_config, teacher_config, "num_hidden_layers")
        widths = settings_of(student_config, teacher_config, "hidden_size")
        self.mapped = self.layers or even_layers(*depths)
        refuse_missing_layers(self.mapped, depths[0] + 1, depths[1] + 1, "hidden state")
        self.attached = Projections(list(self.mapped), *widths) if widths[0] != widths[1] else None

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        theirs = entries_of(teacher, "hidden_states", "teacher", "use a ModelTeacher")
        values = []
        for ours, layer in zip(self.ours(student), self.mapped.values(), strict=True):
            refuse_other_tokens(ours, theirs[layer], 1)
            values.append(token_mean(self.distance(ours, theirs[layer].detach()), token_mask(batch, ours)))
        return torch.stack(values).mean(0)

    def ours(self, student: StudentOutput) -> list[Tensor]:
        """The student's mapped states in the teacher's width."""
        if self.attached is not None:
            advice = "its projections must run inside its forward, which DistillationTrainer sees to"
            return list(entries_of(student, "projected", "student", advice))
        states = entries_of(student, "hidden_states", "student", "call it with output_hidden_states=True")
        return [states[layer] for layer in self.mapped]

    def distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """(batch, tokens, hidden) -> (batch, tokens)."""
        ours, theirs = at_least_float32(ours), at_least_float32(theirs)
        if self.loss == "cosine":
            return 1 - F.cosine_similarity(ours, theirs, dim=-1)
        return (ours - theirs).square().mean(-1)


class Projections(nn.Module):
    """One linear map per mapped layer from the student's width to the teacher's: adds `projected`, a tuple, to its output.

    Drawn from a generator of its own, so that a run with projections draws the same batches and masks as one without.
    """

    def __init__(self, layers: list[int], student_width: int, teacher_width: int):
        super().__init__()
        self.layers = layers
        generator = torch.Generator().manual_seed(0)
        self.maps = nn.ModuleList()
        for _ in layers:
            linear = nn.utils.skip_init(nn.Linear, student_width, teacher_width)
            nn.init.normal_(linear.weight, std=1 / math.sqrt(student_width), generator=generator)
            nn.init.zeros_(linear.bias)
            self.maps.append(linear)

    def forward(self, output: ModelOutput) -> ModelOutput:
        states = getattr(output, "hidden_states", None)
        if states is None:
            return output
        pairs = zip(self.maps, self.layers, strict=True)
        projected = tuple(linear(states[layer].to(linear.weight.dtype)) for linear, layer in pairs)
        return with_entry(output, "projected", projected)
