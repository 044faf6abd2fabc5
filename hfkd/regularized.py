"""Regularised fine-tuning: the baselines that Lee et al. (arXiv 2210.02871) compare self-distillation with.

RecAdam is an optimizer that recalls the start weights, MARS a callback that keeps the weights in a ball around them,
R3F an objective (with a model that answers a clean and a noisy view) that asks for the same answer under tiny noise.

RecAdam(recall_groups(model, weight_decay=0.01), lr=1e-5)
MARS(model, bound=8.0)
DistillationTrainer(noisy_model("roberta-base", num_labels=4), ..., objective=R3F())

Which settings Lee et al. chose for each is not known to us, and is left to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from hfkd.functional import at_least_float32, kl_divergence
from hfkd.objectives import CrossEntropy
from hfkd.outputs import Batch, Counts, Progress, TeacherOutput, Terms

NOISES = ("uniform", "normal")


def encoder_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The trainable parameters that were pre-trained, under their names in the whole model; the rest is the fresh head.

    Raises TypeError for anything but a transformers model, because only those tell their encoder from their head.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers PreTrainedModel, got {type(model).__name__}: its base_model tells the encoder from "
            "the fresh head, and a wrapper (PEFT, DDP) hides it"
        )
    encoder = {id(parameter) for parameter in model.base_model.parameters()}
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if id(parameter) in encoder and parameter.requires_grad}


# ---- RecAdam ----


def task_weight(step: int, k: float, t0: float) -> float:
    """lambda(t) = 1 / (1 + exp(-k (t - t0))), RecAdam's weight of the task at optimizer step `step`, counted from 1."""
    exponent = k * (step - t0)
    if exponent >= 0:
        return 1 / (1 + math.exp(-exponent))
    return math.exp(exponent) / (1 + math.exp(exponent))  # math.exp overflows above 709, and a steep k gets there


def decays_matrices(name: str, parameter: nn.Parameter) -> bool:
    """Only tensors of two or more dimensions, as in `Trainer` for BERT and RoBERTa."""
    return parameter.ndim > 1


def recall_groups(
    model: PreTrainedModel,
    weight_decay: float = 0.0,
    decays: Callable[[str, nn.Parameter], bool] = decays_matrices,
) -> list[dict[str, Any]]:
    """Parameter groups for `RecAdam`: the encoder recalls its present weights, the fresh head does not.

    `decays` says of a parameter, by its name in the whole model, whether it decays. Call it on the start weights.
    """
    encoder = {id(parameter) for parameter in encoder_parameters(model).values()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in encoder, decays(name, parameter)), []).append(parameter)
    return [
        {"params": parameters, "recall": recall, "weight_decay": weight_decay if decayed else 0.0}
        for (recall, decayed), parameters in groups.items()
    ]


