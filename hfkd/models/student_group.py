"""Several students in one module, so that they share a batch, a teacher's answer, and the wrapper of several processes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import ModelOutput


class StudentGroup(nn.Module):
    """Classifiers of any architecture and size for the same labels and the same inputs, each under a name of its own.

    students: a mapping from name to model, or pairs. Its forward shows every student the inputs it knows, and answers
    `logits` (batch, students, num_labels), in the order of the names. Nothing is shared between two students.

    Raises ValueError without students, for two of one name or one module under two names, for names that make no folder,
    and for other labels than the first one's; TypeError for what is no model of transformers.
    """

    def __init__(self, students: Mapping[str, PreTrainedModel] | Iterable[tuple[str, PreTrainedModel]]):
        super().__init__()
        pairs = list(students.items() if isinstance(students, Mapping) else students)
        refuse_wrong_names([name for name, _ in pairs])
        refuse_wrong_models(pairs)
        self.students = nn.ModuleDict(dict(pairs))
        refuse_other_labels(self)

    @classmethod
    def from_pretrained(cls, sources: Mapping[str, str | Path] | str | Path, text: bool | None = None) -> StudentGroup:
        """Each student from a folder or Hub id; or all of a folder that the trainer wrote, in its order.

        text: whether they classify texts; None asks the first configuration. Loads safetensors, no code.
        """
        if not isinstance(sources, Mapping):
            folder = Path(sources)
            names = read_names(folder)
            sources = {name: folder / name for name in names}
        return cls({name: load_classifier(str(source), text) for name, source in sources.items()})

    @property
    def names(self) -> list[str]:
        return list(self.students)

    @property
    def config(self) -> Any:
        """The first student's: labels and problem type are those of all."""
        return self[self.names[0]].config

    @property
    def dtype(self) -> torch.dtype:
        return self[self.names[0]].dtype

    @property
    def device(self) -> torch.device:
        return self[self.names[0]].device

    @property
    def main_input_name(self) -> str:
        return self[self.names[0]].main_input_name

    def __getitem__(self, name: str) -> Any:
        return self.students[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.students)

    def items(self) -> Iterator[tuple[str, Any]]:
        return iter(self.students.items())

    @property
    def forward_names(self) -> set[str]:
        """Every input that some student reads."""
        return set().union(*(names_of(student) for _, student in self.items()))

    def forward(self, **inputs: Any) -> ModelOutput:
        logits = [student(**inputs_of(student, inputs)).logits for _, student in self.items()]
        return ModelOutput(logits=torch.stack(logits, dim=1))

    def parameters_of(self, name: str) -> dict[str, Tensor]:
        """The trained parameters of a student, by their names in the group."""
        prefix = f"students.{name}."
        return {prefix + key: p for key, p in self[name].named_parameters() if p.requires_grad}

    def last_layer_of(self, name: str) -> dict[str, Tensor]:
        """The parameters of the layer that makes the logits. Raises ValueError where there is no linear one."""
        student = self[name]
        linear = [key for key, module in student.named_modules() if isinstance(module, nn.Linear)]
        fitting = [key for key in linear if student.get_submodule(key).out_features == student.config.num_labels]
        if not fitting:
            raise ValueError(
                f"{type(student).__name__} ({name}) has no linear layer with {student.config.num_labels} outputs at its end: "
                "choose another engine than last_layer"
            )
        prefix = f"students.{name}.{fitting[-1]}."
        return {key: p for key, p in self.parameters_of(name).items() if key.startswith(prefix)}

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        for _, student in self.items():
            student.activation_checkpointing_enable(**settings)

    def floating_point_ops(self, inputs: Mapping[str, Any], exclude_embeddings: bool = True) -> int:
        return sum(student.floating_point_ops(inputs, exclude_embeddings) for _, student in self.items())


def names_of(student: Any) -> set[str]:
    return set(inspect.signature(student.forward).parameters)


def inputs_of(student: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    known = names_of(student)
    return {name: value for name, value in inputs.items() if name in known}


def load_classifier(source: str, text: bool | None) -> Any:
    if text is None:
        from transformers import AutoConfig

        text = hasattr(AutoConfig.from_pretrained(source), "vocab_size")
    kind = AutoModelForSequenceClassification if text else AutoModelForImageClassification
    return kind.from_pretrained(source, use_safetensors=True)


def read_names(folder: Path) -> list[str]:
    import json

    path = folder / "group.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no group.json: name the students, StudentGroup.from_pretrained({{'small': ...}})"
        )
    return list(json.loads(path.read_text(encoding="utf-8"))["students"])


# ---- what is refused ----


def refuse_wrong_names(names: list[str]) -> None:
    if not names:
        raise ValueError("a group needs one student or more")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two students are called {', '.join(twice)}: metrics and folders go by name")
    reserved = {"mean", *dir(nn.ModuleDict())}  # eval_mean_accuracy is the mean over students; half is a method
    odd = [name for name in names if name in reserved or not name.replace("_", "").replace("-", "").isalnum()]
    if odd:
        raise ValueError(
            f"students cannot be called {', '.join(map(repr, odd))}: use letters, digits, - and _, but not 'mean' "
            "and no method of a torch module"
        )


def refuse_wrong_models(pairs: list[tuple[str, Any]]) -> None:
    for name, model in pairs:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"{name} is a {type(model).__name__}, and students are models of transformers with a classifier's head"
            )
    for i, (name, model) in enumerate(pairs):
        for other, twin in pairs[:i]:
            if {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}:
                raise ValueError(f"{other} and {name} share parameters: load or copy.deepcopy each student for itself")


def refuse_other_labels(group: StudentGroup) -> None:
    first, expected = group.names[0], group.config.id2label
    for name, student in group.items():
        found = student.config.id2label
        if found != expected:
            raise ValueError(
                f"{first} has the labels {list(expected.values())[:10]} and {name} {list(found.values())[:10]}: students of one "
                "group need the same labels in the same order; load them with the same id2label"
            )
