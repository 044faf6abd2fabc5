"""The meta-gradient against steps of torch's own optimizers, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import RobertaForSequenceClassification

from hfkd.lookahead import InnerStep, TrainingLoss, along, outer_gradient, weight_gradients
from hfkd.models.cifar_resnet import CifarResNetForImageClassification, cifar_resnet_config
from hfkd.models.student_group import StudentGroup
from hfkd.objectives import Collaboration
from hfkd.testing import tiny_roberta_config

CLASSES, ROWS = 3, 6
# eps: at the first step Adam moves by g / (|g| + eps), and with 1e-8 no difference could be measured
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}),
}
CLIPPED, NOT_CLIPPED = 0.05, 0.0


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def perceptron(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, CLASSES))


class Case:
    """Students that have taken `steps` real steps, a training batch with weights, and a validation batch."""

    def __init__(self, students: list[nn.Module], optimizer: str, clip: float, steps: int, inputs=None):
        self.students, self.clip = nn.ModuleList(students), clip
        kind, fields = OPTIMIZERS[optimizer]
        self.optimizer = kind([{"params": list(student.parameters())} for student in students], **fields)
        shape = (ROWS, 4) if inputs is None else inputs
        self.x, self.y = torch.randn(shape), torch.randint(0, CLASSES, (ROWS,))
        self.x_meta, self.y_meta = torch.randn(shape), torch.randint(0, CLASSES, (ROWS,))
        self.teacher = torch.randn(ROWS, CLASSES)
        self.weights = torch.rand(ROWS, len(students), 2)
        for _ in range(steps):
            self.real_step(self.weights)
            self.weights = torch.rand(ROWS, len(students), 2)

    def losses_of(self, logits):
        """(rows, students, 2): cross-entropy, and T^2 KL to the teacher, written out."""
        found = []
        for one in logits:
            p, q = (one / 2).log_softmax(-1), (self.teacher / 2).softmax(-1)
            found.append(
                torch.stack([F.cross_entropy(one, self.y, reduction="none"), 4 * (q * (q.log() - p)).sum(-1)], -1)
            )
        return torch.stack(found, 1)

    def real_step(self, weights):
        self.optimizer.zero_grad()
        (weights * self.losses_of([student(self.x) for student in self.students])).sum().div(ROWS).backward()
        for student in self.students:
            if self.clip:
                nn.utils.clip_grad_norm_(student.parameters(), self.clip)
        self.optimizer.step()

    def validation_after(self, weights) -> torch.Tensor:
        """What a copy of everything reaches with these weights: torch's own optimizer takes the step."""
        other = copy.deepcopy(self)
        other.real_step(weights)
        return sum(F.cross_entropy(student(self.x_meta), self.y_meta) for student in other.students).detach()

    def measured(self, size: float = 1e-5) -> torch.Tensor:
        """Central differences, one weight after another."""
        found = torch.zeros_like(self.weights)
        for place in range(self.weights.numel()):
            shifted = []
            for sign in (1, -1):
                weights = self.weights.clone()
                weights.view(-1)[place] += sign * size
                shifted.append(self.validation_after(weights))
            found.view(-1)[place] = (shifted[0] - shifted[1]) / (2 * size)
        return found

    # ---- what hfkd is given ----

    def step(self) -> InnerStep:
        named = [
            {f"{k}.{name}": p for name, p in student.named_parameters() if p.requires_grad}
            for k, student in enumerate(self.students)
        ]
        return InnerStep(self.optimizer, named, self.clip)

    def logits(self, params, x):
        buffers = {name: value.clone() for name, value in self.students.named_buffers()}
        fixed = {name: p.detach() for name, p in self.students.named_parameters()}
        state = fixed | buffers | params
        return [
            functional_call(student, {n[2:]: v for n, v in state.items() if n.startswith(f"{k}.")}, (x,))
            for k, student in enumerate(self.students)
        ]

    def computed(self, engine: str, parts: int = 1) -> torch.Tensor:
        step = self.step()
        params = {name: p.detach() for name, p in step.params.items()}

        def validation(params):
            return sum(F.cross_entropy(logits, self.y_meta) for logits in self.logits(params, self.x_meta))

        cuts = torch.arange(ROWS).chunk(parts)
        losses = [lambda params, rows=rows: self.losses_of(self.logits(params, self.x))[rows] for rows in cuts]
        training = TrainingLoss(losses, [self.weights[rows] for rows in cuts], ROWS)
        return torch.cat(weight_gradients(engine, training, validation, params, step))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.abs().max() > 1e-8, "nothing to compare"
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("clip", [NOT_CLIPPED, CLIPPED])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradient_is_that_of_torchs_own_step(optimizer, clip, steps):
    """A look-ahead that is not the optimizer's step teaches the coordinator about students that will never exist."""
    case = Case([perceptron(), perceptron(7)], optimizer, clip, steps)
    expected = case.measured()
    for engine in ("jvp", "double_backward"):
        assert relative(case.computed(engine), expected) < 1e-6, engine
    assert relative(case.computed("jvp"), case.computed("double_backward")) < 1e-10
    assert relative(case.computed("finite_difference"), expected) < 2e-2


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_micro_batches_add_up(optimizer):
    """Gradient accumulation would change what the coordinator learns."""
    case = Case([perceptron()], optimizer, CLIPPED, 2)
    for engine in ("jvp", "double_backward", "finite_difference"):
        assert relative(case.computed(engine, parts=3), case.computed(engine)) < 1e-6


