"""A model that answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hfkd.outputs import Batch, Progress, TeacherOutput
from hfkd.teachers.asking import (
    answer_attention_maps,
    answers_classes,
    ask,
    chosen_columns,
    forward_inputs,
    inputs_of,
    model_dtype,
    on_students_tokens,
    query_key_value_answered,
)
from hfkd.teachers.teacher import Needs, Teacher

logger = logging.get_logger(__name__)


class ModelTeacher(Teacher):
    """A model that answers.

    model: a local folder or a Hub id (loaded as the architecture its config names, safetensors only), or a module. A
    module is frozen, switched to eval mode, moved and cast **in place**: a copy would cost its memory twice. Pass
    copy.deepcopy(model) to keep training the original. `processing_class` is the tokenizer, or else the image processor,
    that lies beside the weights.
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
        # The shared names too: a teacher may read what the student does not (token types, say)
        self.columns = (*(f"{view}{name}" for name in (*self._inputs, "positions")), *self._inputs)
        self.commit = ""  # on the Hub, of weights that were loaded from there
        if not isinstance(model, nn.Module):
            self.commit = commit_of(str(model), revision)
            self.processing_class = tokenizer_of(str(model), revision) or image_processor_of(str(model), revision)

    def prepare(self, student: Any, needs: Needs, device: torch.device | str) -> None:
        self._decide_dtype(device)
        super().prepare(student, needs, device)
        if "attentions" in self.needs:
            answer_attention_maps(self.model)

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
        if self.model.training:  # asked first: eval() walks through hundreds of modules, and this runs in every step
            self.model.eval()
        with query_key_value_answered(self.model, "qkv" in self.needs):
            answer = ask(self.model, inputs_of(batch, self._inputs, self.view), self.needs)
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
    """Load a checkpoint as the architecture that its own config names: of transformers, of hfkd, or of an Auto class.

    Raises ValueError when the checkpoint lacks weights of that architecture, unless `allow_untrained`, and OSError when
    it is not there.
    """
    import transformers

    import hfkd.models.cifar_resnet  # noqa: F401, registers its classes

    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        architecture = (config.architectures or [""])[0]
        kind = class_named(architecture, type(config))
        if kind is None:
            raise ValueError(
                f"{name}: its config names no architecture of transformers ({config.architectures}), nor one that is "
                "registered with an Auto class; pass the module"
            )
        model, loading = kind.from_pretrained(
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


def commit_of(name: str, revision: str | None = None) -> str:
    """The commit that a checkpoint in the Hub's cache belongs to; "" for a local folder."""
    from transformers.utils import cached_file

    if Path(name).is_dir():
        return ""
    path = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(path).parent.name if path and Path(path).parent.parent.name == "snapshots" else ""


def class_named(architecture: str, config_class: type) -> Any:
    """A model class by its name: one of transformers, or one that an Auto class has for this configuration; else None."""
    import transformers
    from transformers.models.auto import modeling_auto

    if architecture and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    mappings = [mapping for name, mapping in vars(modeling_auto).items() if name.endswith("_MAPPING")]
    kinds = (mapping[config_class] for mapping in mappings if config_class in mapping)
    return next((kind for kind in kinds if getattr(kind, "__name__", None) == architecture), None)


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


IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


def tokenizer_of(name: str, revision: str | None = None) -> Any:
    """The tokenizer that lies beside a model, None where there is none: what the student's is compared with."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    try:  # without any of these files AutoTokenizer gives an empty one, and no error
        missing_is_none = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        files = (cached_file(name, file, **missing_is_none) for file in TOKENIZER_FILES)
        return AutoTokenizer.from_pretrained(name, revision=revision) if any(files) else None
    except (OSError, ValueError):
        return None


def image_processor_of(name: str, revision: str | None = None) -> Any:
    """The image processor that lies beside a model, None where there is none: in which size and colours it sees."""
    from transformers import AutoImageProcessor
    from transformers.utils import cached_file

    try:  # PIL's backend: only the settings are read, and the default one fails where torchvision is broken
        file = cached_file(name, IMAGE_PROCESSOR_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
        settings = {"revision": revision, "backend": "pil", "trust_remote_code": False}
        return AutoImageProcessor.from_pretrained(name, **settings) if file else None
    except (OSError, ValueError):
        return None
