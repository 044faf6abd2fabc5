"""Is this pair fit to be distilled? What a wasted hour usually turns out to have been, checked in a minute beforehand.

Labels, tokenizers, image processors, lengths, the teacher's score, new heads, memory, processes and the cache: each check
gives one finding with its remedy. Nothing is trained, nothing of either checkpoint is run but its weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfkd.cache import MANIFEST, load_cache, verify_cache
from hfkd.data.pixels import COLUMNS, ImageCollator, PixelView
from hfkd.data.text import label_names, same_tokenizer, tokenize
from hfkd.diagnostics.answers import TextCollator
from hfkd.diagnostics.metrics import IGNORED, score
from hfkd.evaluation import (
    MAX_LENGTH,
    expected_labels,
    kind_of,
    load_splits,
    logits_of,
    positions_of,
)
from hfkd.evaluation import drawn as at_random
from hfkd.memory import bytes_of, free_memory, step_memory
from hfkd.records import read_json
from hfkd.teachers import ModelTeacher
from hfkd.teachers.asking import answers_classes
from hfkd.teachers.labels import class_names, matched
from hfkd.teachers.model import class_named, image_processor_of, public_name, tokenizer_of
from hfkd.trainers.arguments import accelerator_is_absent
from hfkd.trainers.teacher_check import score as score_beside_constant

OK, WARNING, ERROR = "ok", "warning", "error"
ROWS = 256  # that are looked at
SURE = 2  # standard errors by which a teacher must be better than guessing
CUT = 0.1  # share of texts that may be longer than max_length without a word
NEAR = 0.8  # share of the free memory
VERIFIED = 32  # cached rows that the teacher is asked about again
SAFE = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Finding:
    """One line. level: ok, warning or error. remedy: what to do, empty where nothing is to be done."""

    level: str
    check: str
    what: str
    remedy: str = ""


@dataclass
class Side:
    """A model as it was loaded. named: its own class names, None where it has none. missing: weights that the checkpoint
    lacks. processing: its tokenizer or image processor."""

    name: str
    model: Any
    named: list[str] | None
    missing: list[str]
    processing: Any

    @property
    def size(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())


@dataclass
class Case:
    """What the checks look at. rows: some, held out; labels: the data's class names, None for numbers."""

    splits: Any
    rows: Any
    labels: list[str] | None
    max_length: int
    batch_size: int
    cache: Path | None
    student: Side | None = None
    teacher: Side | None = None
    failed: set[str] = field(default_factory=set)  # checks that ended with an error

    @property
    def texts(self) -> bool:
        return "text" in self.rows.column_names

    @property
    def sides(self) -> dict[str, Side]:
        both = {"student": self.student, "teacher": self.teacher}
        return {whose: side for whose, side in both.items() if side is not None}

    @property
    def pair(self) -> tuple[Side, Side]:
        if self.student is None or self.teacher is None:
            raise NotChecked("both models are needed, and one could not be loaded")
        return self.student, self.teacher


class NotChecked(Exception):
    """An earlier error leaves nothing to look at."""


class Refused(Exception):
    """A model that is not loaded: what was found, and the remedy."""