@pytest.mark.parametrize("clip", [NOT_CLIPPED, CLIPPED])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_students_are_judged_one_by_one(optimizer, clip):
    """A student's weights would follow another student's needs."""
    together = Case([perceptron(), perceptron(7), perceptron(3)], optimizer, clip, 2)
    found = together.computed("jvp")
    for k in range(3):
        alone = copy.deepcopy(together)
        alone.students = nn.ModuleList([alone.students[k]])
        alone.weights = together.weights[:, k : k + 1]
        assert relative(alone.computed("jvp"), found[:, k : k + 1]) < 1e-10


@pytest.mark.parametrize("clip", [NOT_CLIPPED, CLIPPED])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_real_step_serves_as_the_look_ahead(optimizer, clip):
    """In the fused order moments and gradients are read after the step; one step late they give other weights."""
    case = Case([perceptron(), perceptron(7)], optimizer, clip, 2)
    expected = case.computed("double_backward")
    step = case.step()
    step.remember()
    other = Case.real_step
    case.clip, clip = NOT_CLIPPED, case.clip
    case.optimizer.zero_grad()
    (case.weights * case.losses_of([student(case.x) for student in case.students])).sum().div(ROWS).backward()
    grads = {name: p.grad.clone() for name, p in step.params.items()}
    case.clip = clip
    other(case, case.weights)
    now = {name: p.detach() for name, p in step.params.items()}
    training = TrainingLoss([lambda params: case.losses_of(case.logits(params, case.x))], [case.weights], ROWS)
    outer = outer_gradient(
        lambda params: sum(F.cross_entropy(z, case.y_meta) for z in case.logits(params, case.x_meta)), now
    )
    with torch.no_grad():
        direction = step.pull_back(step.before, grads, outer, stepped=True)
    (found,) = along("jvp", training, step.before, direction)
    assert relative(found, expected) < 1e-10


