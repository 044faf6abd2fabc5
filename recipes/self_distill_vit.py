"""Further pre-train a ViT-MAE on your images, distil it from itself in rounds, fine-tune every stage, compare.

    accelerate launch recipes/self_distill_vit.py                         # embedded digits and start, no network, 5 minutes
    accelerate launch recipes/self_distill_vit.py --profile study         # the tables of recipes/README.md, 30 minutes
    accelerate launch recipes/self_distill_vit.py --data_dir my_images    # the paper's setting, from facebook/vit-mae-base
    accelerate launch recipes/self_distill_vit.py --config recipes/configs/self_distill_vit_cifar100.yaml   # low-resource curve

The method is Lee et al., "Self-Distillation for Further Pre-training of Transformers" (ICLR 2023, arXiv 2210.02871), in the
settings of the authors' vision code. Without a model of yours the start is a small ViT-MAE, which is pre-trained here on
embedded MNIST digits, once, and kept in `cache` beside `output_dir`.

Every stage and every fine-tuning run is saved; `--resume_from_checkpoint True` goes on where a run was stopped. Choose
settings with `--evaluate_on validation`; `--max_steps` bounds every stage. The paper's studies are flags: --ablation_steps,
--ablation_matching, --ablation_no_pretrain_loss, --baseline, several --labelled_rows.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTMAEConfig, set_seed

from hfkd import SelfDistillationArguments, SelfDistillationTrainer, two_view_model
from hfkd.data.images import decoded, load_images
from hfkd.data.masked_images import MaskedImageCollator
from hfkd.data.pixels import COLUMNS, ImageCollator, PixelView
from hfkd.data.splits import low_resource_subset
from hfkd.diagnostics import plots
from hfkd.fingerprint import content_hash
from hfkd.models.two_view import two_view_config
from hfkd.models.two_view_mae import ViTMAEForPreTraining, refuse_wrong_patches
from hfkd.objectives.masked_images import MATCHING
from hfkd.records import read_json
from hfkd.regularized import noisy_model
from hfkd.teachers.model import image_processor_of
from hfkd.trainers.arguments import parse_arguments
from image_data import ImageArguments, augmentation_of, load_data, pixels_of
from program import HERE, at_random, one_sentence, one_source, quiet, rows_per_step, say
from publication import push_rounds, write_classifier_card
from reconstructions import draw_reconstructions
from stage_fine_tuning import FineTuning, Labelled, check_baselines
from stage_report import card_results, draw, label_curves, label_table, stage_rows, table, time_table, write_csv
from stage_rounds import Clock, ablations, bounded, delete, earlier_run, resumes

OWN_DATA = ("--task", "--dataset_name", "--data_dir", "--model_name_or_path", "--config")
START_SIZES = HERE / "configs" / "mae_4x64.yaml"
START = {  # how the embedded start is made: one setting, not searched
    **{"mask_ratio": 0.75, "learning_rate": 2e-3, "weight_decay": 0.05, "warmup_steps": 0.05, "seed": 0, "batch": 64},
    **{"adam_beta1": 0.9, "adam_beta2": 0.95, "lr_scheduler_type": "linear"},
}
ENCODER = (
    *("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "attention_probs_dropout_prob", "layer_norm_eps", "qkv_bias"),
    "initializer_range",
)
UNDECAYED = ("bias", "position_embeddings", "cls_token")  # in fine-tuning; LayerNorm weights are decayed


@dataclass
class RecipeArguments(ImageArguments):
    """Data, model and fine-tuning. The defaults are the paper's setting; `--profile` sets those of a short or long run."""

    profile: str = field(
        default="",
        metadata={"help": "demo | study | paper; by default paper where data, model or --config are given, else demo."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Start weights, a ViT-MAE; default: a small one, made on embedded digits."}
    )
    start_steps: int = field(default=2000, metadata={"help": "Steps that the embedded start is pre-trained for."})
    mask_ratio: float = field(default=0.75, metadata={"help": "Share of patches hidden."})
    pretrain_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps of each round; default: num_train_epochs. --max_steps bounds it."},
    )
    pretraining_seeds: int = field(
        default=1,
        metadata={"help": "Runs of all rounds; fine-tuning seed s starts from run s modulo their number."},
    )
    unlabelled_rows: int | None = field(
        default=None,
        metadata={
            "help": "Images of the rounds, drawn for each of their seeds, the labelled ones among them; default: all."
        },
    )
    train_on_validation: bool = field(
        default=False, metadata={"help": "The validation split is trained on too: the paper's vision code has none."}
    )
    labelled_rows: list[int] = field(
        default_factory=list,
        metadata={"help": "Labelled images for fine-tuning, default all; of several the table is for the first."},
    )
    fine_tuning_seeds: int = field(default=5, metadata={"help": "Fine-tuning runs per stage; 0 skips fine-tuning."})
    fine_tuning_steps: int = field(default=10_000, metadata={"help": "Steps of each fine-tuning run."})
    fine_tuning_warmup_steps: float = field(default=500, metadata={"help": "Of these; below 1 it is their share."})
    fine_tuning_batch_size: int = field(default=32, metadata={"help": "Images per fine-tuning step, over processes."})
    fine_tuning_learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of fine-tuning."})
    fine_tuning_dropout: float = field(default=0.1, metadata={"help": "The classifier's; a ViT-MAE itself has none."})
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
    ablation_matching: list[str] = field(
        default_factory=list, metadata={"help": "predictions, weights: one round that matches these instead, as well."}
    )