def examine(
    student: str | Path,
    teacher: str | Path,
    task: str | None = None,
    *,
    cache: str | Path | None = None,
    batch_size: int = 8,
    max_length: int = MAX_LENGTH,
    rows: int = ROWS,
    **data: Any,
) -> list[Finding]:
    """One finding a check, in the order in which a user would mend them.

    student, teacher: folders or Hub ids; a student without a head for the task gets a new one, as the recipes give it.
    cache: the teacher's cached answers to the training rows. batch_size: rows of a micro-batch. rows: how many are looked at,
    of the test split where there is one. data: of `hfkd.evaluation.load_splits`.

    Raises ValueError and OSError for data that cannot be loaded; what is wrong with the models is a finding.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    splits = load_splits(task, **data)
    part = next(splits[name] for name in ("test", "validation", "train") if name in splits)
    case = Case(
        splits, at_random(part, rows), _names_of(splits), max_length, batch_size, None if cache is None else Path(cache)
    )
    found = [world_size(), _opened(case, "student", student), _opened(case, "teacher", teacher)]
    for check, look in CHECKS.items():
        if finding := _looked(check, look, case):
            found.append(finding)
            case.failed |= {check} if finding.level == ERROR else set()
    return found


def _looked(check: str, look: Callable[[Case], Finding | None], case: Case) -> Finding | None:
    try:
        return look(case)
    except NotChecked as why:
        return Finding(WARNING, check, f"not checked: {why}", "mend the errors and look again")
    except Exception as error:  # whatever a broken pair makes a model or a processor raise
        return Finding(ERROR, check, _sentence(error), "see the message; the run would have ended there")


def _sentence(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())


def _names_of(splits: Any) -> list[str] | None:
    try:
        return label_names(splits)
    except ValueError:
        return None


# ---- loading ----


def _opened(case: Case, whose: str, source: str | Path) -> Finding:
    """Load one side into the case; the finding is about its weights."""
    check, name = f"{whose}'s weights", str(source)
    try:
        _refuse_code(name)
        _refuse_other_inputs(case, name)
        _refuse_pickles(name)
        side = _student(case, name) if whose == "student" else _teacher(case, name)
    except Refused as refused:
        return Finding(ERROR, check, *refused.args)
    except OSError as error:
        said = f"{public_name(name)} is neither a local folder nor reachable on the Hub"
        said = _sentence(error) if Path(name).is_dir() else said
        return Finding(ERROR, check, said, "pass a local folder, or fill the cache beforehand: hf download " + name)
    except Exception as error:
        return Finding(ERROR, check, f"cannot be loaded: {_sentence(error)}", "save or download it again")
    setattr(case, whose, side)
    return _about_weights(check, whose, side)


def _refuse_code(name: str) -> None:
    """A checkpoint may bring classes of its own, which would run here."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    import hfkd.models.cifar_resnet  # noqa: F401, registers its classes

    raw, _ = PreTrainedConfig.get_config_dict(name)
    if not raw:
        raise OSError(f"{name} has no config.json")
    if raw.get("model_type") not in CONFIG_MAPPING:
        own = (
            "brings code of its own (auto_map), which is not run" if "auto_map" in raw else "is of no known model type"
        )
        raise Refused(
            f"{public_name(name)} {own}: model_type {raw.get('model_type')!r}",
            "read its code; in Python pass ModelTeacher(..., trust_remote_code=True), or take a model of transformers",
        )


def _refuse_other_inputs(case: Case, name: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    kind = class_named((config.architectures or [""])[0], type(config))
    wanted, rows = ("input_ids", "texts") if case.texts else ("pixel_values", "pictures")
    read = getattr(kind, "main_input_name", wanted)
    if read != wanted:
        raise Refused(
            f"{public_name(name)} reads {read}, and the rows are {rows}", "take a model, or a --task, of its kind"
        )


def _refuse_pickles(name: str) -> None:
    from transformers.utils import cached_file

    if not any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in SAFE):
        raise Refused(
            f"{public_name(name)} has no model.safetensors: a pickle (pytorch_model.bin) runs code when it is loaded",
            "load it once where you trust it, and save_pretrained writes safetensors",
        )


def _student(case: Case, name: str) -> Side:
    """With the head it has, or with a new one for the data's classes."""
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(name)
    headed = any(str(kind).endswith("Classification") for kind in config.architectures or [])
    named, classes = class_names(config) if headed else None, len(case.labels) if case.labels else 1
    if not headed:
        config.num_labels = classes
        if case.labels:
            config.id2label = dict(enumerate(case.labels))
            config.label2id = {label: number for number, label in config.id2label.items()}
    kind: Any = AutoModelForSequenceClassification if case.texts else AutoModelForImageClassification
    model, missing = _loaded(kind, name, config)
    return Side(public_name(name), model, named, missing, _processing(case, name))


