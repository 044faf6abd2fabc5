"""What the weight of a training example does to a held-out loss one optimizer step later: the meta-gradient of MC-Distil.

Students with parameters p take one step on g(w) = (1 / n) sum_i sum_l w_il grad loss_il(p) and arrive at p'(w). Wanted is
d validation(p') / d w_il. Where the optimizer's step is elementwise in g, with D = -d p' / d g, it is

    -(1 / n) < grad loss_il(p), v >,   v = D * grad validation(p')

the directional derivative of that example's loss along v, so that one forward-mode pass answers all of them. The bilevel
problem is that of Tambat et al. (TMLR 2025, MC-Distil), as its released code has it; this derivation and the engines are
ours, and the tests compare them with steps of torch's own optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Params = dict[str, Tensor]
Losses = Callable[[Params], Tensor]  # parameters -> losses of one micro-batch, of the shape of its weights

ENGINES = ("jvp", "double_backward", "finite_difference", "last_layer")
DISPLACEMENT = 1e-4  # norm of the finite difference; in float32 1e-2 is 17 % off, by kinks of ReLU
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class InnerStep:
    """The optimizer's next step as a function of the gradient, and its derivative; the optimizer itself is not touched.

    Known are SGD (momentum, Nesterov, dampening), Adam and AdamW, each with weight decay, after clipping the gradient norm of
    every student to `max_grad_norm` (0: not at all). Learning rates and moments are those that the optimizer has now.
    students: for each the parameters that it trains, by names that no two students share.

    Raises ValueError for another optimizer, for `amsgrad` and `maximize`, and for parameters that it does not hold.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, students: Sequence[Params], max_grad_norm: float = 0.0):
        self.students = [dict(student) for student in students]
        self.max_grad_norm = max_grad_norm
        self.optimizer = optimizer
        self.kind = kind_of(optimizer)
        held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.params: Params = {name: p for student in self.students for name, p in student.items()}
        if missing := [name for name, p in self.params.items() if id(p) not in held]:
            raise ValueError(f"the optimizer does not hold {', '.join(missing[:5])}, so a look-ahead would not move it")
        self.group = {name: held[id(p)] for name, p in self.params.items()}
        self._before: Params | None = None
        self._had_buffer: set[str] = set()

    def remember(self) -> None:
        """Before a real step that is to serve as the look-ahead."""
        self._before = {name: p.detach().clone() for name, p in self.params.items()}
        self._had_buffer = {name for name in self.params if self._state(name).get("momentum_buffer") is not None}

    @property
    def before(self) -> Params:
        if self._before is None:
            raise RuntimeError("call remember() before the step")
        return self._before

    def after(self, params: Params, grads: Params) -> Params:
        """The parameters after the step; differentiable in `grads`."""
        clipped: Params = {}
        for student in self.students:
            factor, _ = self._clip(student, grads)
            clipped |= {name: self._scaled(grads[name], factor) for name in student if name in grads}
        return {name: self._moved(name, params[name], gradient) for name, gradient in clipped.items()}

    def pull_back(self, params: Params, grads: Params, outer: Params, *, stepped: bool = False) -> Params:
        """v = -(d p' / d g)^T outer, for gradients before clipping.

        params: before the step. stepped: the optimizer has taken the step already (`remember` was called before it).
        """
        direction: Params = {}
        for student in self.students:
            factor, norm = self._clip(student, grads)
            names = [name for name in student if name in grads]
            scaled = {
                name: self._diagonal(name, params[name], self._scaled(grads[name], factor), stepped) * outer[name]
                for name in names
            }
            if self.max_grad_norm:  # the factor itself depends on the gradient, where it is below 1
                inner = sum_of((grads[name] * scaled[name]).sum() for name in names) / (norm * (norm + CLIP_EPSILON))
                inner = torch.where(factor < 1, inner, torch.zeros_like(inner))
                scaled = {name: factor * (scaled[name] - grads[name] * inner) for name in names}
            direction |= scaled
        return direction

    # ---- one parameter ----

    def _state(self, name: str) -> Mapping[str, Any]:
        return self.optimizer.state.get(self.params[name], {})

    def _clip(self, student: Params, grads: Params) -> tuple[Tensor, Tensor]:
        """The factor for this student's gradients, as clip_grad_norm_ has it, and their norm (1 without clipping)."""
        if not self.max_grad_norm:  # nobody asks for the norm
            return torch.ones(()), torch.ones(())
        norm = sum_of(grads[name].square().sum() for name in student if name in grads).sqrt()
        return (self.max_grad_norm / (norm + CLIP_EPSILON)).clamp(max=1.0), norm

    def _scaled(self, gradient: Tensor, factor: Tensor) -> Tensor:
        return gradient * factor if self.max_grad_norm else gradient  # no pass over large embeddings for nothing

    def _moved(self, name: str, param: Tensor, gradient: Tensor) -> Tensor:
        group = self.group[name]
        if self.kind == "sgd":
            gradient = gradient + group["weight_decay"] * param
            buffer, momentum = self._state(name).get("momentum_buffer"), group["momentum"]
            velocity = gradient
            if momentum and buffer is not None:
                velocity = momentum * buffer + (1 - group["dampening"]) * gradient
            return param - group["lr"] * (gradient + momentum * velocity if group["nesterov"] else velocity)
        if self.kind == "adamw":
            param = param * (1 - group["lr"] * group["weight_decay"])
        else:
            gradient = gradient + group["weight_decay"] * param
        step, mean, square = self._moments(name, gradient, stepped=False)
        beta1, beta2 = group["betas"]
        deviation = (
            (square / (1 - beta2**step)).clamp(min=torch.finfo(square.dtype).tiny).sqrt()
        )  # sqrt'(0) is infinite
        return param - group["lr"] * mean / (1 - beta1**step) / (deviation + group["eps"])

    def _moments(self, name: str, gradient: Tensor, stepped: bool) -> tuple[Tensor | float, Tensor, Tensor]:
        """Adam's after the step: their number, the mean and the mean square, before the corrections."""
        state = self._state(name)
        if stepped:
            return state["step"].to(gradient.device), state["exp_avg"], state["exp_avg_sq"]
        (beta1, beta2), nothing = self.group[name]["betas"], torch.zeros_like(gradient)
        mean = beta1 * state.get("exp_avg", nothing) + (1 - beta1) * gradient
        square = beta2 * state.get("exp_avg_sq", nothing) + (1 - beta2) * gradient.square()
        return (state["step"].to(gradient.device) + 1 if "step" in state else 1.0), mean, square

    def _diagonal(self, name: str, param: Tensor, gradient: Tensor, stepped: bool) -> Tensor | float:
        """-d p' / d g for the clipped gradient g."""
        group = self.group[name]
        lr = group["lr"]
        if self.kind == "sgd":
            had = name in self._had_buffer if stepped else self._state(name).get("momentum_buffer") is not None
            passed = 1 - group["dampening"] if group["momentum"] and had else 1.0
            return lr * (1 + group["momentum"] * passed if group["nesterov"] else passed)
        if self.kind == "adam":
            gradient = gradient + group["weight_decay"] * param
        step, mean, square = self._moments(name, gradient, stepped)
        beta1, beta2 = group["betas"]
        deviation = (square / (1 - beta2**step)).sqrt()
        whole = deviation + group["eps"]
        corrected = mean / (1 - beta1**step)
        bend = corrected * (1 - beta2) * gradient / ((1 - beta2**step) * deviation * whole.square())
        bend = torch.where(deviation == 0, torch.zeros_like(bend), bend)  # 0 / 0 where the gradient was always 0
        return lr * ((1 - beta1) / (1 - beta1**step) / whole - bend)


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """ "sgd", "adam" or "adamw". Raises ValueError for an optimizer whose step is not known here."""
    groups = optimizer.param_groups
    if odd := [name for name in ("amsgrad", "maximize") if any(group.get(name) for group in groups)]:
        raise ValueError(f"the look-ahead does not know {' and '.join(odd)}: leave it off, or give fixed weights")
    if isinstance(optimizer, torch.optim.SGD):
        return "sgd"
    if isinstance(optimizer, torch.optim.Adam):  # torch's AdamW is a subclass
        decoupled = isinstance(optimizer, torch.optim.AdamW) or groups[0].get("decoupled_weight_decay", False)
        return "adamw" if decoupled else "adam"
    raise ValueError(
        f"the look-ahead repeats one step of the students' optimizer, and knows SGD, Adam and AdamW, not "
        f"{type(optimizer).__name__}: choose --optim sgd or adamw_torch, or give the students fixed weights"
    )