@dataclass(frozen=True)
class Pictures:
    """What the recipe reads: all training rows and the held-out ones, and how the model sees them."""

    train: Any
    held_out: Any
    labels: list[str]
    metric: str
    processor: Any
    config: Any

    def of_seed(self, recipe: RecipeArguments, number: int) -> Any:
        """The training rows that pre-training run `number` sees, and that fine-tuning runs from it may have labels of."""
        if recipe.unlabelled_rows is None or recipe.unlabelled_rows >= len(self.train):
            return self.train
        return self.train.select(low_resource_subset(self.train["label"], recipe.unlabelled_rows, number))


def prepare(arguments: list[str]) -> tuple[RecipeArguments, SelfDistillationArguments, Pictures, list[Path]]:
    """Whatever is wrong with the inputs is said here."""
    quiet()
    recipe, args = parse(arguments)
    written = earlier_run(recipe, args)
    config, processor = start_of(recipe)
    MaskedImageCollator(processor, config.patch_size)  # raises where its size is not the patches'
    pictures = load_pictures(recipe, args, config, processor)
    refuse_wrong_rows(recipe, args, pictures)
    return recipe, args, pictures, written


def run(recipe: RecipeArguments, args: SelfDistillationArguments, pictures: Pictures, written: list[Path]) -> None:
    started = time.monotonic()
    start = start_weights(recipe, args, pictures)
    trainers, stages = [], []
    for number in range(recipe.pretraining_seeds):
        new_trainer = partial(rounds_trainer, recipe, args, start, pictures, number)
        output = Path(args.output_dir) / (f"pretraining-seed-{number}" if number else "")
        trainers.append(trainer := new_trainer(output))
        if number == 0:
            delete(written, trainer)  # only now, when all inputs have proved right
        shown = f"then {args.num_rounds} round(s) of self-distillation ({len(trainer.train_dataset):,} images)"
        say(f"Pre-training run {number}: further pre-training, {shown}")
        trainer.train(resume_from_checkpoint=resumes(args))
        names = ["further pre-trained", *(f"self-distilled {round}" for round in range(1, args.num_rounds + 1))]
        rounds = {name: trainer.round_directory(round) for round, name in enumerate(names)}
        stages.append({"start": output / "start", **rounds, **ablations(recipe, args, output, new_trainer)})
    results = []
    if recipe.fine_tuning_seeds:
        tuning = FineTuning(recipe, args, labelled_images(recipe, args, pictures), names[-1])
        results = tuning.run(stages, label_counts(recipe, pictures))
    if args.process_index == 0:
        report(recipe, trainers[0], pictures, stages, names[-1], results, (time.monotonic() - started) / 60)


# ---- arguments ----