def _teacher(case: Case, name: str) -> Side:
    """As the architecture that its configuration names: a teacher brings its head."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    architecture = (config.architectures or [""])[0]
    kind = class_named(architecture, type(config))
    if kind is None:
        raise Refused(f"{public_name(name)}: its config names no architecture ({config.architectures})", "set it")
    model, missing = _loaded(kind, name, config)
    return Side(public_name(name), model, class_names(config), missing, _processing(case, name))


def _loaded(kind: Any, name: str, config: Any) -> tuple[Any, list[str]]:
    model, told = kind.from_pretrained(
        name, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    other_shapes = [entry[0] if isinstance(entry, tuple) else entry for entry in told["mismatched_keys"]]
    missing = {*told["missing_keys"], *other_shapes}
    return model.eval(), sorted(key for key in missing if not (model.base_model is model and key.startswith("pooler.")))


def _processing(case: Case, name: str) -> Any:
    return tokenizer_of(name) if case.texts else image_processor_of(name)


def _about_weights(check: str, whose: str, side: Side) -> Finding:
    kind = type(side.model).__name__
    said = f"{side.name}: {kind}, {_count(side.size)} parameters in {str(side.model.dtype).removeprefix('torch.')}"
    train_it = "train it on the task first: recipes/train_teacher.py"
    if whose == "teacher" and not answers_classes(side.model):
        return Finding(ERROR, check, f"{said}, without a head for classes", train_it)
    if not side.missing:
        return Finding(OK, check, f"{said}, all of them from the checkpoint")
    new = f"{', '.join(side.missing[:4])}{', ...' if len(side.missing) > 4 else ''} ({len(side.missing)} in all)"
    if whose == "teacher":
        return Finding(ERROR, check, f"{said}; not in the checkpoint, so new and random: {new}", train_it)
    prefix = f"{side.model.base_model_prefix}."
    encoder = [key for key in side.missing if key.startswith(prefix) and ".pooler." not in key]
    if encoder:
        return Finding(
            ERROR, check, f"{said}; weights of the encoder are new and random: {', '.join(encoder[:4])} ({len(encoder)})",
            "the checkpoint is of another architecture than its config says, or cut off: save or download it again",
        )  # fmt: skip
    return Finding(OK, check, f"{said}; a new head, which training makes: {new}")


# ---- the launcher ----


def world_size() -> Finding:
    """How many processes the launcher started, and how many know of each other."""
    from accelerate import PartialState

    check, launched = "processes", int(os.environ.get("WORLD_SIZE", 1))
    found = PartialState(cpu=accelerator_is_absent()).num_processes
    if found != launched:
        return Finding(
            ERROR, check, f"the launcher started {launched}, and accelerate sees {found}: they would train independent models",
            "without an accelerator pass --use_cpu True or set ACCELERATE_USE_CPU=true; start with accelerate launch or torchrun",
        )  # fmt: skip
    said = "one" if found == 1 else f"{found}, which know of each other"
    return Finding(
        OK, check, f"{said}. To see what a launcher starts, start this with it: accelerate launch -m hfkd.cli doctor"
    )


# ---- labels ----


def labels(case: Case) -> Finding:
    for look in (_other_problem, _other_counts, _other_names, _other_order, _nameless):
        if finding := look(case, *case.pair):
            return finding
    teacher, known = case.pair[1], _unless_numbers(case.labels)
    count = teacher.model.config.num_labels
    if teacher.named is None or known is None:
        return Finding(OK, "labels", f"{count} classes, matched by number" if count > 1 else "one number a row")
    same = _order(known, teacher.named) == list(range(count))
    order = "in one order" if same else "the teacher's in another order, its logits are permuted by name"
    return Finding(OK, "labels", f"{count} classes with the same names, {order}: {_some(known)}")


def _other_problem(case: Case, student: Side, teacher: Side) -> Finding | None:
    kinds = [getattr(side.model.config, "problem_type", None) for side in (student, teacher)]
    if None in kinds or kinds[0] == kinds[1]:
        return None
    said = f"the student's problem_type is {kinds[0]!r}, the teacher's {kinds[1]!r}"
    remedy = "a sigmoid of one and a softmax of the other do not compare: set one in both configs"
    return Finding(ERROR, "labels", said, remedy)


def _other_counts(case: Case, student: Side, teacher: Side) -> Finding | None:
    counts = {"student": student.model.config.num_labels, "teacher": teacher.model.config.num_labels}
    counts |= {"data": len(case.labels)} if case.labels else {}
    if len(set(counts.values())) == 1:
        return None
    said = f"numbers of classes differ: {', '.join(f'{whose} {count}' for whose, count in counts.items())}"
    return Finding(ERROR, "labels", said, "take a teacher of this task, and a student with num_labels of the data")


def _other_names(case: Case, student: Side, teacher: Side) -> Finding | None:
    named = {"the data": _unless_numbers(case.labels), "the student": student.named, "the teacher": teacher.named}
    known = [(whose, names) for whose, names in named.items() if names]
    for (one, first), (other, second) in itertools.combinations(known, 2):
        if _order(first, second) is None:
            said = f"{one}'s classes are {_some(first)}, {other}'s {_some(second)}"
            return Finding(ERROR, "labels", said, "give both the same names in id2label, or take a model of this task")
    return None


def _other_order(case: Case, student: Side, teacher: Side) -> Finding | None:
    """Labels are numbered by the data, and a teacher is aligned to the student: there the two must agree."""
    known, ours = _unless_numbers(case.labels), student.named
    if not known or not ours or _order(known, ours) == list(range(len(ours))):
        return None
    said = f"the student names its classes in the order {_some(ours)}, the data numbers them {_some(known)}"
    return Finding(ERROR, "labels", said, "load the student with id2label of the data: its labels would be mixed up")


def _nameless(case: Case, student: Side, teacher: Side) -> Finding | None:
    known = _unless_numbers(case.labels)
    if teacher.named is not None or known is None:
        return None
    said = f"the teacher has LABEL_0, LABEL_1, ... or no names, the data {_some(known)}: they are matched by number"
    remedy = "set id2label of the teacher; where it was trained with another order, its score below is low"
    return Finding(WARNING, "labels", said, remedy)


def _unless_numbers(names: list[str] | None) -> list[str] | None:
    return None if names is None or names == [str(number) for number in range(len(names))] else names


def _order(ours: list[str], theirs: list[str]) -> list[int] | None:
    try:
        return matched(ours, theirs)
    except ValueError:
        return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "")


# ---- what the models read ----


def inputs(case: Case) -> Finding:
    return _tokenizers(case) if case.texts else _processors(case)


def _tokenizers(case: Case) -> Finding:
    student, teacher = case.pair
    check = "tokenizer"
    for whose, side in case.sides.items():
        if side.processing is None and whose == "student":
            return Finding(
                ERROR, check, "no tokenizer lies beside the student", "save the tokenizer it was trained with there"
            )
        if side.processing is not None and (finding := _beyond_the_table(check, whose, side)):
            return finding
    sizes = [side.model.get_input_embeddings().num_embeddings for side in (student, teacher)]
    if teacher.processing is None:
        level = WARNING if sizes[0] == sizes[1] else ERROR
        said = f"no tokenizer lies beside the teacher; embeddings hold {sizes[0]:,} and {sizes[1]:,} tokens"
        return Finding(level, check, said, "save the tokenizer it was trained with beside it")
    if same_tokenizer(student.processing, teacher.processing, pair="text_pair" in case.rows.column_names):
        return Finding(
            OK, check, f"one for both: {len(student.processing):,} tokens, embeddings of {sizes[0]:,} and {sizes[1]:,}"
        )
    return Finding(
        WARNING, check, f"the student's ({len(student.processing):,} tokens) and the teacher's ({len(teacher.processing):,}) cut "
        "texts differently",
        "give each its view, as the recipes do: hfkd.data.text.tokenize(..., teacher_tokenizer=...); objectives that compare "
        "token by token need one tokenizer",
    )  # fmt: skip


def _beyond_the_table(check: str, whose: str, side: Side) -> Finding | None:
    table = side.model.get_input_embeddings().num_embeddings
    largest = max(side.processing.get_vocab().values())
    if largest < table:
        return None
    remedy = (
        "resize_token_embeddings(len(tokenizer))" if whose == "student" else "take the tokenizer it was trained with"
    )
    said = f"the {whose}'s tokenizer gives ids up to {largest:,}, its embedding holds {table:,}: an index error in some batch"
    return Finding(ERROR, check, said, remedy)


def _processors(case: Case) -> Finding:
    check, views = "image processor", {}
    for whose, side in zip(("student", "teacher"), case.pair, strict=True):
        if side.processing is None:
            return Finding(
                ERROR, check, f"none lies beside the {whose}", "save the image processor it was trained with there"
            )
        views[whose] = PixelView.of(side.processing)
        size = getattr(side.model.config, "image_size", None)
        wanted = (size, size) if isinstance(size, int) else tuple(size or views[whose].size)
        if wanted[-2:] != views[whose].size:
            said = f"the {whose} reads pictures of {wanted[-2:]}, its image processor makes {views[whose].size}"
            return Finding(ERROR, check, said, "set size of the image processor to the model's image_size")
    if views["student"] == views["teacher"]:
        return Finding(OK, check, f"one view for both: {_shown(views['student'])}")
    said = "; ".join(f"the {whose} sees {_shown(view)}" for whose, view in views.items())
    remedy = "give each its view, as the recipes do: data_collator=ImageCollator(processor, teacher.processing_class)"
    return Finding(WARNING, check, said, remedy)


def _shown(view: PixelView) -> str:
    mean, std = ("/".join(f"{value:.3g}" for value in values) for values in (view.mean, view.std))
    return f"{view.size[0]} x {view.size[1]}, mean {mean}, deviation {std}{', blue first' if view.bgr else ''}"


def lengths(case: Case) -> Finding | None:
    """The texts' tokens against max_length, and against the positions of both models."""
    check = "lengths"
    if not case.texts:
        return None
    student = case.student
    if student is None or student.processing is None:
        raise NotChecked("the student's tokenizer is needed")
    pairs = [case.rows["text_pair"][:]] if "text_pair" in case.rows.column_names else []
    shown: list[str] = []
    for whose, side in case.sides.items():
        if side.processing is None:
            continue
        ids = side.processing(case.rows["text"][:], *pairs, truncation=False, verbose=False)["input_ids"]
        tokens = np.array([len(row) for row in ids])
        room, longest = positions_of(side.model), int(tokens.max())
        if case.max_length > side.processing.model_max_length:
            said = f"max_length is {case.max_length}, the {whose}'s tokenizer allows {side.processing.model_max_length}"
            return Finding(ERROR, check, said, f"--max_length {side.processing.model_max_length}")
        if room is not None and min(longest, case.max_length) > room:
            return Finding(
                ERROR, check, f"texts of up to {longest} tokens, cut at {case.max_length}; the {whose} has positions for {room}",
                f"--max_length {room}: beyond, the position embedding ends with an index error",
            )  # fmt: skip
        cut = float((tokens > case.max_length).mean())
        limit = "no limit" if room is None else f"positions for {room}"
        shown.append(f"{whose}: 95 % of texts have {int(np.quantile(tokens, 0.95))} tokens or fewer, {limit}")
        if cut > CUT:
            return Finding(
                WARNING, check, f"{100 * cut:.0f} % of texts are longer than max_length {case.max_length} ({shown[-1]})",
                f"--max_length {min(room or longest, longest)}, if what stands at their ends matters",
            )  # fmt: skip
    return Finding(OK, check, f"{'; '.join(shown)}; cut at {case.max_length}")