@settings(max_examples=30, deadline=None)
@given(
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    clip=st.sampled_from([0.0, 0.1, 100.0]),
    steps=st.integers(0, 3),
    seed=st.integers(0, 10_000),
    size=st.floats(1e-3, 1e3),
)
def test_pulling_back_is_the_transpose_of_stepping(optimizer, clip, steps, seed, size):
    """<d p', u> = -<d g, v> for every direction; where it fails, weights move along something that is no gradient."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    case = Case([perceptron(3)], optimizer, clip, steps)
    step = case.step()
    params = {name: p.detach() for name, p in step.params.items()}
    grads = {name: size * torch.randn_like(p) for name, p in params.items()}
    grads["0.0.bias"] = torch.zeros_like(grads["0.0.bias"])  # an entry that never had a gradient, at the first step
    outer = {name: torch.randn_like(p) for name, p in params.items()}
    leaves = {name: g.clone().requires_grad_() for name, g in grads.items()}
    moved = step.after(params, leaves)
    expected = torch.autograd.grad(sum((moved[n] * outer[n]).sum() for n in moved), list(leaves.values()))
    found = step.pull_back(params, grads, outer)
    for name, value in zip(leaves, expected, strict=True):
        if name == "0.0.bias" and optimizer.startswith("adam") and steps == 0:
            continue  # d/dg of g / (|g| + eps) at 0 is what torch computes by a limit
        torch.testing.assert_close(found[name], -value, rtol=1e-7, atol=1e-10)


def test_a_weight_that_helps_is_raised():
    """With the sign turned round the coordinator would favour what hurts."""
    for seed in range(8):
        torch.manual_seed(seed)
        case = Case([perceptron()], "sgd", NOT_CLIPPED, 0)
        case.optimizer.param_groups[0]["lr"] = 1e-3
        case.x_meta, case.y_meta = case.x[:1], case.y[:1]
        assert case.computed("jvp")[0, 0, 0] < 0


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
@pytest.mark.parametrize("clip", [NOT_CLIPPED, CLIPPED])
def test_networks_of_the_field(optimizer, clip, count):
    """Batch norm couples the examples of a batch, and fused attention has no derivative of its derivative."""
    sizes = ["resnet10-xxxs", "resnet10-xxs", "resnet10-xs"][:count]
    images = StudentGroup(
        {name: CifarResNetForImageClassification(cifar_resnet_config(name, CLASSES)).double().train() for name in sizes}
    )
    config = tiny_roberta_config(
        num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa"
    )
    texts = StudentGroup({f"s{k}": RobertaForSequenceClassification(config).double() for k in range(count)})
    ids = torch.randint(5, config.vocab_size, (2, ROWS, 7))
    for group, batches in (
        (images, [{"pixel_values": torch.randn(ROWS, 3, 8, 8)} for _ in range(2)]),
        (texts, [{"input_ids": one} for one in ids]),
    ):
        for frozen_but_head in (False, True):
            gradients_agree(group, batches, optimizer, clip, frozen_but_head)


def gradients_agree(group, batches, optimizer, clip, frozen_but_head):
    moving = [group.last_layer_of(name) if frozen_but_head else group.parameters_of(name) for name in group.names]
    kind, fields = OPTIMIZERS[optimizer]
    optimizer = kind([{"params": list(one.values())} for one in moving], **fields)
    objective = Collaboration(temperature=2.0)
    objective.meet(group.names)
    labels, teacher = torch.randint(0, CLASSES, (2, ROWS)), torch.randn(ROWS, CLASSES)
    for parameters in moving:  # moments, as after some steps
        for p in parameters.values():
            p.grad = torch.randn_like(p) / 10
    optimizer.step()

    def logits(params, batch):
        state = {name: p.detach() for name, p in group.named_parameters()}
        state |= {name: buffer.clone() for name, buffer in group.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(group, state | params, (), batch).logits

    def validation(params):
        return sum(F.cross_entropy(one, labels[1]) for one in logits(params, batches[1]).unbind(1))

    training = TrainingLoss(
        [lambda params: objective.losses(logits(params, batches[0]), teacher, {"labels": labels[0]})],
        [torch.rand(ROWS, len(group), 2)],
        ROWS,
    )
    step = InnerStep(optimizer, moving, clip)
    params = {name: p.detach() for name, p in step.params.items()}
    before = {name: value.clone() for name, value in group.state_dict().items()}
    found, expected = (
        weight_gradients(engine, training, validation, params, step)[0] for engine in ("jvp", "double_backward")
    )
    assert relative(found, expected) < 1e-9
    (difference,) = weight_gradients("finite_difference", training, validation, params, step)
    assert relative(difference, expected) < 2e-2
    for name, value in group.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed by looking ahead"


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (lambda p: torch.optim.RMSprop(p), "RMSprop"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
    ],
)
def test_an_unknown_step_is_refused(optimizer, says):
    """A look-ahead by another rule than the students' would be no error message, only worse weights."""
    model = perceptron()
    with pytest.raises(ValueError, match=says):
        InnerStep(optimizer(model.parameters()), [dict(model.named_parameters())])


def test_parameters_that_do_not_move_are_refused():
    """A forgotten student would look as if no weight mattered to it."""
    model, other = perceptron(), perceptron()
    with pytest.raises(ValueError, match="does not hold"):
        InnerStep(torch.optim.SGD(other.parameters(), lr=0.1), [dict(model.named_parameters())])
    with pytest.raises(ValueError, match="engine"):
        Case([model], "sgd", 0.0, 0).computed("magic")
