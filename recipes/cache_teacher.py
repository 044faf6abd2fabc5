"""Ask a teacher about a task's training texts once; every later run reads the answers instead of running the teacher.

    accelerate launch recipes/train_teacher.py                                        # makes the teacher of the next line
    python recipes/cache_teacher.py --teacher DIR_OR_ID --task movie_sentences --output_dir runs/cache/movie_sentences
    python recipes/cache_teacher.py --teacher textattack/bert-base-uncased-SST-2 --task sst2 --output_dir runs/cache/sst2

A killed run goes on where it was when the same line is given again; --push_to_hub True uploads the answers as a data set with
a card (--hub_dataset_id user/name), without the texts. Afterwards, with rows tokenized in the same way:

    rows = load_cache("runs/cache/movie_sentences", rows, processing_class=tokenizer)
    DistillationTrainer(student, ..., train_dataset=rows, teacher=CachedTeacher(cache="runs/cache/movie_sentences"))
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import AutoTokenizer, HfArgumentParser

from hfkd import hub
from hfkd.cache import cache_teacher, verify_cache
from hfkd.cards import CardFacts, write_card
from hfkd.data.text import TEXT_TASKS, load_text, tokenize
from hfkd.records import read_json
from hfkd.teachers import ModelTeacher
from hfkd.trainers.card import command, installed_versions
from program import one_sentence


@dataclass
class RecipeArguments:
    """Teacher, data, and what is stored."""

    teacher: str = field(default="", metadata={"help": "The teacher: a local folder or a Hub id."})
    task: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(TEXT_TASKS)}; default: movie_sentences without own data."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A data set's Hub id or local folder."})
    train_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet."})
    output_dir: str = field(default="", metadata={"help": "Where the cache is made; default: runs/cache/TASK."})
    max_length: int = field(default=128, metadata={"help": "Tokens a text is cut at; the students' must be the same."})
    batch_size: int = field(default=64, metadata={"help": "Texts the teacher reads at a time."})
    features: bool = field(default=False, metadata={"help": "Store the encoder's last hidden states as well (large)."})
    dtype: str = field(default="float16", metadata={"help": "float16 or float32, of what is stored."})
    teacher_dtype: str | None = field(
        default=None, metadata={"help": "The teacher's dtype: bfloat16, ..., or auto; default: the checkpoint's."}
    )
    allow_untrained_teacher: bool = field(
        default=False, metadata={"help": "Ask a teacher whose checkpoint lacks weights (it answers noise)."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "The first N texts only, for a quick try."})
    verified_rows: int = field(default=64, metadata={"help": "Rows asked about again afterwards."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the answers as a data set with a card."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Its name; default: the output folder's."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Make its repository a private one."})
    hub_token: str | None = field(default=None, metadata={"help": "Default: that of `hf auth login`, or HF_TOKEN."})
    name_private_teacher: bool = field(default=False, metadata={"help": "Name a private teacher on the card."})


def main(arguments: list[str]) -> None:
    (recipe,) = HfArgumentParser(RecipeArguments).parse_args_into_dataclasses(arguments)
    if not recipe.teacher:
        raise SystemExit(
            "--teacher is missing: a local folder or a Hub id. This trains one on the same task:\n"
            "    accelerate launch recipes/train_teacher.py --output_dir runs/train_teacher        (with the same data flags)\n"
            "and it then lies in runs/train_teacher/runs/teacher/seed-0/model"
        )
    source = recipe.train_file or recipe.dataset_name
    recipe.task = recipe.task or (None if source else "movie_sentences")
    name = recipe.task or Path(str(source)).stem
    transformers.utils.logging.disable_progress_bar()  # of loading weights
    datasets.disable_progress_bars()
    directory = Path(recipe.output_dir or f"runs/cache/{name}")
    repository = recipe.hub_dataset_id or directory.name
    if recipe.push_to_hub:  # before the teacher is asked
        repository = hub.check_access(repository, token=recipe.hub_token, repo_type="dataset")

    texts = load_text(recipe.task, recipe.dataset_name, train_file=recipe.train_file, require_labels=False)["train"]
    if recipe.max_rows is not None:
        texts = texts.select(range(min(recipe.max_rows, len(texts))))
    tokenizer = AutoTokenizer.from_pretrained(recipe.teacher)
    rows = tokenize(texts, tokenizer, recipe.max_length)
    teacher = ModelTeacher(recipe.teacher, dtype=recipe.teacher_dtype, allow_untrained=recipe.allow_untrained_teacher)

    print(f"Asking {teacher.facts()['name']} about {len(rows):,} texts of {name}", flush=True)
    started = time.monotonic()
    cache_teacher(
        rows,
        teacher,
        directory,
        processing_class=tokenizer,
        batch_size=recipe.batch_size,
        features=recipe.features,
        dtype=recipe.dtype,
    )
    seconds = time.monotonic() - started
    print(f"{len(rows) / seconds:,.0f} rows/s in {seconds:.1f} s (rows found in {directory} or beside it cost nothing)")
    largest = verify_cache(directory, rows, teacher, rows=recipe.verified_rows, processing_class=tokenizer)
    print(f"Verified on {min(recipe.verified_rows, len(rows))} rows: largest difference {largest:.2g}")
    facts = facts_of(recipe, teacher, read_json(directory / "manifest.json"), name)
    if not recipe.push_to_hub:
        write_card(facts, directory, "teacher_logits.md")
        return
    facts.repo_id, facts.student = repository, repository.rpartition("/")[2]
    facts.teacher_private = not recipe.name_private_teacher and bool(hub.is_private(facts.teacher, recipe.hub_token))
    write_card(facts, directory, "teacher_logits.md")
    upload = {"private": recipe.hub_private_repo, "token": recipe.hub_token, "repo_type": "dataset"}
    print(f"Pushed to {hub.publish(directory, repository, **upload).url}")


def facts_of(recipe: RecipeArguments, teacher: ModelTeacher, manifest: dict[str, Any], name: str) -> CardFacts:
    columns = {
        "example_id": "the row's number",
        "teacher_logits": f"{manifest['config'].get('num_labels')} logits a row",
    }
    if recipe.features:
        columns["teacher_features"] = "the encoder's last hidden states (tokens x hidden size, without padding)"
    names = manifest["config"].get("id2label") or {}
    row = TEXT_TASKS.get(recipe.task or "")
    return CardFacts(
        role="logits",
        student=f"{name}, answers of {teacher.name}",
        task=recipe.task or "",
        teacher=teacher.name,
        teacher_revision=teacher.commit,
        teacher_hash=manifest["weights"],
        datasets=[(row and row.path) or name],
        label_names=[names[number] for number in sorted(names, key=int)],
        rows=manifest["rows"],
        split="train",
        columns=columns,
        dtype=manifest["dtype"],
        view=manifest["view"],
        command=command(),
        versions=installed_versions(),
    )


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