# ---- the teacher ----


def teacher_score(case: Case) -> Finding:
    """Of the held-out rows, beside the most frequent class and beside chance."""
    check, side = "teacher's score", case.teacher
    if side is None or side.processing is None:
        raise NotChecked("the teacher, its tokenizer or its image processor is missing")
    if {"labels", "inputs", "lengths"} & case.failed:
        raise NotChecked("labels or inputs do not fit")
    teacher = ModelTeacher(side.model, view="")
    logits = logits_of(teacher, side.processing, case.rows, max_length=case.max_length)
    expected = expected_labels(case.rows, teacher)
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits).all(-1)).sum())
        return Finding(
            ERROR, check, f"{bad} of {len(logits)} rows get logits that are NaN or infinite", "load it in float32"
        )
    if kind_of(teacher) != "single_label_classification":
        return _beside_constant(check, logits, expected, kind_of(teacher))
    known = expected != IGNORED
    return _beside_chance(check, logits.argmax(-1)[known], expected[known], logits.shape[1])


def _beside_constant(check: str, logits: Any, expected: Any, kind: str) -> Finding:
    batch = {"labels": torch.from_numpy(expected)}
    found, constant = score_beside_constant([torch.from_numpy(logits)], [batch], kind)
    name = "negative squared error" if kind == "regression" else "share of right decisions"
    said = f"{name} {found:.4f} on {len(logits)} rows, a constant answer {constant:.4f}"
    if found <= constant:
        return Finding(ERROR, check, said, "are its weights those of this task, its labels on this scale?")
    return Finding(OK, check, said)


