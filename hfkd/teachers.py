"""Where the teacher's answers come from. Frozen, in eval mode, without gradients: here, once, for every kind."""

from __future__ import annotations

import dataclasses
import inspect
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from hfkd.functional import at_least_float32
from hfkd.models.projections import answer_with_query_key_value, count_attention_layers
from hfkd.outputs import Batch, Progress, TeacherOutput

logger = logging.get_logger(__name__)
TOKEN_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox"})
SAME_TOKENS = ("clean_",)  # views whose tokens lie where the shared view's do, so that they share its mask
COMBINE = ("mean", "logits", "vote", "sample")
Needs = Iterable[str]


class Teacher(ABC):
    """Answers a batch. Never in the optimizer, never in the student's checkpoint, never wrapped by DDP.

    A subclass writes `respond`. For `hfkd.cache` it also says which columns it `reads` and yields its `weights`.
    """

    columns: tuple[str, ...] = ()  # dataset columns it reads beyond the student's
    needs: frozenset[str] = frozenset()  # what the objective wants answered; set by the trainer
    config: Any = None  # the model's configuration, where there is one
    processing_class: Any = None  # its tokenizer or image processor, where it is known
    label_order: Tensor | None = None  # at place i the teacher's id of the student's class i; None when they are equal
    aligned_to: Any = None  # the configuration that `align_labels` was given last
    _student_ids: Tensor | None = None  # the inverse of label_order

    def __call__(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        with torch.no_grad():
            return self._in_students_order(self.respond(batch, progress))

    @abstractmethod
    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        """The answer in the teacher's own order of classes."""

    def to(self, device: torch.device | str) -> Self:
        return self

    def prepare(self, student: Any, needs: Needs, device: torch.device | str) -> None:
        """Called when the student exists, and again for every student that model_init makes."""
        self.needs = frozenset(needs)
        self.to(device)

    def align_labels(self, student_config: Any) -> None:
        """Match classes by name, so that `__call__` answers in the student's order.

        Names are compared without regard to case and blanks. Where a side has only transformers' default names (LABEL_0,
        ...) or none, classes are matched by number. Raises ValueError for different numbers or names of classes.
        """
        self.aligned_to = student_config
        order = label_order(self.config, student_config)
        self.label_order = None if order is None else torch.tensor(order)
        self._student_ids = None if order is None else torch.tensor(order).argsort()

    def _in_students_order(self, answer: TeacherOutput) -> TeacherOutput:
        if self.label_order is None or self._student_ids is None:
            return answer
        given = answer.logits if answer.logits is not None else answer.labels
        if given is not None and given.device != self.label_order.device:  # once: later answers find it there
            self.label_order, self._student_ids = self.label_order.to(given.device), self._student_ids.to(given.device)
        return dataclasses.replace(
            answer,
            logits=None if answer.logits is None else answer.logits.index_select(-1, self.label_order),
            labels=None if answer.labels is None else self._student_ids[answer.labels],
        )

    def reads(self, available: Iterable[str]) -> tuple[str, ...]:
        """Which of these dataset columns the answer depends on, in order of name."""
        return tuple(sorted(set(available) & set(self.columns)))

    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        """The weights of each model behind the answers, one after another."""
        raise ValueError(
            f"{type(self).__name__} does not say which weights are behind its answers, so that a cache of them could "
            "not be told from another teacher's: define weights(), or cache the model with ModelTeacher"
        )

    def facts(self) -> dict[str, Any]:
        """Who answers, for cards and manifests; local folders only by their last name."""
        return {"kind": type(self).__name__, "name": None, "revision": None, "dtype": None, "members": []}


# ---- one model ----


class ModelTeacher(Teacher):
    """A model that answers.

    model: a local folder or a Hub id (loaded as the architecture its config names, safetensors only), or a module. A
    module is frozen, switched to eval mode, moved and cast **in place**: a copy would cost its memory twice. Pass
    copy.deepcopy(model) to keep training the original.
    view: the prefix of the teacher's own view of an input. `teacher_input_ids` is read if the batch has it, else the
    shared `input_ids`; the rounds of self-distillation use `clean_`, the input before masking. Next to
    `teacher_input_ids` no mask, types or positions of the shared view are read, because those lie on the student's
    tokens: without a `teacher_attention_mask` the model attends to every token. `clean_` shares the mask by design.
    dtype: the teacher's own, e.g. torch.bfloat16 or its name; None keeps the checkpoint's; "auto" is bfloat16 where the
    hardware multiplies it fast and else the checkpoint's, decided by `prepare`. Floating inputs are cast to it; answers
    come as the model gives them.
    allow_untrained: answer even with weights that the checkpoint does not have (a new head answers noise).

    `teacher_positions` (batch, student's tokens) in a batch, the number of the teacher's token for each of the student's:
    answers per token are gathered there, so that they lie on the student's tokens; negative numbers count as 0.
    `needs`: "features" is the encoder's last hidden state; "attentions" switches the model to eager attention, because
    SDPA computes no maps; "qkv" answers queries, keys and values of all layers.

    Raises OSError, naming the id and the ways without a network, when `model` is neither a folder nor reachable, and
    ValueError for weights that are missing.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        view: str = "teacher_",
        *,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        allow_untrained: bool = False,
    ):
        loaded = (
            model
            if isinstance(model, nn.Module)
            else load_named_architecture(
                str(model),
                revision=revision,
                trust_remote_code=trust_remote_code,
                allow_untrained=allow_untrained,
            )
        )
        self.model: Any = loaded.eval().requires_grad_(False)
        self.config = getattr(self.model, "config", None)
        self.view = view
        self.name, self.revision = public_name(model), revision
        self._auto_dtype = dtype == "auto"
        if dtype is not None and not self._auto_dtype:
            self.model.to(dtype_named(dtype))
        self._inputs = forward_inputs(self.model)
        self.columns = tuple(f"{view}{name}" for name in (*self._inputs, "positions"))
        self._query_key_value: Any = None

    def prepare(self, student: Any, needs: Needs, device: torch.device | str) -> None:
        self._decide_dtype(device)
        super().prepare(student, needs, device)
        if "attentions" in self.needs:
            answer_attention_maps(self.model)
        if self._query_key_value is not None:
            self._query_key_value.remove()
            self._query_key_value = None
        if "qkv" in self.needs:
            self._query_key_value = answer_every_query_key_value(self.model)

    def _decide_dtype(self, device: torch.device | str) -> None:
        if not self._auto_dtype:
            return
        self._auto_dtype = False
        if fast_bfloat16(device):
            self.model.to(torch.bfloat16)
            logger.info(f"teacher in bfloat16: {torch.device(device).type} multiplies it fast (dtype='auto')")
        else:
            own = str(model_dtype(self.model)).removeprefix("torch.")
            logger.info(f"teacher in {own}, its own: no fast bfloat16 on {torch.device(device).type} (dtype='auto')")

    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        answer = ask(self.model.eval(), inputs_of(batch, self._inputs, self.view), self.needs)
        return on_students_tokens(answer, batch.get(f"{self.view}positions"))

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        return self

    def align_labels(self, student_config: Any) -> None:
        if answers_classes(self.model):
            super().align_labels(student_config)

    def reads(self, available: Iterable[str]) -> tuple[str, ...]:
        columns = set(available)
        chosen = {*chosen_columns(columns, self._inputs, self.view).values(), f"{self.view}positions"}
        return tuple(sorted(chosen & columns))

    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        yield self.model.state_dict()

    def facts(self) -> dict[str, Any]:
        dtype = str(model_dtype(self.model)).removeprefix("torch.")
        return {**super().facts(), "name": self.name, "revision": self.revision, "dtype": dtype}


def load_named_architecture(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, allow_untrained: bool = False
) -> nn.Module:
    """Load a checkpoint as the architecture that its own config names.

    Raises ValueError when the checkpoint lacks weights of that architecture, unless `allow_untrained`, and OSError when
    it is not there.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        architecture = (config.architectures or [None])[0]
        if architecture is None or not hasattr(transformers, architecture):
            raise ValueError(
                f"{name}: its config names no architecture of transformers ({config.architectures}); pass the module"
            )
        model, loading = getattr(transformers, architecture).from_pretrained(
            name,
            config=config,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OSError as error:
        if Path(name).is_dir():
            raise  # transformers names the file that is missing
        raise OSError(
            f"teacher {name!r} is neither a local folder nor reachable on the Hub. Without a network: pass a local "
            f"folder or a module, or fill the Hugging Face cache beforehand (hf download {name})"
        ) from error
    # A bare encoder's pooler is no part of any answer, and many checkpoints have none
    missing = sorted(
        key for key in loading["missing_keys"] if not (model.base_model is model and key.startswith("pooler."))
    )
    if missing and not allow_untrained:
        raise ValueError(
            f"{name} lacks weights of {architecture}: {', '.join(missing[:6])} ({len(missing)} in all). They would be new "
            "and random, and the teacher would answer noise: train it first (recipes/train_teacher.py), or pass "
            "--allow_untrained_teacher (allow_untrained=True) if that is meant"
        )
    return model


def public_name(model: str | Path | nn.Module) -> str:
    """A Hub id as it is, a local folder by its last name, a module by what it was loaded from or else by its class."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") if isinstance(model, nn.Module) else model)
    if not name:
        return type(model).__name__
    local = Path(name).exists() or name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name
    return Path(name.replace("\\", "/")).resolve().name if local else name


def dtype_named(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be 'auto' or a floating type such as 'bfloat16' or 'float32', got {dtype!r}")
    return found


def model_dtype(model: nn.Module) -> torch.dtype:
    """The type of its first floating weight; float32 for a model without one."""
    return next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)


def fast_bfloat16(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 faster than float32, as far as torch tells: emulation does not count."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        # Private names: another version of torch may not have them
        checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        return any(check() for check in checks if check is not None)
    return kind in ("xpu", "xla")


# ---- asking a model ----


def forward_inputs(model: nn.Module) -> tuple[str, ...]:
    """What its forward takes, but for labels: a teacher needs no loss of its own."""
    return tuple(name for name in inspect.signature(without_adapter(model).forward).parameters if name != "labels")


def without_adapter(model: Any) -> Any:
    """The transformers model inside a PeftModel, adapter layers included; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def chosen_columns(available: Iterable[str], inputs: Sequence[str], view: str) -> dict[str, str]:
    """For each input the column it comes from: the view's own, else the shared one where that fits the view's tokens."""
    columns = set(available)
    own_tokens = f"{view}input_ids" in columns and view not in SAME_TOKENS
    chosen = {}
    for name in inputs:
        if f"{view}{name}" in columns:
            chosen[name] = f"{view}{name}"
        elif name in columns and not (own_tokens and name in TOKEN_INPUTS):
            chosen[name] = name
    return chosen


def inputs_of(batch: Batch, inputs: Sequence[str], view: str) -> dict[str, Any]:
    return {name: batch[column] for name, column in chosen_columns(batch, inputs, view).items()}


def ask(model: Any, inputs: dict[str, Any], needs: frozenset[str]) -> TeacherOutput:
    dtype = model_dtype(model)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = value.to(dtype)
    for name in ("hidden_states", "attentions"):
        if name in needs:
            inputs[f"output_{name}"] = True
    with encoder_output(model, wanted="features" in needs) as encoded:
        output = model(**inputs)
    return TeacherOutput(
        logits=output.get("logits"),
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
        features=encoded[-1] if encoded else output.get("last_hidden_state"),
        qkv=output.get("qkv"),
    )


@contextmanager
def encoder_output(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """Catches the last hidden state inside a model with a head, which answers logits only."""
    caught: list[Tensor] = []
    model = without_adapter(model)
    encoder = getattr(model, "base_model", model)
    if encoder is model or not wanted:
        yield caught
        return
    hook = encoder.register_forward_hook(lambda module, inputs, output: caught.append(output[0]))
    try:
        yield caught
    finally:
        hook.remove()


def answer_attention_maps(model: Any) -> None:
    kind = getattr(model.config, "_attn_implementation", None)
    if kind != "eager":
        logger.info(f"the teacher switches from {kind} to eager attention: attention maps were asked for")
        model.set_attn_implementation("eager")


def answer_every_query_key_value(model: nn.Module) -> Any:
    return answer_with_query_key_value(model, range(count_attention_layers(model)))


def on_students_tokens(answer: TeacherOutput, positions: Tensor | None) -> TeacherOutput:
    """Token-level answers (batch, teacher's tokens, ...) at positions (batch, student's tokens)."""
    if positions is None:
        return answer

    def gathered(values: Any) -> Any:
        if isinstance(values, tuple):
            return tuple(gathered(value) for value in values)
        if values is None or values.dim() != 3:
            return values
        return values.gather(1, positions.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))

    return dataclasses.replace(
        answer,
        logits=gathered(answer.logits),
        features=gathered(answer.features),
        hidden_states=gathered(answer.hidden_states),
    )


# ---- the order of classes ----


def answers_classes(model: Any) -> bool:
    """Whether the logits are over labels: neither a bare encoder nor a language model's vocabulary."""
    model = without_adapter(model)
    if not hasattr(model, "base_model"):
        return True
    return model.base_model is not model and model.get_output_embeddings() is None


def class_names(config: Any) -> list[str] | None:
    """In the order of their ids; None where there are none or only transformers' defaults."""
    names = getattr(config, "id2label", None)
    if not names:
        return None
    ordered = [str(names[i]) for i in sorted(names, key=int)]
    return None if ordered == [f"LABEL_{i}" for i in range(len(ordered))] else ordered


def label_order(teacher_config: Any, student_config: Any) -> list[int] | None:
    """For each of the student's classes the teacher's id; None where they are the same or have no names to match."""
    sizes = [getattr(config, "num_labels", None) for config in (student_config, teacher_config)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has {sizes[0]} labels, the teacher {sizes[1]}: load the student with num_labels={sizes[1]}, or "
            "take a teacher of the student's task"
        )
    if 1 in sizes or any(problem_type_of(config) == "regression" for config in (student_config, teacher_config)):
        return None
    ours, theirs = class_names(student_config), class_names(teacher_config)
    if ours is None or theirs is None:
        if ours is not theirs and student_config is not None:
            named, unnamed = ("student", "teacher") if ours else ("teacher", "student")
            logger.warning_once(
                f"only the {named} names its classes ({', '.join((ours or theirs or [])[:6])}): they are matched with the "
                f"{unnamed}'s by number. Set id2label of the {unnamed} if its order is another"
            )
        return None
    return None if ours == theirs else matched(ours, theirs)


def matched(ours: list[str], theirs: list[str]) -> list[int]:
    if set(ours) != set(theirs):
        plain_ours, plain_theirs = (["".join(name.split()).casefold() for name in names] for names in (ours, theirs))
    else:
        plain_ours, plain_theirs = ours, theirs
    distinct = len(set(plain_ours)) == len(ours) and len(set(plain_theirs)) == len(theirs)
    if not distinct or set(plain_ours) != set(plain_theirs):
        raise ValueError(
            f"the student's classes are {ours}, the teacher's {theirs}: give both configs the same names in id2label, or "
            "take a teacher of the student's task"
        )
    return [plain_theirs.index(name) for name in plain_ours]


def problem_type_of(config: Any) -> str | None:
    if getattr(config, "problem_type", None):
        return config.problem_type
    return "regression" if getattr(config, "num_labels", None) == 1 else None


# ---- several teachers ----


class EnsembleTeacher(Teacher):
    """Several teachers that answer as one; each is matched with the student's classes by its own names.

    members: Teachers, modules, folders or Hub ids. combine:
    - "mean": the mean of the members' probabilities at temperature 1, as its logarithm, so that a softmax at
      temperature 1 gives the mean back. Multi-label: the mean of the sigmoids, as its logit. Regression: the mean of the
      outputs. A member alone becomes its log-probabilities: its logits up to a shift, which no softmax sees.
    - "logits": the mean of the logits (a geometric mean of probabilities); a member alone is its own logits.
    - "vote": `labels`, the class that most members predict; ties go to the larger sum of probabilities. No logits.
    - "sample": `labels`, the prediction of one member chosen uniformly for each example, a function of (seed, round,
      epoch, example_id): the same on every process and for every batch composition. No logits; the batch needs
      `example_id`. All members are asked, because a batch needs them all.

    Results are in float32 or better. problem_type is the members' config's, else the student's, else single-label.
    one_in_memory=True: only one member at a time occupies the device. Members given as modules or Teachers wait in the
    CPU's memory and are moved for every batch; members given by name are loaded for every batch and dropped afterwards,
    which reads every checkpoint from disk in every step: worth it once, for `hfkd.cache`, with large batches.

    Raises ValueError without members, for another `combine`, for members of different problem types, for votes outside
    single-label classification, and for needs beyond logits: hidden states of several models have no mean.
    """

    def __init__(
        self,
        members: Sequence[Teacher | nn.Module | str | Path],
        combine: str = "mean",
        one_in_memory: bool = False,
    ):
        if combine not in COMBINE:
            raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")
        if not members:
            raise ValueError("an ensemble needs at least one member")
        self.combine = combine
        self.one_in_memory = one_in_memory
        self.members = [_as_teacher(member, one_in_memory) for member in members]
        self.config = self.members[0].config
        columns = [column for member in self.members for column in member.columns]
        self.columns = tuple(dict.fromkeys([*columns, *(["example_id"] if combine == "sample" else [])]))
        self._device: torch.device | str = "cpu"
        try:
            self.align_labels(self.config)
        except ValueError as error:
            raise ValueError(f"the members do not match (member 0 in the student's place): {error}") from error

    def prepare(self, student: Any, needs: Needs, device: torch.device | str) -> None:
        if beyond := sorted(set(needs) - {"teacher"}):
            raise ValueError(f"an ensemble answers logits or labels, the objective needs {', '.join(beyond)} as well")
        self._device = device
        for member in self.members:
            member.prepare(student, needs, device)
            if self.one_in_memory:
                member.to("cpu")
        super().prepare(student, needs, device)

    def align_labels(self, student_config: Any) -> None:
        """Each member by its own names; until a student is known, by those of the first member."""
        self.aligned_to = student_config
        for member in self.members:
            member.align_labels(student_config)
        types = {problem_type_of(member.config) for member in self.members} - {None}
        if len(types) > 1:
            raise ValueError(f"the members have different problem types ({', '.join(sorted(map(str, types)))})")
        self.problem_type = next(iter(types), None) or problem_type_of(student_config) or "single_label_classification"
        if self.combine in ("vote", "sample") and self.problem_type != "single_label_classification":
            raise ValueError(
                f"combine={self.combine!r} needs one class an example, this is {self.problem_type}: 'mean'"
            )

    def to(self, device: torch.device | str) -> Self:
        self._device = device
        if not self.one_in_memory:
            for member in self.members:
                member.to(device)
        return self

    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        logits = torch.stack([at_least_float32(answer) for answer in self._members_logits(batch, progress)])
        if self.combine == "mean":
            return TeacherOutput(logits=mean_answer(logits, self.problem_type))
        if self.combine == "logits":
            return TeacherOutput(logits=logits.mean(0))
        if self.combine == "vote":
            return TeacherOutput(labels=voted(logits))
        if "example_id" not in batch:
            raise ValueError(
                f"combine='sample' keys its draws by example_id, and the batch has only {sorted(batch)}: add the row "
                "number as a column example_id and let the collator keep it"
            )
        chosen = keyed_choice(batch["example_id"], progress or Progress(), len(logits))
        return TeacherOutput(labels=logits.argmax(-1)[chosen, torch.arange(len(chosen), device=chosen.device)])

    def _members_logits(self, batch: Batch, progress: Progress | None) -> Iterator[Tensor]:
        for number, member in enumerate(self.members):
            if self.one_in_memory:
                member.to(self._device)
            answer = member(batch, progress).logits
            if self.one_in_memory:
                member.to("cpu")
            if answer is None:
                raise ValueError(f"member {number} ({type(member).__name__}) answered no logits to combine")
            yield answer

    def reads(self, available: Iterable[str]) -> tuple[str, ...]:
        columns = set(available)
        own = columns & {"example_id"} if self.combine == "sample" else set()
        return tuple(sorted(own.union(*(member.reads(columns) for member in self.members))))

    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        for member in self.members:
            yield from member.weights()

    def facts(self) -> dict[str, Any]:
        members = [member.facts() for member in self.members]
        return {**super().facts(), "combine": self.combine, "members": members}


class _ModelOnDisk(Teacher):
    """A checkpoint that is in memory only while it answers."""

    def __init__(self, name: str):
        self.name = name
        self.device: torch.device | str = "cpu"
        loaded = self._load()
        self.config, self.columns, self._facts = loaded.config, loaded.columns, loaded.facts()
        self._inputs, self._has_classes = loaded._inputs, answers_classes(loaded.model)

    def _load(self) -> ModelTeacher:
        return ModelTeacher(self.name)

    def to(self, device: torch.device | str) -> Self:
        self.device = device
        return self

    def align_labels(self, student_config: Any) -> None:
        if self._has_classes:
            super().align_labels(student_config)

    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        return self._load().to(self.device).respond(batch, progress)

    def reads(self, available: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(chosen_columns(available, self._inputs, "teacher_").values()))

    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        yield from self._load().weights()

    def facts(self) -> dict[str, Any]:
        return self._facts


def _as_teacher(member: Teacher | nn.Module | str | Path, one_in_memory: bool) -> Teacher:
    if isinstance(member, Teacher):
        return member
    if one_in_memory and not isinstance(member, nn.Module):
        return _ModelOnDisk(str(member))
    return ModelTeacher(member)


def mean_answer(logits: Tensor, problem_type: str) -> Tensor:
    """(members, ..., num_labels) -> (..., num_labels); in log space, so that tiny probabilities do not become 0."""
    if problem_type == "regression":
        return logits.mean(0)
    if problem_type == "multi_label_classification":
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)
    members = torch.full((), len(logits), dtype=logits.dtype, device=logits.device)
    return F.log_softmax(logits, dim=-1).logsumexp(0) - members.log()


def voted(logits: Tensor) -> Tensor:
    """(members, ..., num_labels) -> (...): the most frequent prediction; among equals the most probable in sum."""
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    tied = votes == votes.amax(-1, keepdim=True)
    return logits.softmax(-1).sum(0).masked_fill(~tied, -1.0).argmax(-1)


def keyed_choice(example_ids: Tensor, progress: Progress, choices: int) -> Tensor:
    """One of `choices` numbers for each example, uniformly, a function of (seed, round, epoch, example_id).

    Integer hashing on the device (two rounds of a multiply-and-shift finaliser; the multiplier below 2^27 keeps 64-bit
    products of 32-bit values exact), because a generator for each example would make the host wait for the ids.
    """
    key = zlib.crc32(f"{progress.seed} {progress.round} {int(progress.epoch)}".encode())
    folded = example_ids.long() ^ (example_ids.long() >> 32)
    return _mixed(_mixed(folded & 0xFFFFFFFF) ^ key) % choices


def _mixed(x: Tensor) -> Tensor:
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & 0xFFFFFFFF
    return (x >> 16) ^ x


# ---- answers without a second model ----


class CachedTeacher(Teacher):
    """Answers from dataset columns that `hfkd.cache` wrote (or anything else); no model in memory.

    logits, features: the names of the columns, None where there is none.
    cache: the directory of the cache, whose manifest names the classes; without it they are matched by number.

    Raises ValueError for a directory without a manifest, and when more is needed than the columns hold.
    """

    def __init__(
        self, logits: str | None = "teacher_logits", features: str | None = None, cache: str | Path | None = None
    ):
        self.logits, self.features = logits, features
        self.columns = tuple(name for name in (logits, features) if name is not None)
        self.view = "plain"  # of the collator, while it was cached: the trainer compares it with the collator's
        self._teacher_facts: dict[str, Any] = {}
        if cache is not None:
            self._read_manifest(Path(cache))

    def _read_manifest(self, directory: Path) -> None:
        path = directory / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{directory} holds no manifest.json, so it is no finished cache: run cache_teacher again")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        self.view, self._teacher_facts = manifest["view"], manifest["teacher"]
        settings = dict(manifest["config"])
        if settings.get("id2label"):  # JSON has no integer keys
            settings["id2label"] = {int(i): name for i, name in settings["id2label"].items()}
        self.config = SimpleNamespace(**settings)

    def prepare(self, student: Any, needs: Needs, device: torch.device | str) -> None:
        held = {"teacher", *(["features"] if self.features else [])}
        if beyond := sorted(set(needs) - held):
            raise ValueError(
                f"the objective needs {', '.join(beyond)}, and cached columns hold {', '.join(self.columns)} only: use a "
                "ModelTeacher (or cache_teacher(features=True) and CachedTeacher(features='teacher_features'))"
            )
        super().prepare(student, needs, device)

    def align_labels(self, student_config: Any) -> None:
        if self.logits is not None:
            super().align_labels(student_config)

    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        missing = [name for name in self.columns if name not in batch]
        if missing:
            raise ValueError(
                f"the batch has no {', '.join(missing)}, only {sorted(batch)}: attach them with load_cache(...), keep them "
                "in the data set, and take a collator that passes them on"
            )
        return TeacherOutput(
            logits=None if self.logits is None else batch[self.logits],
            features=None if self.features is None else batch[self.features],
        )

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "members": [self._teacher_facts] if self._teacher_facts else []}


