"""Further pre-train a RoBERTa on your texts, distil it from itself in rounds, fine-tune every stage on few labels, compare.

    accelerate launch recipes/self_distill_roberta.py                     # embedded texts and model, no network, 6 minutes
    accelerate launch recipes/self_distill_roberta.py --profile study     # the committed table of recipes/README.md, 1 hour
    accelerate launch recipes/self_distill_roberta.py --model_name_or_path FacebookAI/roberta-base \
        --train_file train.csv --test_file test.csv --text_column text --label_column label    # the paper's setting

The method is Lee et al., "Self-Distillation for Further Pre-training of Transformers" (ICLR 2023, arXiv 2210.02871).
Every stage and every fine-tuning seed is saved; `--resume_from_checkpoint True` goes on where a run was stopped.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hfkd import (
    DistillationTrainer,
    MaskedLMCollator,
    SelfDistillationArguments,
    SelfDistillationTrainer,
    two_view_model,
)
from hfkd.data import embedded
from hfkd.data.splits import low_resource_subset
from hfkd.data.text import TEXT_TASKS, label_names, load_text, tokenize
from hfkd.models.two_view import two_view_config
from hfkd.objectives import MaskedLM
from hfkd.regularized import noisy_model
from hfkd.trainers.arguments import parse_arguments
from hfkd.trainers.round_kinds import rows_hash
from program import say
from publication import push_rounds, write_classifier_card
from stage_fine_tuning import FineTuning, Labelled, check_baselines, stage_arguments
from stage_report import card_results, draw, stage_rows, table, write_csv
from stage_rounds import ablations, bounded, delete, earlier_run, resumes

HERE = Path(__file__).resolve().parent
OWN_DATA = ("--task", "--dataset_name", "--train_file", "--model_name_or_path", "--config")


@dataclass
class RecipeArguments:
    """Data, model and fine-tuning. The defaults are the paper's setting; `--profile` sets those of a short or long run."""

    profile: str = field(
        default="",
        metadata={"help": "demo | study | paper; by default paper where data, model or --config are given, else demo."},
    )
    task: str | None = field(default=None, metadata={"help": f"One of {', '.join(TEXT_TASKS)}."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set's Hub id or local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl, parquet or txt."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Same kinds; used by --evaluate_on validation."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Same kinds; the fine-tuned models are tested on it."}
    )
    text_column: str | None = field(default=None, metadata={"help": "The column with the text."})
    label_column: str | None = field(default=None, metadata={"help": "The column with the label: ids or any strings."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Start weights; default: embedded RoBERTa."})
    max_length: int = field(default=128, metadata={"help": "Tokens a text is cut at."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Static shapes (TPU, torch.compile)."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens masked."})
    head_warmup_steps: int = field(
        default=0, metadata={"help": "Steps on news with the body frozen, for the embedded model's untrained head."}
    )
    pretrain_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps of each round; default: num_train_epochs. --max_steps bounds it."},
    )
    labelled_rows: int | None = field(default=None, metadata={"help": "Labelled texts for fine-tuning; default: all."})
    fine_tuning_seeds: int = field(default=5, metadata={"help": "Fine-tuning runs per stage; 0 skips fine-tuning."})
    fine_tuning_epochs: float = field(default=10.0, metadata={"help": "Epochs of each fine-tuning run."})
    fine_tuning_batch_size: int = field(default=32, metadata={"help": "Texts per fine-tuning step, over processes."})
    fine_tuning_learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of fine-tuning."})
    evaluate_on: str = field(default="test", metadata={"help": "test | validation (to choose settings)."})
    test_rows: int | None = field(default=None, metadata={"help": "Test on the first N rows only (for a short run)."})
    baseline: list[str] = field(
        default_factory=list, metadata={"help": "recadam, mars, r3f: fine-tune the start weights with it as well."}
    )
    recadam_gamma: float = field(default=5000.0, metadata={"help": "Strength of RecAdam's recall."})
    recadam_t0: float = field(default=250.0, metadata={"help": "Step at which RecAdam weighs task and recall equally."})
    mars_bound: float = field(default=1.0, metadata={"help": "Largest row-sum distance to the start under MARS."})
    r3f_weight: float = field(default=1.0, metadata={"help": "Weight of R3F's symmetric KL."})
    ablation_steps: list[int] = field(
        default_factory=list, metadata={"help": "Further pre-training with these numbers of steps as well."}
    )
    ablation_no_pretrain_loss: bool = field(
        default=False, metadata={"help": "One round without the masked loss as well."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete the run that output_dir holds."})


def main() -> None:
    recipe, args = parse(sys.argv[1:])
    started = time.monotonic()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training keeps its own
    datasets.disable_progress_bars()
    written = earlier_run(recipe, args)
    texts, labelled = load_data(recipe, args)
    start = start_weights(recipe, args)
    tokenizer = AutoTokenizer.from_pretrained(start)
    rows = tokenize(texts, tokenizer, recipe.max_length)
    trainer = rounds_trainer(recipe, args, start, tokenizer, rows, Path(args.output_dir))
    delete(written, trainer)  # only now, when all inputs have proved right
    say(f"Round 0: further pre-training; then {args.num_rounds} round(s) of self-distillation ({len(rows):,} texts)")
    trainer.train(resume_from_checkpoint=resumes(args))
    stages = {"start": Path(args.output_dir) / "start", "further pre-trained": trainer.round_directory(0)}
    stages |= {f"self-distilled {number}": trainer.round_directory(number) for number in range(1, args.num_rounds + 1)}
    student = list(stages)[-1]

    def ablation_trainer(folder: Path, **changes: Any) -> SelfDistillationTrainer:
        return rounds_trainer(recipe, args, start, tokenizer, rows, folder, **changes)

    stages |= ablations(recipe, args, Path(args.output_dir), ablation_trainer)
    results = []
    if labelled:
        texts_with_labels = labelled_texts(recipe, args, labelled, tokenizer)
        results = FineTuning(recipe, args, texts_with_labels, student).run([stages], [recipe.labelled_rows])
    if trainer.is_world_process_zero():
        report(recipe, args, trainer, stages, student, results, time.monotonic() - started)


# ---- arguments and output folder ----


def parse(arguments: list[str]) -> tuple[RecipeArguments, SelfDistillationArguments]:
    own_data = any(word.split("=")[0] in OWN_DATA for word in arguments)
    only_profile = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_profile.add_argument("--profile", default="paper" if own_data else "demo")
    profile = only_profile.parse_known_args(arguments)[0].profile
    path = HERE / "configs" / f"self_distill_roberta_{profile}.yaml"
    if not path.is_file():
        raise ValueError(f"--profile {profile}: choose demo, study or paper, or give your own values with --config")
    recipe, args = parse_arguments(RecipeArguments, SelfDistillationArguments, arguments=arguments, defaults=path)
    if recipe.profile not in ("", profile):
        raise ValueError(
            f"profile: {recipe.profile} stands in a YAML file; give it as a flag, because it names a file itself"
        )
    recipe.profile = profile
    check_baselines(recipe)
    if recipe.model_name_or_path:
        two_view_config(recipe.model_name_or_path)
    if recipe.evaluate_on not in ("test", "validation"):
        raise ValueError(f"--evaluate_on {recipe.evaluate_on}: choose test or validation")
    return recipe, args


# ---- data and start weights ----


def load_data(recipe: RecipeArguments, args: SelfDistillationArguments) -> tuple[datasets.Dataset, Any]:
    """The unlabelled texts, and the labelled splits (None without fine-tuning)."""
    sources = (recipe.dataset_name, recipe.train_file)
    task = recipe.task or (None if any(sources) else "movie_sentences")
    with args.main_process_first(desc="loading data"):
        splits = load_text(
            task,
            recipe.dataset_name,
            recipe.dataset_config,
            recipe.train_file,
            recipe.validation_file,
            recipe.test_file,
            recipe.text_column,
            recipe.label_column,
            require_labels=recipe.fine_tuning_seeds > 0,
        )
    if recipe.fine_tuning_seeds and recipe.evaluate_on not in splits:
        raise ValueError(
            f"fine-tuning is evaluated on the {recipe.evaluate_on} split, but the data has {', '.join(splits)}: give "
            f"--{recipe.evaluate_on}_file, or --fine_tuning_seeds 0 to pre-train only"
        )
    if recipe.fine_tuning_seeds and recipe.labelled_rows:
        low_resource_subset(splits["train"]["label"], recipe.labelled_rows)  # too many asked for: say so now
    texts = splits["train"].select_columns("text")
    if task == "movie_sentences":
        plots_of_training = movie_plots_of(set(splits["train"]["group"]))
        texts = datasets.concatenate_datasets([texts, plots_of_training])
    return texts, splits if recipe.fine_tuning_seeds else None


def movie_plots_of(movies: set[str]) -> datasets.Dataset:
    """Plots of held-out movies stay unseen too, though they carry no label."""
    plots_dataset = embedded.movie_plots()
    kept = [row for row, movie in enumerate(plots_dataset["movie"]) if movie in movies]
    return plots_dataset.select(kept).select_columns("text")


def start_weights(recipe: RecipeArguments, args: SelfDistillationArguments) -> str:
    """A Hub id or folder as it is; or the embedded RoBERTa with a head warmed up on news, made once and kept."""
    if recipe.model_name_or_path:
        return recipe.model_name_or_path
    steps = bounded(recipe.head_warmup_steps, args)
    cache = Path(args.output_dir).parent / "cache"
    target = cache / f"roberta-minilm-head-{steps}-{recipe.max_length}-{recipe.mlm_probability}"
    with args.main_process_first(desc="embedded model"):
        plain = embedded.save_embedded_roberta(cache / "roberta-minilm")
    if not steps:
        return str(plain)
    if not (target / "whole").exists():
        warm_up_head(recipe, args, plain, target, steps)
    return str(target)


def warm_up_head(
    recipe: RecipeArguments, args: SelfDistillationArguments, plain: Path, target: Path, steps: int
) -> None:
    """Train the masked-language head alone: it starts at random, and would drag the body along otherwise."""
    model, tokenizer = two_view_model(str(plain)), AutoTokenizer.from_pretrained(plain)
    model.base_model.requires_grad_(False)
    news = embedded.news_articles().shuffle(seed=0)
    rows = tokenize(news.select(range(min(len(news), 32 * steps))), tokenizer, recipe.max_length)
    settings = stage_arguments(
        args, target, max_steps=steps, learning_rate=1e-3, per_device_train_batch_size=32 // args.world_size
    )
    settings.max_grad_norm = 1.0
    collator = MaskedLMCollator(tokenizer, recipe.mlm_probability)
    say(f"Warming up the masked-language head on {len(rows):,} pieces of news, {steps} steps, body frozen")
    trainer = DistillationTrainer(model, settings, collator, rows, processing_class=tokenizer, objective=MaskedLM())
    trainer.train()
    trainer.save_model(str(target))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (target / "whole").touch()
    trainer.accelerator.wait_for_everyone()


# ---- rounds ----


def rounds_trainer(
    recipe: RecipeArguments,
    args: SelfDistillationArguments,
    start: str,
    tokenizer: Any,
    rows: Any,
    output: Path,
    **changes: Any,
) -> SelfDistillationTrainer:
    """The trainer of round 0 and the rounds after it, with what only a recipe knows for the card."""
    settings = copy.copy(args)
    if recipe.pretrain_steps:
        settings.max_steps = bounded(recipe.pretrain_steps, args)
    settings.run_name = "/".join([Path(args.output_dir).name, *output.relative_to(args.output_dir).parts])
    for name, value in {"output_dir": str(output), **changes}.items():
        setattr(settings, name, value)
    length = recipe.max_length if recipe.pad_to_max_length else None
    trainer = SelfDistillationTrainer(
        args=settings,
        data_collator=MaskedLMCollator(tokenizer, recipe.mlm_probability, max_length=length, seed=args.seed),
        train_dataset=rows,
        processing_class=tokenizer,
        model_init=lambda: two_view_model(start),
    )
    facts = trainer.card_facts
    facts.start = recipe.model_name_or_path or "MiniLM-L6 in RoBERTa form (sentence-transformers/all-MiniLM-L6-v2)"
    facts.datasets = [recipe.dataset_name or recipe.task or Path(recipe.train_file or "movie_sentences").name]
    facts.task = recipe.task or ""
    facts.command = "accelerate launch recipes/self_distill_roberta.py " + shlex.join(sys.argv[1:])
    return trainer


# ---- fine-tuning ----


def labelled_texts(recipe: RecipeArguments, args: SelfDistillationArguments, splits: Any, tokenizer: Any) -> Labelled:
    train = tokenize(splits["train"], tokenizer, recipe.max_length, recipe.pad_to_max_length)
    held_out = tokenize(splits[recipe.evaluate_on], tokenizer, recipe.max_length, recipe.pad_to_max_length)
    if recipe.test_rows:
        held_out = held_out.select(range(min(recipe.test_rows, len(held_out))))
    # Neighbours of one length need little padding; the order of test rows changes nothing else
    held_out = held_out.select(np.argsort([len(ids) for ids in held_out["input_ids"]], kind="stable"))

    def load(directory: Path, labels: dict[str, Any], noisy: bool) -> Any:
        kind = noisy_model if noisy else AutoModelForSequenceClassification.from_pretrained
        return kind(str(directory), **labels)

    return Labelled(
        noun="texts",
        train=lambda seed: train,
        held_out=held_out,
        names=label_names(splits),
        metric=TEXT_TASKS[recipe.task].metric if recipe.task else "accuracy",
        load=load,
        collator=lambda seed: DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        budget={
            "num_train_epochs": recipe.fine_tuning_epochs,
            "max_steps": args.max_steps if args.max_steps > 0 else -1,
            "warmup_steps": 0.1,
        },
        settings={name: getattr(recipe, name) for name in ("fine_tuning_epochs", "test_rows", "max_length")},
        data=[rows_hash(train), rows_hash(held_out)],
    )


# ---- report ----


def report(
    recipe: RecipeArguments,
    args: SelfDistillationArguments,
    trainer: SelfDistillationTrainer,
    stages: dict[str, Path],
    student: str,
    results: list[dict[str, Any]],
    seconds: float,
) -> None:
    output = Path(args.output_dir)
    rows = stage_rows([stages], results)
    (output / "results.md").write_text(table(rows) + "\n", encoding="utf-8")
    write_csv(results, output / "results.csv")
    rounds = [trainer.round_directory(number) for number in range(args.num_rounds + 1)]
    steps = {"start": 0, "further pre-trained": trainer.finished_rounds()[0]["global_step"]}
    steps |= {f"further pre-trained, {number} steps": bounded(number, args) for number in recipe.ablation_steps}
    try:
        figures = draw(rows, rounds, output / "figures", steps)
    except ImportError as error:  # matplotlib is an extra
        figures, _ = [], print(f"no figures: {error}")
    trainer.card_facts.results = card_results(rows)
    trainer.card_facts.stage = student
    fine_tuned = output / "fine_tuned" / stages[student].name
    trainer.card_facts.student = f"{output.name}, round {args.num_rounds}"
    trainer.card_facts.limits = [
        f"Trained for the {recipe.profile} profile: {steps['further pre-trained']} steps a round."
    ]
    trainer.write_card(rounds[-1])
    if results:
        # `hfkd eval` draws its rows, and these are the first ones
        place = {} if recipe.test_rows else {"split": recipe.evaluate_on, "max_length": recipe.max_length}
        write_classifier_card(trainer, fine_tuned, "text-classification", place, results)
    print(f"\n{table(rows)}\n\nTook {seconds / 60:.1f} minutes ({recipe.profile}).")
    print(f"  student (masked LM)    {rounds[-1]}   card: {rounds[-1] / 'README.md'}")
    if results:
        print(f"  student, fine-tuned    {fine_tuned}")
    print(f"  tables                 {output / 'results.md'}, {output / 'results.csv'}")
    for figure in figures:
        print(f"  figure                 {figure}")
    if args.push_to_hub:
        push_rounds(trainer, fine_tuned if results else None)
    if recipe.profile == "demo":
        print(SMOKE_TEST + committed_study())


SMOKE_TEST = """
This was a smoke test: it shows that every stage runs, not that one method beats another. With so few steps, labels and
seeds the differences above are noise. The committed result of `--profile study` (recipes/README.md):

"""


def committed_study() -> str:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- study -->", "<!-- /study -->"
    return text.partition(begin)[2].partition(end)[0].strip() if begin in text else "(no study is committed yet)"


if __name__ == "__main__":
    main()
