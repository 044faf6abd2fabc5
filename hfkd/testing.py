"""Contract tests and tiny models for people who write their own objective or teacher.

def test_my_objective():
    check_objective(MyObjective(alpha=0.5))
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hfkd.models.two_view import TwoViewOutput
from hfkd.models.two_view_mae import TwoViewImageOutput
from hfkd.objectives.objective import Objective
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput, Terms
from hfkd.teachers import Teacher


@dataclass
class Case:
    """One batch as an objective sees it. `unit_rows` tells for a term which row each unit belongs to, -1 for padding;
    a term that is not named has one unit per row, in order. The other three are what `Objective.build` is given."""

    student: StudentOutput
    teacher: TeacherOutput
    batch: dict[str, Tensor]
    unit_rows: dict[str, Tensor] = field(default_factory=dict)
    problem_type: str | None = None
    student_config: Any = None
    teacher_config: Any = None


CaseOf = Callable[[Tensor], Case]  # from the rows to keep, out of `case.rows` rows


def classification_case(
    rows: Tensor, *, num_labels: int = 5, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Case:
    """Eight examples with logits (rows, num_labels) on both sides and labels (rows,)."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(8, num_labels, generator=generator, dtype=dtype) * scale
    teacher = torch.randn(8, num_labels, generator=generator, dtype=dtype) * scale
    labels = torch.randint(num_labels, (8,), generator=generator)
    return Case(ModelOutput(logits=student[rows]), TeacherOutput(logits=teacher[rows]), {"labels": labels[rows]})


def two_head_case(rows: Tensor, **settings: Any) -> Case:
    """As `classification_case`, from a student with a second head for the teacher (DeiT, LeViT): cls_logits and
    distillation_logits (rows, num_labels), and their mean as logits."""
    case = classification_case(rows, **settings)
    first, second = case.student.logits, case.student.logits.flip(-1)
    heads = {"cls_logits": first, "distillation_logits": second}
    return replace(case, student=ModelOutput(logits=(first + second) / 2, **heads))


def multi_label_case(rows: Tensor, **settings: Any) -> Case:
    """Eight examples with logits (rows, num_labels) and labels of 0 and 1 of the same shape, as floats."""
    case = classification_case(rows, **settings)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (8, case.student.logits.shape[-1]), generator=generator).float()
    return replace(case, batch={"labels": labels[rows]}, problem_type="multi_label_classification")


def regression_case(rows: Tensor, *, outputs: int = 1, **settings: Any) -> Case:
    """Eight examples with logits (rows, outputs) and labels (rows,) of floats, or (rows, outputs) for several outputs."""
    case = classification_case(rows, num_labels=outputs, **settings)
    labels = torch.randn((8,) if outputs == 1 else (8, outputs), generator=torch.Generator().manual_seed(1))
    return replace(case, batch={"labels": labels[rows]}, problem_type="regression")


def token_case(
    rows: Tensor, *, num_labels: int = 5, tokens: int = 6, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Case:
    """Eight rows of tokens: logits (rows, tokens, num_labels) and labels (rows, tokens), -100 where there is no unit."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 8, tokens, num_labels, generator=generator, dtype=dtype) * scale
    labels = torch.randint(num_labels, (8, tokens), generator=generator)
    labels[torch.rand(8, tokens, generator=generator) < 0.4] = -100
    labels[3] = -100  # a row without a unit
    units = torch.where(labels[rows] == -100, -1, rows[:, None])
    return Case(
        ModelOutput(logits=logits[0][rows]),
        TeacherOutput(logits=logits[1][rows]),
        {"labels": labels[rows]},
        {"task_loss:tokens": units, "distill_loss:tokens": units},
    )


def hidden_case(
    rows: Tensor,
    *,
    width: int = 8,
    teacher_width: int = 8,
    layers: int = 2,
    teacher_layers: int = 2,
    heads: int = 2,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Eight rows of ragged length with logits, labels, attention_mask and, of both models, the hidden states (embeddings
    and one per layer), attention maps and queries, keys and values."""
    tokens, lengths = 7, torch.tensor([7, 3, 5, 7, 4, 6, 1, 7])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    head = classification_case(rows, scale=scale, dtype=dtype)
    answers: list[dict[str, Any]] = []
    configs = []
    for seed, size, depth in ((0, width, layers), (1, teacher_width, teacher_layers)):
        draw = _Inside(torch.Generator().manual_seed(seed), mask, rows, scale, dtype)
        answers.append(
            {
                "hidden_states": tuple(draw.states(size) for _ in range(depth + 1)),
                "attentions": tuple(draw.maps(heads) for _ in range(depth)),
                "qkv": tuple((draw.states(size), draw.states(size), draw.states(size)) for _ in range(depth)),
            }
        )
        configs.append(
            SimpleNamespace(num_hidden_layers=depth, hidden_size=size, num_attention_heads=heads, num_labels=5)
        )
    return replace(
        head,
        student=ModelOutput(logits=head.student.logits, **answers[0]),
        teacher=TeacherOutput(logits=head.teacher.logits, **answers[1]),
        batch={**head.batch, "attention_mask": mask[rows]},
        student_config=configs[0],
        teacher_config=configs[1],
    )


@dataclass
class _Inside:
    """Draws the inside of a model for all eight rows and keeps some of them."""

    generator: torch.Generator
    mask: Tensor
    rows: Tensor
    scale: float
    dtype: torch.dtype

    def states(self, width: int) -> Tensor:
        return self._draw(width)[self.rows]

    def maps(self, heads: int) -> Tensor:
        scores = self._draw(heads, self.mask.shape[1]).transpose(1, 2)
        return scores.masked_fill(self.mask[:, None, None] == 0, -torch.inf).softmax(-1)[self.rows]

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*self.mask.shape, *shape, generator=self.generator, dtype=self.dtype) * self.scale