def parse(arguments: list[str]) -> tuple[RecipeArguments, SelfDistillationArguments]:
    own_data = any(word.split("=")[0] in OWN_DATA for word in arguments)
    only_profile = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_profile.add_argument("--profile", default="paper" if own_data else "demo")
    profile = only_profile.parse_known_args(arguments)[0].profile
    if profile not in ("demo", "study", "paper"):
        raise ValueError(f"--profile {profile}: choose demo, study or paper, or give your own values with --config")
    path = HERE / "configs" / f"self_distill_vit_{profile}.yaml"
    recipe, args = parse_arguments(RecipeArguments, SelfDistillationArguments, arguments=arguments, defaults=path)
    if recipe.profile not in ("", profile):
        raise ValueError(
            f"profile: {recipe.profile} stands in a YAML file; give it as a flag, because it names a file itself"
        )
    recipe.profile = profile
    recipe.evaluate_on = recipe.evaluate_on or "test"
    one_source(recipe, arguments)
    refuse_wrong_choices(recipe)
    return recipe, args


def refuse_wrong_choices(recipe: RecipeArguments) -> None:
    check_baselines(recipe)
    if odd := set(recipe.ablation_matching) - (set(MATCHING) - {"features"}):
        raise ValueError(f"--ablation_matching {' '.join(sorted(odd))}: choose among predictions, weights")
    if recipe.pretraining_seeds < 1 or recipe.pretraining_seeds > max(recipe.fine_tuning_seeds, 1):
        raise ValueError(
            f"--pretraining_seeds {recipe.pretraining_seeds} with --fine_tuning_seeds {recipe.fine_tuning_seeds}: every "
            "pre-training run needs a fine-tuning run to be scored by, so choose from 1 up to the number of those"
        )
    if any(steps < 1 for steps in [*recipe.ablation_steps, recipe.start_steps, recipe.fine_tuning_steps]):
        raise ValueError(
            f"steps must be 1 or more, got --ablation_steps {recipe.ablation_steps}, --start_steps {recipe.start_steps}, "
            f"--fine_tuning_steps {recipe.fine_tuning_steps}"
        )


# ---- images ----


def load_pictures(recipe: RecipeArguments, args: SelfDistillationArguments, config: Any, processor: Any) -> Pictures:
    """Every image is opened now, so that a damaged one is named before training."""
    data, view = load_data(recipe, args), PixelView.of(processor)
    train = data.train
    if recipe.train_on_validation and recipe.evaluate_on == "test" and recipe.train_rows is None and data.validation:
        train = together(train, data.validation)
        train = at_random(train, args.max_steps * rows_per_step(args) if args.max_steps > 0 else None)
    shown = pixels_of({"train": train, recipe.evaluate_on: data.held_out[""]}, view, recipe.skip_bad_images)
    return Pictures(
        train=shown["train"],
        held_out=shown[recipe.evaluate_on],
        labels=data.labels,
        metric=data.metric,
        processor=processor,
        config=config,
    )


def together(train: Any, validation: Any) -> Any:
    """One split. Rows of one source have numbers of their own already; those of two are numbered anew."""
    both = datasets.concatenate_datasets([train, validation])
    if len(set(both["example_id"])) == len(both):
        return both
    return both.remove_columns("example_id").add_column("example_id", list(range(len(both))))


def label_counts(recipe: RecipeArguments, pictures: Pictures) -> list[int | None]:
    """--max_steps may leave fewer rows than labels are asked for."""
    rows = len(pictures.of_seed(recipe, 0))
    return list(dict.fromkeys(min(count, rows) for count in recipe.labelled_rows)) or [None]


def refuse_wrong_rows(recipe: RecipeArguments, args: SelfDistillationArguments, pictures: Pictures) -> None:
    """Numbers of rows that the data cannot give; a run that --max_steps bounds takes fewer instead."""
    labels = pictures.train["label"]
    for count in [*([recipe.unlabelled_rows] if recipe.unlabelled_rows is not None else []), *recipe.labelled_rows]:
        low_resource_subset(labels, min(count, len(labels)) if args.max_steps > 0 else count)
    if recipe.unlabelled_rows is not None and max(recipe.labelled_rows, default=0) > recipe.unlabelled_rows:
        raise ValueError(
            f"--labelled_rows {max(recipe.labelled_rows)} with --unlabelled_rows {recipe.unlabelled_rows}: the labelled images "
            "are among those of the rounds, so ask for at most as many"
        )


# ---- start weights ----


