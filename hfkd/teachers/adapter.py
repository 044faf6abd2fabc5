"""A student with a PEFT adapter as its own teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hfkd.outputs import Batch, Progress, TeacherOutput
from hfkd.teachers.asking import ask, forward_inputs, model_dtype, query_key_value_answered
from hfkd.teachers.model import public_name
from hfkd.teachers.teacher import Needs, Teacher


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
        with (
            adapter_off(self.student) as base,
            attention_maps_answered(base, "attentions" in self.needs),
            query_key_value_answered(base, "qkv" in self.needs),
        ):
            return ask(base, inputs, self.needs)

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


@contextmanager
def attention_maps_answered(base: Any, wanted: bool) -> Iterator[None]:
    """Eager attention for one answer: the student may compute its own attention as it likes."""
    usual = base.config._attn_implementation
    if not wanted or usual == "eager":
        yield
        return
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(usual)