class AdapterTeacher(Teacher):
    """A student with a PEFT adapter, the adapter switched off: its own teacher, without a second copy in memory.

    Must be asked before the student's forward, as the trainers do. The answer is the base model's, bit for bit, with
    `modules_to_save` back at the original modules, in eval mode and from the student's own inputs. Every module's training
    flag and every parameter's requires_grad are put back as they were (PEFT's `disable_adapter` loses the latter).

    student: the PeftModel, not wrapped; None waits for `prepare`, where the trainer hands it over.
    Raises ValueError for a student without an adapter, and for one whose base weights are trained too (`bias="all"`): it
    has no base model to ask any more.
    """

    def __init__(self, student: Any = None):
        self.student: Any = None
        if student is not None:
            self._bind(student)

    def prepare(self, student: Any, needs: Needs, device: torch.device | str) -> None:
        super().prepare(student, needs, device)
        if student is not None:
            self._bind(student)
        if self.student is None:
            raise ValueError("AdapterTeacher has no student yet: pass the PeftModel")
        if "attentions" in self.needs:
            answer_attention_maps(self.student.get_base_model())

    def _bind(self, student: Any) -> None:
        from peft import PeftModel

        if not isinstance(student, PeftModel):
            raise ValueError(
                f"AdapterTeacher needs a student with an adapter, got {type(student).__name__}: pass peft_config=... to the "
                "trainer (or get_peft_model(...) as the model), or use ModelTeacher(copy.deepcopy(model))"
            )
        with adapter_off(student) as base:
            trained = [name for name, weight in base.named_parameters() if weight.requires_grad]
            self._inputs = forward_inputs(base)
        if trained:
            raise ValueError(
                f"the student trains weights of its base model ({', '.join(trained[:4])}), so that with the adapter "
                "switched off it is no longer the model it was: set bias='none', or use ModelTeacher(copy.deepcopy(base))"
            )
        self.student, self.config = student, student.get_base_model().config

    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        if self.student is None:
            raise ValueError("AdapterTeacher has no student yet: call prepare(student, needs, device) first")
        inputs = {name: batch[name] for name in self._inputs if name in batch}
        with adapter_off(self.student) as base:
            hooks = answer_every_query_key_value(base) if "qkv" in self.needs else None
            try:
                return ask(base, inputs, self.needs)
            finally:
                if hooks is not None:
                    hooks.remove()

    def reads(self, available: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(set(available) & set(self._inputs)))

    def facts(self) -> dict[str, Any]:
        if self.student is None:
            return super().facts()
        base = self.student.get_base_model()
        dtype = str(model_dtype(base)).removeprefix("torch.")
        return {**super().facts(), "name": public_name(base), "dtype": dtype}


@contextmanager
def adapter_off(student: Any) -> Iterator[Any]:
    """The base model in eval mode; afterwards every flag is as it was."""
    modes = [(module, module.training) for module in student.modules()]
    trainable = [(weight, weight.requires_grad) for weight in student.parameters()]
    try:
        with student.disable_adapter():
            student.eval()
            yield student.get_base_model()
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, flag in trainable:
            weight.requires_grad = flag