def start_of(recipe: RecipeArguments) -> tuple[Any, Any]:
    """Configuration and image processor of the start weights, before there are any."""
    name = recipe.model_name_or_path
    if name is None:
        sizes = yaml.safe_load(START_SIZES.read_text(encoding="utf-8"))
        sizes |= {"image_size": recipe.image_size} if recipe.image_size is not None else {}
        config = ViTMAEConfig(**{**sizes, "mask_ratio": recipe.mask_ratio})
        refuse_wrong_patches(config)
        return config, ViTImageProcessorPil(size={"height": config.image_size, "width": config.image_size})
    config, processor = two_view_config(name, mask_ratio=recipe.mask_ratio), image_processor_of(name)
    if config.model_type != "vit_mae":
        raise ValueError(f"--model_name_or_path {name} is a {config.model_type!r} model: a ViT-MAE is needed here")
    if processor is None:
        raise ValueError(
            f"{name} has no image processor (preprocessor_config.json) that says how it sees images: save one beside it"
        )
    if recipe.image_size not in (None, config.image_size):
        raise ValueError(
            f"--image_size {recipe.image_size}, and {name} reads {config.image_size}: its position embeddings are not "
            "interpolated, so leave the flag out"
        )
    return config, processor


def start_weights(recipe: RecipeArguments, args: SelfDistillationArguments, pictures: Pictures) -> str:
    """A Hub id or folder as it is; or a small ViT-MAE, pre-trained on MNIST's training digits once and kept."""
    if recipe.model_name_or_path:
        return recipe.model_name_or_path
    steps, sizes = bounded(recipe.start_steps, args), pictures.config.to_dict() | {"mask_ratio": START["mask_ratio"]}
    settings = {**START, **{name: sizes[name] for name in sorted(sizes) if name != "transformers_version"}}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    folder = Path(args.output_dir).parent / "cache" / f"vit-mae-mnist-{steps}-{digest[:8]}"
    if not (folder / "round-0" / "done.json").exists():
        pretrain_start(args, pictures, folder, steps)
    return str(folder / "round-0")