def two_view_case(rows: Tensor, *, width: int = 6, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Case:
    """Eight rows of ragged length with masked positions, as `MaskedLMCollator` and the two-view models give them."""
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary = 7, 11
    lengths = torch.tensor([7, 3, 5, 7, 4, 6, 3, 7])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.randint(1, vocabulary, (8, tokens), generator=generator) * mask
    chosen = (torch.rand(8, tokens, generator=generator) < 0.4) & (mask == 1)
    chosen[1] = False  # a row without a masked token
    features = torch.randn(2, 8, tokens, width, generator=generator, dtype=dtype) * scale
    all_logits = torch.randn(8, tokens, vocabulary, generator=generator, dtype=dtype) * scale
    positions = chosen[rows].flatten().nonzero().flatten()
    padding = -len(positions) % 8
    row_of = torch.cat([rows[positions // tokens], torch.full((padding,), -1)])
    labels = torch.cat([ids[rows].flatten()[positions], torch.full((padding,), -100)])
    positions = torch.cat([positions, torch.zeros(padding, dtype=torch.long)])
    token_rows = torch.where(mask[rows] == 1, rows[:, None], -1)
    return Case(
        TwoViewOutput(logits=all_logits[rows].flatten(0, 1)[positions], features=features[0][rows]),
        TeacherOutput(features=features[1][rows]),
        {
            "input_ids": ids[rows],
            "clean_input_ids": ids[rows],
            "attention_mask": mask[rows],
            "masked_positions": positions,
            "masked_labels": labels,
        },
        {"pretrain_loss": row_of, "distill_loss:tokens": token_rows},
    )


def masked_image_case(rows: Tensor, *, width: int = 6, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Case:
    """Eight images of 3 x 4 x 4 pixels in four patches, three of them hidden, as the two-view ViT-MAE and its teacher
    answer them."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, 3, 4, 4, generator=generator)
    noise = torch.rand(8, 4, generator=generator).argsort(1) / 4
    logits = torch.randn(2, 8, 4, 12, generator=generator, dtype=dtype) * scale
    features = torch.randn(2, 8, 5, width, generator=generator, dtype=dtype) * scale
    config = tiny_vit_mae_config(image_size=4, patch_size=2, hidden_size=width)
    student = TwoViewImageOutput(
        logits=logits[0][rows],
        mask=(noise[rows] > 0).float(),
        features=features[0][rows],
        weight_distance=torch.tensor(scale, dtype=dtype),
    )
    return Case(
        student,
        TeacherOutput(logits=logits[1][rows], features=features[1][rows]),
        {"pixel_values": pixels[rows], "noise": noise[rows]},
        {"distill_loss:tokens": rows[:, None].expand(-1, 5)},
        student_config=config,
        teacher_config=config,
    )


def check_objective(
    objective: Objective,
    case_of: Callable[..., Case] = classification_case,
    *,
    zero_at_teacher: bool = True,
    expected_zero: str = "distill_loss",
) -> None:
    """Raise AssertionError, with a sentence, where an objective breaks the contract.

    case_of(rows, scale=, dtype=): builds the batch with only these of its eight rows. `build` is called with what the
    case says of the two models; what the objective trains (`attached`) runs on the student's output as in a trainer.
    An objective that was not fitted (a buffer whose name ends in `_` is None) is fitted to random answers about all classes.
    zero_at_teacher=False: for methods in which a student equal to its teacher still has something to learn.
    """
    everything = torch.arange(8)
    _check_hyper_parameters(objective)
    case = case_of(everything)
    objective.build(case.student_config, case.teacher_config, case.problem_type)
    _fit(objective, case)
    terms = _score(objective, case)
    assert terms, "forward returned no terms"
    counts = objective.count(case.batch)
    for name, values in terms.items():
        assert name.endswith("_loss"), f"term {name!r} must end in '_loss'"
        units = _unit_rows(case, name, values, everything)
        assert values.shape == units.shape, (
            f"{name}: {tuple(values.shape)} values for {tuple(units.shape)} units: do not reduce"
        )
        assert name in counts, f"count() has no entry for {name}"
        assert int(counts[name]) == int((units >= 0).sum()), f"{name}: count() says {int(counts[name])} units"
        assert bool((values[units < 0] == 0).all()), f"{name}: padding must contribute 0"
        assert bool(torch.isfinite(values).all()), f"{name} is not finite"
    again = _score(objective, case_of(everything))
    assert all(torch.equal(terms[name], again[name]) for name in terms), "two calls gave different values"
    _check_columns(objective, case, terms)
    _check_halves(objective, case_of, terms)
    _check_gradients(objective, case_of)
    _check_extremes(objective, case_of)
    # A student that needs a projection cannot equal its teacher
    if zero_at_teacher and "teacher" in objective.needs and objective.attached is None:
        _check_zero_at_teacher(objective, case, expected_zero)


def _score(objective: Objective, case: Case) -> Terms:
    teacher = case.teacher if "teacher" in objective.needs else None
    student = case.student
    if objective.attached is not None:
        student = copy.deepcopy(objective.attached).to(student.logits.dtype)(copy.copy(student))
    return objective(student, teacher, case.batch, Progress(step=1, max_steps=10))


def _fit(objective: Objective, case: Case) -> None:
    unfitted = any(value is None and name.endswith("_") for name, value in objective._buffers.items())
    if unfitted and case.teacher.logits is not None:
        classes = case.teacher.logits.shape[-1]
        labels = torch.arange(4 * classes) % classes
        logits = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(2))
        objective.fit(logits + 2 * torch.eye(classes)[labels], labels)


def _unit_rows(case: Case, name: str, values: Tensor, rows: Tensor) -> Tensor:
    if values.dim() == 2:
        name = f"{name}:tokens"
    return case.unit_rows.get(name, rows)


def _check_hyper_parameters(objective: Objective) -> None:
    for name in inspect.signature(type(objective).__init__).parameters:
        if name not in ("self", "args", "kwargs"):
            assert hasattr(objective, name), f"__init__ must store {name!r} under its own name"


def _check_columns(objective: Objective, case: Case, terms: Terms) -> None:
    """The trainer keeps the declared columns only."""
    try:
        columns = {name: case.batch[name] for name in objective.columns if name in case.batch}
        declared = _score(objective, replace(case, batch=columns))
    except KeyError as error:
        raise AssertionError(f"forward reads {error}, but columns is {objective.columns}") from error
    same = all(name in declared and torch.equal(terms[name], declared[name]) for name in terms)
    assert same, f"the values change when the batch has no other columns than {objective.columns}: extend columns"


def _check_halves(objective: Objective, case_of: Callable[..., Case], terms: Terms) -> None:
    """Permuting rows does not catch a batch-coupled loss; removing half of them does."""
    everything, half = torch.arange(8), torch.tensor([0, 1, 4, 6])
    whole_case, half_case = case_of(everything), case_of(half)
    coupled = False
    for name, values in _score(objective, half_case).items():
        units = _unit_rows(whole_case, name, terms[name], everything)
        kept = terms[name][torch.isin(units, half)]
        found = values[_unit_rows(half_case, name, values, half) >= 0]
        same = kept.shape == found.shape and torch.allclose(kept, found, rtol=1e-9, atol=1e-12)
        coupled |= not same
        assert same or objective.batch_coupled, (
            f"{name} changes when half of the batch is removed: batch_coupled is False"
        )
    assert coupled or not objective.batch_coupled, "batch_coupled is True, but no value depends on the other rows"


def _check_gradients(objective: Objective, case_of: Callable[..., Case]) -> None:
    case = case_of(torch.arange(8))
    for output in (case.student, case.teacher):
        for tensor in _tensors(output):
            tensor.requires_grad_(True)
    total = torch.stack([values.sum() for values in _score(objective, case).values()]).sum()
    assert total.requires_grad, "no gradient reaches the student"
    total.backward()
    gradients = [tensor.grad for tensor in _tensors(case.student) if tensor.grad is not None]
    assert gradients, "no gradient reaches the student"
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients), "a gradient is not finite"
    assert all(tensor.grad is None for tensor in _tensors(case.teacher)), "a gradient reaches the teacher: detach it"


def _check_extremes(objective: Objective, case_of: Callable[..., Case]) -> None:
    for scale, dtype in ((1e4, torch.float32), (1.0, torch.bfloat16)):
        for name, values in _score(objective, case_of(torch.arange(8), scale=scale, dtype=dtype)).items():
            assert bool(torch.isfinite(values).all()), f"{name} is not finite for {dtype} inputs of size {scale:g}"
            assert values.dtype in (torch.float32, torch.float64), f"{name} is computed in {values.dtype}"


def _check_zero_at_teacher(objective: Objective, case: Case, name: str) -> None:
    student = copy.copy(case.student)
    for entry in ("logits", "features", "hidden_states", "attentions", "qkv"):
        answer = getattr(case.teacher, entry)
        if answer is not None and entry in student:
            student[entry] = answer
    if "distillation_logits" in student:  # the head that learns from the teacher, where there are two
        student["distillation_logits"] = case.teacher.logits
    values = _score(objective, replace(case, student=student))[name]
    assert float(values.detach().abs().max()) < 1e-9, f"{name} is not 0 for a student equal to its teacher"


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else [getattr(output, entry.name) for entry in fields(output)]
    return [value for value in _flat(values) if isinstance(value, Tensor) and value.is_floating_point()]


def _flat(values: Iterable[Any]) -> list[Any]:
    return [part for value in values for part in (_flat(value) if isinstance(value, tuple | list) else [value])]


def check_teacher(teacher: Teacher, batch: Batch) -> None:
    """Raise AssertionError, with a sentence, where a teacher breaks the contract: frozen, deterministic, no gradients,
    and it leaves the batch as it was."""
    before = {name: value.clone() for name, value in batch.items()}
    model = getattr(teacher, "model", None)
    if model is not None:
        model.train()  # whoever switches it to training mode, an answer must come from eval mode
    first, second = teacher(batch, Progress()), teacher(batch, Progress())
    assert _tensors(first), "the teacher answered nothing"
    for one, other in zip(_tensors(first), _tensors(second), strict=True):
        assert not one.requires_grad, "an answer carries gradients"
        assert torch.equal(one, other), "two answers to one batch differ"
    assert batch.keys() == before.keys(), "the teacher changed the batch's columns"
    assert all(torch.equal(before[name], batch[name]) for name in before), "the teacher changed the batch"
    if model is not None:
        assert not any(parameter.requires_grad for parameter in model.parameters()), "the teacher is trainable"
        assert not model.training, "the teacher answers in training mode"


def tiny_roberta_config(**overrides: Any) -> Any:
    """2 layers of width 16, 50 tokens, no dropout: laws about trajectories want none."""
    from transformers import RobertaConfig

    settings: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return RobertaConfig(**{**settings, **overrides})


def tiny_vit_mae_config(**overrides: Any) -> Any:
    """2 layers of width 32 over 16 patches of 4 x 4 pixels, a decoder of one layer, normalised pixels, no dropout."""
    from transformers import ViTMAEConfig

    settings: dict[str, Any] = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "norm_pix_loss": True,
    }
    return ViTMAEConfig(**{**settings, **overrides})


def tiny_tokenizer(vocab_size: int = 50) -> Any:
    """A whitespace tokenizer over the words w5, w6, ...; ids 0 to 4 are <s> <pad> </s> <unk> <mask>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = special + [f"w{i}" for i in range(len(special), vocab_size)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        cls_token="<s>",
        sep_token="</s>",
        **names,
    )


def tiny_rows(count: int, *, length: int = 12, vocab_size: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """Random token rows of ragged length with <s> and </s>, as a tokenized dataset's rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        n = int(torch.randint(3, length - 1, (1,), generator=generator))
        ids = [0, *torch.randint(5, vocab_size, (n,), generator=generator).tolist(), 2]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "example_id": i})
    return rows


def __getattr__(name: str) -> Any:
    """`HubServer`, which needs starlette and uvicorn: imported by whoever asks for it."""
    if name == "HubServer":
        from hfkd.hub_server import HubServer

        return HubServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
