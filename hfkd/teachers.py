"""Where the teacher's answers come from. Frozen, in eval mode, without gradients: here, once, for every kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from hfkd.outputs import Batch, Progress, TeacherOutput


class Teacher(ABC):
    """Answers a batch. Never in the optimizer, never in the student's checkpoint, never wrapped by DDP."""

    columns: tuple[str, ...] = ()  # dataset columns it reads beyond the student's
    needs: frozenset[str] = frozenset()  # what the objective wants answered; set by the trainer
    config: Any = None  # the model's configuration, where there is one

    def __call__(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        with torch.no_grad():
            return self.respond(batch, progress)

    @abstractmethod
    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput: ...

    def to(self, device: torch.device | str) -> Self:
        return self


class ModelTeacher(Teacher):
    """A model that answers.

    model: a module, a local folder or a Hub id (loaded as the architecture its config names, safetensors only).
    view: the prefix of the teacher's own view of an input. `teacher_input_ids` is read if the batch has it, else the
    shared `input_ids`; the rounds of self-distillation use `clean_`, the input before masking.
    dtype: the teacher's own, e.g. torch.bfloat16; None keeps the checkpoint's.

    Raises OSError, naming the id and the ways without a network, when `model` is neither a folder nor reachable.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        view: str = "teacher_",
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        import inspect

        loaded = (
            model
            if isinstance(model, nn.Module)
            else load_named_architecture(str(model), revision=revision, trust_remote_code=trust_remote_code)
        )
        self.model = (loaded if dtype is None else loaded.to(dtype)).eval().requires_grad_(False)
        self.config = getattr(self.model, "config", None)
        self.view = view
        self._inputs = tuple(name for name in inspect.signature(self.model.forward).parameters if name != "labels")
        self.columns = tuple(f"{view}{name}" for name in self._inputs)

    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        inputs: dict[str, Any] = {}
        for name in self._inputs:
            if f"{self.view}{name}" in batch:
                inputs[name] = batch[f"{self.view}{name}"]
            elif name in batch:
                inputs[name] = batch[name]
        for name in ("hidden_states", "attentions"):
            if name in self.needs:
                inputs[f"output_{name}"] = True
        output = self.model.eval()(**inputs)
        return TeacherOutput(
            logits=output.get("logits"),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            features=output.get("last_hidden_state"),
        )

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        return self


def load_named_architecture(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Load a checkpoint as the architecture that its own config names."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        architecture = (config.architectures or [None])[0]
        if architecture is None or not hasattr(transformers, architecture):
            raise ValueError(
                f"{name}: its config names no architecture of transformers ({config.architectures}); pass the module"
            )
        return getattr(transformers, architecture).from_pretrained(
            name, config=config, revision=revision, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except OSError as error:
        if Path(name).is_dir():
            raise  # transformers names the file that is missing
        raise OSError(
            f"teacher {name!r} is neither a local folder nor reachable on the Hub. Without a network: pass a local "
            f"folder or a module, or fill the Hugging Face cache beforehand (hf download {name})"
        ) from error