# ---- the engines ----


@dataclass
class TrainingLoss:
    """The training side of one meta step, in micro-batches: the students minimise sum(weights * losses(p)) / units.

    units: how many examples the step has over all micro-batches and processes. add: sums a dict over processes.
    """

    losses: Sequence[Losses]
    weights: Sequence[Tensor]
    units: Tensor | float
    add: Callable[[Params], Params] = lambda values: values

    def gradient(self, params: Params, *, differentiable: bool = False) -> Params:
        """Summed over micro-batches and processes; `differentiable` in this process's weights."""
        leaves = params if differentiable else leaves_of(params)
        total: Params = {}
        for losses, weights in zip(self.losses, self.weights, strict=True):
            value = (weights * losses(leaves)).sum() / self.units
            found = gradients(value, leaves, create_graph=differentiable)
            total = {name: total[name] + found[name] for name in found} if total else found
        if not differentiable:
            return self.add(total)
        summed = self.add({name: value.detach() for name, value in total.items()})
        return {name: total[name] + (summed[name] - total[name].detach()) for name in total}  # others' are constants


def weight_gradients(
    engine: str, training: TrainingLoss, validation: Callable[[Params], Tensor], params: Params, step: InnerStep
) -> list[Tensor]:
    """d validation(p'(w)) / d w for each micro-batch, of the shape of its weights; p' is looked ahead to, nothing moves.

    engine: "jvp" (one forward-mode pass), "finite_difference" (one forward pass more, with an error of up to a few percent),
    or "double_backward" (the reference: backward through the gradient). params: what moves; "last_layer" is "jvp" with the
    last layer alone in there. validation: parameters -> this process's part of a sum over processes.
    Raises ValueError for another engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"the engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "double_backward":
        return _twice_backward(training, validation, params, step)
    grads = training.gradient(params)
    with torch.no_grad():
        moved = step.after(params, grads)
    outer = outer_gradient(validation, moved, training.add)
    with torch.no_grad():
        direction = step.pull_back(params, grads, outer)
    return along(engine, training, params, direction)


def outer_gradient(
    validation: Callable[[Params], Tensor], params: Params, add: Callable[[Params], Params] = lambda values: values
) -> Params:
    leaves = leaves_of(params)
    return add(gradients(validation(leaves), leaves))


def along(engine: str, training: TrainingLoss, params: Params, direction: Params) -> list[Tensor]:
    """-(1 / units) of the losses' derivatives along `direction`, for each micro-batch."""
    derivative = difference_along if engine == "finite_difference" else derivative_along
    return [-derivative(losses, params, direction) / training.units for losses in training.losses]