class RecAdam(torch.optim.Optimizer):
    """AdamW that shifts from recalling the start weights to the task (Chen et al., EMNLP 2020, arXiv 2004.12651).

    With the gradient g_t of the task loss, t = 1, 2, ... counted per parameter, and everything at theta_{t-1}:

        m_t = b1 m_{t-1} + (1 - b1) g_t              v_t = b2 v_{t-1} + (1 - b2) g_t^2
        a_t = (m_t / (1 - b1^t)) / (sqrt(v_t / (1 - b2^t)) + eps)
        lambda(t) = 1 / (1 + exp(-k (t - t0)))
        theta_t = theta_{t-1} - lr [lambda(t) a_t + (1 - lambda(t)) gamma (theta_{t-1} - start) + weight_decay theta_{t-1}]

    which descends lambda(t) L + (1 - lambda(t)) (gamma / 2) ||theta - start||^2 with the quadratic part kept out of
    Adam's preconditioner. Parameters without a start (the fresh classifier) have lambda = 1 and no recall: plain
    `torch.optim.AdamW`. Gradient clipping and loss scaling touch the task's gradient only; the logged loss is L.

    Read in the authors' RecAdam.py, run_glue_with_RecAdam.py and README: the loss, the schedule, the parts outside the
    preconditioner, the defaults gamma = 5000, k = 0.5, t0 = 250 (they search k in 0.05 ... 1, t0 in 100 ... 1000). The
    paper's own listing was not. Two differences, on purpose, so that the baseline differs from AdamW by the method
    alone: their code applies Adam, recall and decay one after another (a difference of the order lr^2 gamma), and adds
    eps before the bias correction of v, as the AdamW of transformers once did. And their script begins at **random**
    weights unless told otherwise, and recalls the pre-trained ones; with `recall=True` training begins at the start.

    Start values come with a parameter group: `recall=True` copies its parameters when the group is added, `start=[...]`
    gives them, one tensor per parameter (for training that begins elsewhere). They live in the optimizer's state, which
    `state_dict` saves: resuming restores the original start although the weights at construction are the resumed
    ones. Costs one copy of the recalled weights, in the parameters' dtype. Not tried with FSDP or DeepSpeed, which shard
    parameters after the copy.

    lr * gamma * (1 - lambda) is the part of the way back to the start that one step goes: above 1 it overshoots, above
    2 it diverges, and `step` raises ValueError. gamma = 5000 goes with lr of about 1e-5 (0.05); with lr = 1e-3 it is 5.
    `lr` has no default, because `Trainer` does not hand `learning_rate` to an `optimizer_cls_and_kwargs`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 5000.0,
        k: float = 0.5,
        t0: float = 250.0,
        recall: bool = False,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gamma": gamma,
            "k": k,
            "t0": t0,
            "recall": recall,
        }
        super().__init__(params, defaults)
        if not any(group["recall"] for group in self.param_groups):
            raise ValueError(
                "no parameter group has recall=True or start=[...], so this would be plain AdamW: pass "
                "recall_groups(model) as params, or use torch.optim.AdamW"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group = dict(param_group)  # the caller's keeps its start, and can make a second optimizer
        start = param_group.pop("start", None)
        _check_recadam_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["recall"] = group["recall"] or start is not None
        if not group["recall"]:
            return
        start = group["params"] if start is None else start
        for parameter, value in zip(group["params"], _checked_start(group, start), strict=True):
            # A copy in any case: `start` may be the parameters themselves, or tensors that somebody trains on
            self.state[parameter]["start"] = torch.empty_like(parameter).copy_(value.detach())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            missing = [index for index in group["params"] if "start" not in state_dict["state"].get(index, {})]
            if "recall" not in group or (group["recall"] and missing):
                raise ValueError(
                    f"the optimizer state has no start weights for {len(missing)} recalled parameters, so nothing would "
                    "be recalled: it was not saved by RecAdam"
                )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, lr, recall = self.state[parameter], float(group["lr"]), group["recall"]
        t = state["step"] = state.get("step", 0) + 1
        weight = task_weight(t, group["k"], group["t0"]) if recall else 1.0
        rate = _recall_rate(lr, group["gamma"], weight) if recall else 0.0
        direction = _adam_direction(parameter, state, group["betas"], group["eps"])
        # A difference, not a blend of parameter and start: a parameter at its start stays there to the last bit
        pull = parameter - state["start"] if recall else None
        parameter.mul_(1 - lr * group["weight_decay"])
        if pull is not None:
            parameter.add_(pull, alpha=-rate)
        parameter.add_(direction, alpha=-lr * weight)


def _check_recadam_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "gamma", "k"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"RecAdam's {name} must be finite and not negative, got {group[name]}")
    if not math.isfinite(group["t0"]):
        raise ValueError(f"RecAdam's t0 must be a finite number of optimizer steps, got {group['t0']}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"RecAdam's betas must lie in [0, 1), got {group['betas']}")


def _checked_start(group: dict[str, Any], start: Iterable[Tensor]) -> list[Tensor]:
    values = list(start)
    shapes = [tuple(value.shape) for value in values]
    expected = [tuple(parameter.shape) for parameter in group["params"]]
    if shapes != expected:
        odd = next((pair for pair in zip(shapes, expected, strict=False) if pair[0] != pair[1]), None)
        raise ValueError(
            f"start must hold one tensor per parameter in the group's order: {len(values)} tensors for {len(expected)} "
            f"parameters, first pair of shapes that differs: {odd}"
        )
    return values


def _adam_direction(parameter: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
    """a_t of the docstring above; moves the two moments."""
    if parameter.grad is None or parameter.grad.is_sparse:
        raise ValueError("RecAdam takes dense gradients only: build the embedding with sparse=False")
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["exp_avg"].lerp_(parameter.grad, 1 - betas[0])
    state["exp_avg_sq"].mul_(betas[1]).addcmul_(parameter.grad, parameter.grad, value=1 - betas[1])
    denominator = (state["exp_avg_sq"] / (1 - betas[1] ** state["step"])).sqrt_().add_(eps)
    return state["exp_avg"] / denominator.mul_(1 - betas[0] ** state["step"])


def _recall_rate(lr: float, gamma: float, weight: float) -> float:
    rate = lr * gamma * (1 - weight)
    if rate > 2:
        raise ValueError(
            f"recall diverges: lr * gamma * (1 - lambda) = {rate:.4g} is above 2 (lr {lr:g}, gamma {gamma:g}, "
            f"1 - lambda {1 - weight:.4g}). Keep lr * gamma below 1: gamma <= {1 / lr:g} at this lr"
        )
    return rate


# ---- MARS ----


def row_distances(weight: Tensor, start: Tensor) -> Tensor:
    """sum_j |W_ij - W0_ij| for each row i, an output unit. (rows, ...) -> (rows,), in float32 or better."""
    return (at_least_float32(weight) - at_least_float32(start)).flatten(1).abs().sum(1)


@torch.no_grad()
def project_rows(weight: Tensor, start: Tensor, bound: float) -> None:
    """In place: W_i <- W0_i + (W_i - W0_i) * min(1, bound / sum_j |W_ij - W0_ij|). Both (rows, ...).

    Rows inside the ball keep their bits; the others end on its surface, up to rounding in the weight's dtype.
    """
    distances = row_distances(weight, start).view(-1, *[1] * (weight.ndim - 1))
    wide_weight, wide_start = at_least_float32(weight), at_least_float32(start)
    scaled = wide_start + (wide_weight - wide_start) * (bound / distances)
    # where, not a Python if: nothing waits for the device. A row at distance 0 divides by 0 and is not taken
    weight.copy_(torch.where(distances > bound, scaled, wide_weight))


class MARS(TrainerCallback):
    """Keeps every weight matrix of the encoder within `bound` of its start, in the maximum absolute row sum norm
    (Gouk, Hospedales, Pontil, ICLR 2021, arXiv 2002.08253: distance-based regularisation by projection).

    Directly after each optimizer step, for every weight matrix W with start W0 and every row i (an output unit):

        W_i <- W0_i + (W_i - W0_i) * min(1, bound / sum_j |W_ij - W0_ij|)

    so that max_i sum_j |W_ij - W0_ij| <= bound. This is the authors' radial rescaling of each row that is too far (read
    in their lipschitz.py), not the Euclidean projection onto an L1 ball, which would set small entries to zero.

    Projected: the encoder's 2-D weights and 4-D convolution kernels (an output channel is a row, as in their code).
    Free: the classifier head, biases, normalisation layers, position and class tokens of other shapes. The authors
    constrain batch normalisation too, which these encoders lack, and the head around 0 with a bound of its own. Embedding
    tables are projected, a row being one token's vector: reconstruction, not verified, because the authors have none.

    `model` must have its start weights when MARS is built: build both before `train(resume_from_checkpoint=...)`, which
    then loads later weights while the start stays here. The start is copied on the model's device and moved to the
    training device once. No bound is right for all sizes, because a row sum grows with the width; the authors search it
    per data set (6.6 in their README, for a ResNet-101). Wants float32 weights (mixed precision is fine): in bfloat16
    the rounding of W is as large as the ball.
    """

    def __init__(self, model: PreTrainedModel, bound: float):
        if not 0 < bound < math.inf:
            raise ValueError(
                f"bound is a largest distance from the start, so it must be positive and finite, got {bound}"
            )
        named = encoder_parameters(model).items()
        self.bound = bound
        self.start = {name: parameter.detach().clone() for name, parameter in named if parameter.ndim in (2, 4)}
        if not self.start:
            raise ValueError(
                f"{type(model).__name__} has no trainable weight matrix in its encoder, so nothing to bound"
            )

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weights = self._weights(model)
        self.start = {name: value.to(weights[name].device) for name, value in self.start.items()}
        farthest = max(float(row_distances(weights[name], value).max()) for name, value in self.start.items())
        if state.global_step == 0 and farthest > self.bound:
            raise ValueError(
                f"the model to train is {farthest:.4g} away from MARS's start before the first step, above the bound "
                f"{self.bound:g}: build MARS from the same weights that the trainer starts from"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weights = self._weights(model)
        for name, start in self.start.items():
            project_rows(weights[name], start, self.bound)

    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """By name, not by reference: the trainer may build its own model (`model_init`)."""
        weights = dict(model.named_parameters())
        odd = [name for name, start in self.start.items() if name not in weights or weights[name].shape != start.shape]
        if odd:
            raise ValueError(
                f"{len(odd)} of {len(self.start)} weights that MARS bounds are missing from the trained model or have another "
                f"shape (sharding does that): {odd[:3]}"
            )
        return weights


# ---- R3F ----


@dataclass
class NoisyOutput(SequenceClassifierOutput):
    """logits, noisy_logits: (batch, num_labels), the answers to the clean and to the noisy embeddings."""

    noisy_logits: Tensor | None = None


class NoisyView:
    """Mixin over a classifier of transformers that in training answers two views in ONE call (DDP and FSDP synchronise one).

    In training mode the batch is doubled: the second half gets noise on its embeddings (before positions, normalisation
    and dropout), uniform in [-noise_size, noise_size] or normal with that standard deviation, at every position. As in
    the authors' code, the noisy half sends no gradient to what makes the embeddings (the rest of the model gets both),
    and the two halves draw **different dropout**: with dropout 0.1 the divergence is mostly the dropout's, with dropout 0
    the noise's alone. In evaluation this is the parent's own forward.

    Labels are not scored in training (there is no `loss`): the R3F objective does it. Noise comes from the global
    generator of the device, like dropout, and not from keys: resuming restores it as it restores dropout. Memory is that
    of twice the batch. Noise of 1e-5 wants float32 embeddings (mixed precision is fine): in bfloat16 it rounds away.

    Saved under the parent's class name, so that the fine-tuned model loads without hfkd.
    """

    def __init__(self, config: Any, *inputs: Any, noise: str = "uniform", noise_size: float = 1e-5, **kwargs: Any):
        if noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
        if not 0 <= noise_size < math.inf:
            raise ValueError(f"noise_size must be finite and not negative, got {noise_size}")
        super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        self.noise = noise
        self.noise_size = noise_size

    def _draw(self, embeddings: Tensor) -> Tensor:
        if self.noise == "normal":
            return torch.randn_like(embeddings) * self.noise_size
        return (torch.rand_like(embeddings) * 2 - 1) * self.noise_size


class NoisyWords(NoisyView):
    """Over a sequence classifier: the noise lies on the word embeddings."""

    positions_skip_padding = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        inputs = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        if not self.training:  # type: ignore[attr-defined]
            inputs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "labels": labels}
            return super().forward(**inputs, **kwargs)  # type: ignore[misc]
        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
            if position_ids is None:
                inputs["position_ids"] = self._position_ids(input_ids)
        if inputs_embeds is None:
            raise ValueError("give input_ids or inputs_embeds")
        half = len(inputs_embeds)
        views = torch.cat([inputs_embeds, inputs_embeds.detach() + self._draw(inputs_embeds)])
        inputs = {name: _twice(tensor, half) for name, tensor in inputs.items()}
        kwargs["return_dict"] = True
        logits = super().forward(inputs_embeds=views, **inputs, **kwargs).logits  # type: ignore[misc]
        return NoisyOutput(logits=logits[:half], noisy_logits=logits[half:])

    def _position_ids(self, input_ids: Tensor) -> Tensor | None:
        """RoBERTa counts positions over real tokens, and cannot see which are real once it is given embeddings."""
        if not self.positions_skip_padding:
            return None
        embeddings = self.base_model.embeddings  # type: ignore[attr-defined]
        return embeddings.create_position_ids_from_input_ids(input_ids, embeddings.padding_idx)


def _twice(tensor: Tensor | None, half: int) -> Tensor | None:
    # Position ids of shape (1, tokens) broadcast over any batch, so they stay as they are
    return tensor if tensor is None or len(tensor) != half else torch.cat([tensor, tensor])


class NoisyPatches(NoisyView):
    """Over an image classifier: the noise lies on the patch embeddings. R3F is about words: a reconstruction by analogy,
    not verified."""

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any):
        super().__init__(config, *inputs, **kwargs)
        self.base_model.embeddings.patch_embeddings.register_forward_hook(self._two_views)  # type: ignore[attr-defined]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not self.training:  # type: ignore[attr-defined]
            return super().forward(pixel_values, labels=labels, **kwargs)  # type: ignore[misc]
        kwargs["return_dict"] = True
        logits = super().forward(torch.cat([pixel_values, pixel_values]), **kwargs).logits  # type: ignore[misc]
        half = len(pixel_values)
        return NoisyOutput(logits=logits[:half], noisy_logits=logits[half:])

    def _two_views(self, module: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor:
        if not self.training:  # type: ignore[attr-defined]
            return embeddings
        clean = embeddings[: len(embeddings) // 2]
        return torch.cat([clean, clean.detach() + self._draw(clean)])


class RobertaForSequenceClassification(NoisyWords, transformers.RobertaForSequenceClassification):
    positions_skip_padding = True


class XLMRobertaForSequenceClassification(NoisyWords, transformers.XLMRobertaForSequenceClassification):
    positions_skip_padding = True


class BertForSequenceClassification(NoisyWords, transformers.BertForSequenceClassification):
    pass


class ViTForImageClassification(NoisyPatches, transformers.ViTForImageClassification):
    pass


NOISY_VIEWS: dict[str, Any] = {
    "roberta": RobertaForSequenceClassification,
    "xlm-roberta": XLMRobertaForSequenceClassification,
    "bert": BertForSequenceClassification,
    "vit": ViTForImageClassification,
}


def noisy_model(name_or_path: str, noise: str = "uniform", noise_size: float = 1e-5, **kwargs: Any) -> Any:
    """Load a classifier of texts or images (Hub id or folder) that the R3F objective can train, in float32.

    `kwargs` are those of `from_pretrained` (num_labels, revision, ...; `config`, where the weights are another
    architecture's, a ViT-MAE's encoder say). Raises ValueError for an architecture without a noisy form.
    """
    config = kwargs.get("config") or transformers.AutoConfig.from_pretrained(name_or_path, **kwargs)
    model_type = config.model_type
    if model_type not in NOISY_VIEWS:
        raise ValueError(
            f"{name_or_path} is a {model_type!r} model; R3F has a noisy form for {', '.join(NOISY_VIEWS)} (a new one is "
            "two lines in hfkd/regularized.py)"
        )
    # A bfloat16 checkpoint would round the noise away
    settings = {"dtype": torch.float32, "use_safetensors": True, **kwargs}
    return NOISY_VIEWS[model_type].from_pretrained(name_or_path, noise=noise, noise_size=noise_size, **settings)


class R3F(CrossEntropy):
    """task_loss = -log p_y, smoothness_loss = weight * [KL(p || q) + KL(q || p)] (Aghajanyan et al., arXiv 2008.03156).

    p = softmax(f(e)), q = softmax(f(e + noise)). e are the word embeddings (of images the patch embeddings); the noise is
    drawn by the model (see `NoisyView`), which must be one of `noisy_model`. Gradients flow through p and q. The equation,
    weight 1, uniform noise of size 1e-5 and the mean over examples were read in the authors' sentence_prediction_r3f.py
    (fairseq). Label smoothing is an option of ours. For the same idea without noise, dropout alone, see R-Drop.

    student.logits, student.noisy_logits: (batch, num_labels). A unit of smoothness is an example, labelled or not.
    """

    paper = "2008.03156"
    equation = r"L = -\log p_y + \lambda \left[ \mathrm{KL}(p \| q) + \mathrm{KL}(q \| p) \right]"

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0):
        super().__init__(label_smoothing)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be finite and not negative, got {weight}")
        self.weight = weight

    def forward(
        self,
        student: ModelOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        noisy_logits = getattr(student, "noisy_logits", None)
        if noisy_logits is None:
            raise ValueError(
                "R3F needs a model that answers a noisy view in training: hfkd.regularized.noisy_model(...)"
            )
        logits = student["logits"]
        divergence = kl_divergence(noisy_logits, logits) + kl_divergence(logits, noisy_logits)
        return {**super().forward(student, teacher, batch, progress), "smoothness_loss": self.weight * divergence}

    def count(self, batch: Batch) -> Counts:
        labels = batch["labels"]
        return {**super().count(batch), "smoothness_loss": torch.full((), len(labels), device=labels.device)}