def _beside_chance(check: str, found: Any, expected: Any, classes: int) -> Finding:
    """Two standard errors above guessing, in accuracy (beside the most frequent class) and in mean recall (beside 1/k)."""
    counts = np.bincount(expected, minlength=classes)
    rows, frequent, chance = len(expected), float(counts.max() / len(expected)), 1 / classes
    present = counts[counts > 0]
    accuracy, recall = score("accuracy", found, expected), score("mean_per_class_recall", found, expected)
    above_frequent = accuracy > frequent + SURE * math.sqrt(frequent * (1 - frequent) / rows)
    spread = math.sqrt((chance * (1 - chance) / present).sum()) / len(present)
    above_chance = recall > chance + SURE * spread
    said = (
        f"accuracy {100 * accuracy:.1f} % on {rows} held-out rows (the most frequent class {100 * frequent:.1f} %, chance "
        f"{100 * chance:.1f} %), mean recall of classes {100 * recall:.1f} %"
    )
    if above_frequent:
        return Finding(OK, check, said)
    if above_chance:
        return Finding(
            WARNING,
            check,
            f"{said}: no better than the most frequent class",
            "score it on more rows (--rows), by class",
        )
    return Finding(
        ERROR, check, f"{said}: no better than guessing",
        "are its weights those of this task, its labels in the order of its id2label, its tokenizer or processor its own?",
    )  # fmt: skip