def pretrain_start(args: SelfDistillationArguments, pictures: Pictures, folder: Path, steps: int) -> None:
    rows = decoded(load_images("mnist_5k")["train"], PixelView.of(pictures.processor)).remove_columns("label")
    settings = copy.copy(args)
    changes = {name: value for name, value in START.items() if name not in ("batch", "mask_ratio")}
    changes |= {"output_dir": str(folder), "max_steps": steps, "num_rounds": 0, "data_seed": START["seed"]}
    changes |= {"per_device_train_batch_size": max(START["batch"] // args.world_size, 1), "max_grad_norm": 0.0}
    for name, value in {**changes, "gradient_accumulation_steps": 1}.items():
        setattr(settings, name, value)
    config = copy.deepcopy(pictures.config)
    config.mask_ratio = START["mask_ratio"]
    set_seed(START["seed"])
    trainer = SelfDistillationTrainer(
        ViTMAEForPreTraining(config), settings, None, rows, processing_class=pictures.processor
    )
    trainer.card_facts.start, trainer.card_facts.datasets = "random weights", ["mnist_5k"]
    say(f"Pre-training the start, a ViT-MAE of {trainer.model.num_parameters():,} parameters, on {len(rows):,} digits")
    trainer.train(resume_from_checkpoint=True)


# ---- rounds ----


def rounds_trainer(
    recipe: RecipeArguments,
    args: SelfDistillationArguments,
    start: str,
    pictures: Pictures,
    number: int,
    output: Path,
    **changes: Any,
) -> SelfDistillationTrainer:
    """The trainer of round 0 and the rounds after it, with what only a recipe knows for the card."""
    settings = copy.copy(args)
    if recipe.pretrain_steps:
        settings.max_steps = bounded(recipe.pretrain_steps, args)
    seeds = {"seed": args.seed + number, "data_seed": args.data_seed + number}
    settings.run_name = "/".join([Path(args.output_dir).name, *output.relative_to(args.output_dir).parts])
    for name, value in {"output_dir": str(output), **seeds, **changes}.items():
        setattr(settings, name, value)
    settings.cache_teacher_features &= caching_is_equal(settings)
    trainer = SelfDistillationTrainer(
        args=settings,
        data_collator=MaskedImageCollator(pictures.processor, pictures.config.patch_size, seed=settings.seed),
        train_dataset=pictures.of_seed(recipe, number).remove_columns("label"),
        processing_class=pictures.processor,
        model_init=lambda: two_view_model(start, mask_ratio=recipe.mask_ratio, norm_pix_loss=True),
    )
    trainer.add_callback(Clock(trainer))
    facts = trainer.card_facts
    facts.start = recipe.model_name_or_path or "a small ViT-MAE, pre-trained on 3,500 digits of MNIST"
    facts.datasets = [recipe.dataset_name or recipe.task or Path(str(recipe.data_dir)).name]
    facts.task = recipe.task or ""
    facts.command = "accelerate launch recipes/self_distill_vit.py " + shlex.join(sys.argv[1:])
    facts.score_task = "image-classification"
    return trainer


def caching_is_equal(args: SelfDistillationArguments) -> bool:
    """Whether the teacher's kept answers are those it would give: one float32 vector an image, which depends on no mask."""
    return args.matching == "features" and args.feature != "tokens" and not (args.bf16 or args.fp16)


# ---- fine-tuning ----


def labelled_images(recipe: RecipeArguments, args: SelfDistillationArguments, pictures: Pictures) -> Labelled:
    augmentation, runs = augmentation_of(recipe), recipe.pretraining_seeds
    pixels = [name for name in pictures.train.column_names if name in COLUMNS]
    recorded = ("fine_tuning_steps", "fine_tuning_warmup_steps", "fine_tuning_dropout", "unlabelled_rows")

    def collator(seed: int) -> ImageCollator:
        return ImageCollator(pictures.processor, augmentation=augmentation, num_labels=len(pictures.labels), seed=seed)

    return Labelled(
        noun="images",
        train=lambda seed: pictures.of_seed(recipe, seed % runs),
        held_out=pictures.held_out,
        names=pictures.labels,
        metric=pictures.metric,
        load=partial(load_classifier, dropout=recipe.fine_tuning_dropout),
        collator=collator,
        processing_class=pictures.processor,
        budget={
            "max_steps": bounded(recipe.fine_tuning_steps, args),
            "warmup_steps": recipe.fine_tuning_warmup_steps,
            "max_grad_norm": 1.0,
        },
        settings={**{name: getattr(recipe, name) for name in recorded}, **collator(0).settings()},
        data=[content_hash(rows, [*pixels, "label"])[0] for rows in (pictures.train, pictures.held_out)],
        decays=lambda name, parameter: not any(word in name for word in UNDECAYED),
    )


def load_classifier(directory: Path, labels: dict[str, Any], noisy: bool, dropout: float) -> Any:
    """The encoder of a ViT-MAE under a new head, as in the authors' code: linear, on the CLS state."""
    masked = ViTMAEConfig.from_pretrained(directory)
    sizes = {name: getattr(masked, name) for name in ENCODER}
    config = ViTConfig(**sizes, hidden_dropout_prob=dropout, **labels)
    if noisy:
        return noisy_model(str(directory), config=config)
    return ViTForImageClassification.from_pretrained(
        directory, config=config, dtype=torch.float32, use_safetensors=True
    )


# ---- report ----


def report(
    recipe: RecipeArguments,
    trainer: SelfDistillationTrainer,
    pictures: Pictures,
    stages: list[dict[str, Path]],
    student: str,
    results: list[dict[str, Any]],
    minutes: float,
) -> None:
    output = Path(trainer.args.output_dir)
    rows = stage_rows(stages, results)
    texts = {"results": f"{table(rows)}\n\n{seeded(recipe)}", "seconds": time_table(rows)}
    shown = list(stages[0])[: list(stages[0]).index(student) + 1]
    if curves := label_curves(results, shown):
        texts["labels"] = label_table(curves, pictures.metric)
    for name, text in texts.items():
        (output / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    write_csv(results, output / "results.csv")
    figures = draw_all(recipe, trainer, pictures, stages[0], shown, rows, curves)
    write_cards(recipe, trainer, rows, student, results, len(pictures.held_out))
    print("\n" + "\n\n".join(texts.values()) + f"\n\nTook {minutes:.1f} minutes ({recipe.profile}).")
    directory = stages[0][student]
    print(f"  student (masked)       {directory}   card: {directory / 'README.md'}")
    if results:
        print(f"  student, fine-tuned    {output / 'fine_tuned' / directory.name}")
    print(
        f"  tables                 {', '.join(str(output / f'{name}.md') for name in texts)}, {output / 'results.csv'}"
    )
    for figure in figures:
        print(f"  figure                 {figure}")
    if trainer.args.push_to_hub:
        push_rounds(trainer, output / "fine_tuned" / directory.name if results else None)
    if recipe.profile == "demo":
        print(SMOKE_TEST + committed_study())


def seeded(recipe: RecipeArguments) -> str:
    """What the spread over seeds contains, and what it does not."""
    runs, seeds = recipe.pretraining_seeds, recipe.fine_tuning_seeds
    rounds = "one run of all rounds" if runs == 1 else f"{runs} runs of all rounds (order, masks"
    rounds += (
        f", the {recipe.unlabelled_rows:,} images drawn)" if runs > 1 and recipe.unlabelled_rows else ")" * (runs > 1)
    )
    which = "" if runs == 1 else f"; seed s starts from run s modulo {runs}"
    if 1 < runs < seeds:
        which += ", so seeds that share a run are not independent and the intervals are too narrow"
    return (
        f"Seeds: {rounds}; {seeds} fine-tuning seeds (labelled subset, head, order, augmentation){which}. The start weights "
        "are the same throughout."
    )


def draw_all(
    recipe: RecipeArguments,
    trainer: SelfDistillationTrainer,
    pictures: Pictures,
    stages: dict[str, Path],
    shown: list[str],
    rows: list[dict[str, Any]],
    curves: dict[str, dict[int, list[float]]],
) -> list[Path]:
    folder = Path(trainer.args.output_dir) / "figures"
    steps = {"start": 0, "further pre-trained": trainer.finished_rounds()[0]["global_step"]}
    steps |= {f"further pre-trained, {number} steps": bounded(number, trainer.args) for number in recipe.ablation_steps}
    try:
        draw(rows, [stages[name] for name in shown[1:]], folder, steps)
        named = {name: stages[name] for name in dict.fromkeys(["start", "further pre-trained", shown[-1]])}
        draw_reconstructions(named, pictures.held_out, pictures.processor, folder / "reconstructions.png")
        if curves:
            percent = {stage: {n: [100 * v for v in values] for n, values in c.items()} for stage, c in curves.items()}
            plots.curves(percent, "labelled images", f"{pictures.metric} (%)", folder / "labels.png")
    except ImportError as error:  # matplotlib is an extra
        print(f"no figures: {error}")
    return sorted(folder.glob("*.png"))


def write_cards(
    recipe: RecipeArguments,
    trainer: SelfDistillationTrainer,
    rows: list[Any],
    student: str,
    results: list[Any],
    rows_scored: int,
) -> None:
    output, facts = Path(trainer.args.output_dir), trainer.card_facts
    facts.results, facts.stage = card_results(rows), student
    facts.student = f"{output.name}, round {trainer.args.num_rounds}"
    steps = trainer.finished_rounds()[-1]["global_step"]
    facts.limits = [f"Trained for the {recipe.profile} profile: {steps} steps a round."]
    directory = trainer.round_directory(trainer.args.num_rounds)
    hashes = ("objective", "rows", "start")
    record = {name: value for name, value in read_json(output / "rounds.json").items() if name not in hashes}
    objective = trainer.round_objective if trainer.args.num_rounds else trainer.objective
    settings = {**objective.settings(), "num_rounds": trainer.args.num_rounds, **record}
    trainer.write_card(directory, settings=settings)
    if results:
        folder = output / "fine_tuned" / directory.name
        place = {"split": recipe.evaluate_on, "rows": rows_scored}
        write_classifier_card(trainer, folder, "image-classification", place, results, settings=settings)


SMOKE_TEST = """
This was a smoke test: it shows that every stage runs, not that one method beats another. With so few steps, labels and
seeds the differences above are noise. The committed result of `--profile study` (recipes/README.md):

"""


def committed_study() -> str:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- vit study -->", "<!-- /vit study -->"
    return text.partition(begin)[2].partition(end)[0].strip() if begin in text else "(no study is committed yet)"


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    run(*prepared)