def derivative_along(losses: Losses, params: Params, direction: Params) -> Tensor:
    with torch.no_grad(), forward_ad.dual_level():  # no graph; torch.func.jvp does the same and takes a fifth longer
        moving = {name: forward_ad.make_dual(params[name].detach(), value) for name, value in direction.items()}
        found = losses(moving)
        tangent = forward_ad.unpack_dual(found).tangent
        return torch.zeros_like(found) if tangent is None else tangent


@torch.no_grad()
def difference_along(losses: Losses, params: Params, direction: Params) -> Tensor:
    norm = sum_of(value.double().square().sum() for value in direction.values()).sqrt()
    size = DISPLACEMENT / norm.clamp(min=torch.finfo(torch.float32).tiny)
    moved = {name: (params[name].double() + size * value).to(params[name].dtype) for name, value in direction.items()}
    start = losses({name: params[name] for name in direction})
    return (losses(moved) - start) / size.to(start.dtype)


def _twice_backward(
    training: TrainingLoss, validation: Callable[[Params], Tensor], params: Params, step: InnerStep
) -> list[Tensor]:
    leaves = leaves_of(params)
    weights = [given.detach().requires_grad_() for given in training.weights]
    watched = TrainingLoss(training.losses, weights, training.units, training.add)
    moved = step.after(leaves, watched.gradient(leaves, differentiable=True))
    outer = outer_gradient(validation, moved, training.add)
    value = sum_of((moved[name] * outer[name]).sum() for name in moved)  # the chain rule's outer factor is a constant
    return list(torch.autograd.grad(value, weights))


def leaves_of(params: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def gradients(value: Tensor, params: Params, create_graph: bool = False) -> Params:
    """0 for a parameter that the value does not depend on (a student whose weights are all 0, say)."""
    found = torch.autograd.grad(
        value, list(params.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(params, found, strict=True))


def sum_of(values: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()