# ---- size and memory ----


def sizes(case: Case) -> Finding:
    student, teacher = case.pair
    check, share = "sizes", student.size / teacher.size
    said = f"student {_count(student.size)}, teacher {_count(teacher.size)} parameters"
    if share > 1:
        return Finding(
            WARNING, check, f"{said}: the student is the larger one", "were the two exchanged? STUDENT comes first"
        )
    return Finding(OK, check, f"{said} ({100 * share:.0f} %)")


def memory(case: Case) -> Finding:
    """An estimate for one process, beside what is free."""
    student, teacher = case.pair
    check = "memory"
    if {"inputs", "lengths"} & case.failed or None in (student.processing, teacher.processing):
        raise NotChecked("what the models read does not fit")
    need = step_memory(student.model, _batches(case, student), case.batch_size, teacher.model, _batches(case, teacher))
    parts = ", ".join(f"{name} {_size(value)}" for name, value in dataclasses.asdict(need).items())
    said = f"about {_size(need.total)} a step of {case.batch_size} rows as long as the longest (an estimate: {parts}"
    free = free_memory()
    if free is None:
        return Finding(OK, check, f"{said})")
    free += bytes_of([*student.model.parameters(), *teacher.model.parameters()])  # they lie there already
    said = f"{said}); {_size(free)} are free"
    if need.total > NEAR * free:
        return Finding(
            ERROR if need.total > free else WARNING, check, said,
            "a smaller --batch_size with gradient_accumulation_steps gives the same step; cached teacher logits take the teacher "
            "out (recipes/cache_teacher.py); bf16 and activation_checkpointing take less",
        )  # fmt: skip
    return Finding(OK, check, said)


def _batches(case: Case, side: Side) -> Callable[[int], Mapping[str, Any]]:
    """The longest row looked at, so many times."""
    columns = [name for name in ("text", "text_pair", *COLUMNS) if name in case.rows.column_names]
    rows = case.rows.select_columns(columns)
    place = int(np.argmax([len(text) for text in rows["text"][:]])) if case.texts else 0
    collator: Any = TextCollator(side.processing, case.max_length) if case.texts else ImageCollator(side.processing)

    def batch(count: int) -> Mapping[str, Any]:
        made = collator([rows[place]] * count)
        made = collator.on_device(made) if hasattr(collator, "on_device") else made
        return {
            name: value.to(side.model.device) if isinstance(value, Tensor) else value for name, value in made.items()
        }

    return batch


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# ---- cached answers ----


def cache(case: Case) -> Finding | None:
    """Whole, of these training rows, of this teacher, and the same answers when it is asked again."""
    check, directory = "cache", case.cache
    if directory is None:
        return None
    teacher = case.pair[1]
    if "inputs" in case.failed:
        raise NotChecked("what the models read does not fit")
    manifest = read_json(directory / MANIFEST) or {}
    rows, settings = _rows_of_cache(case, set(manifest.get("columns") or ()))
    asked = ModelTeacher(teacher.model)
    try:
        load_cache(directory, rows, teacher=asked, processing_class=settings.get("processing_class"))
        largest = verify_cache(directory, rows, asked, rows=VERIFIED, **settings)
    except (ValueError, OSError) as error:
        return Finding(ERROR, check, _sentence(error), "make it again: recipes/cache_teacher.py, with this max_length")
    again = min(VERIFIED, len(rows))
    return Finding(
        OK, check, f"{len(rows):,} rows of this teacher; asked about {again} again, it differs by {largest:.2g} at most"
    )


def _rows_of_cache(case: Case, columns: set[str]) -> tuple[Any, dict[str, Any]]:
    """The training rows as they were for the cache, and what collates them."""
    from hfkd.data.images import decoded

    student, teacher = case.pair
    train = case.splits["train"]
    if case.texts:
        own_view = any(name.startswith("teacher_") for name in columns)
        theirs = teacher.processing if own_view else None
        rows = tokenize(train, student.processing, case.max_length, teacher_tokenizer=theirs)
        return rows, {"processing_class": student.processing}
    collator = ImageCollator(student.processing, teacher.processing)
    return decoded(train, collator.canvas) if "pixels" in columns else train, {"collator": collator}


CHECKS: dict[str, Callable[[Case], Finding | None]] = {
    "labels": labels,
    "inputs": inputs,
    "lengths": lengths,
    "teacher's score": teacher_score,
    "sizes": sizes,
    "memory": memory,
    "cache": cache,
}
