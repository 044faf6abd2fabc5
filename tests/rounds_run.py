"""A small run of rounds, started as a script by the laws that need processes of their own.

python tests/rounds_run.py OUTPUT '{"num_rounds": 2}' [--dropout 0.1] [--double] [--resume] [--images]
"""

import argparse
import json

import datasets
import numpy as np
import torch
import transformers
from peft import LoraConfig, TaskType

from hfkd import DistillationArguments, DistillationTrainer, SelfDistillationArguments, SelfDistillationTrainer
from hfkd.models.two_view import RobertaForMaskedLM
from hfkd.models.two_view_mae import ViTMAEForPreTraining
from hfkd.objectives import KD, AttentionMaps, HiddenStates, MiniLMRelations
from hfkd.teachers import AdapterTeacher
from hfkd.testing import tiny_roberta_config, tiny_rows, tiny_tokenizer, tiny_vit_mae_config


def start_model(dropout: float = 0.0, double: bool = False) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    config = tiny_roberta_config(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = RobertaForMaskedLM(config)
    return model.double() if double else model


def rounds_arguments(output, settings) -> SelfDistillationArguments:
    values = {
        "output_dir": str(output),
        "num_rounds": 2,
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    return SelfDistillationArguments(**values)


def rounds_trainer(output, settings, dropout=0.0, double=False, rows=32, **kwargs) -> SelfDistillationTrainer:
    return SelfDistillationTrainer(
        args=rounds_arguments(output, settings),
        train_dataset=datasets.Dataset.from_list(tiny_rows(rows)),
        processing_class=tiny_tokenizer(),
        model_init=lambda: start_model(dropout, double),
        **kwargs,
    )


def start_image_model(double: bool = False, **config) -> ViTMAEForPreTraining:
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(tiny_vit_mae_config(**config))
    return model.double() if double else model


def image_rows(count=32, size=16, seed=0) -> datasets.Dataset:
    """Random pictures, already decoded, with labels that further pre-training must not read."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    features = {"pixels": datasets.Array3D((size, size, 3), "uint8"), "label": datasets.ClassLabel(2)}
    return datasets.Dataset.from_dict(
        {"pixels": list(pixels), "label": [i % 2 for i in range(count)]}, datasets.Features(features)
    )


def image_processor(size=16) -> transformers.ViTImageProcessorPil:
    return transformers.ViTImageProcessorPil(size={"height": size, "width": size})


def image_rounds_trainer(output, settings, double=False, **kwargs) -> SelfDistillationTrainer:
    given = {
        "train_dataset": image_rows(),
        "processing_class": image_processor(),
        "model_init": lambda: start_image_model(double),
        **kwargs,
    }
    return SelfDistillationTrainer(args=rounds_arguments(output, settings), **given)


def classifier_trainer(output, settings, double=True, head="sequence", **kwargs) -> DistillationTrainer:
    """No teacher: the baseline. `token` heads carry ragged numbers of labels a row, -100 elsewhere."""
    torch.manual_seed(0)
    kind = {"sequence": "RobertaForSequenceClassification", "token": "RobertaForTokenClassification"}[head]
    model = getattr(transformers, kind)(tiny_roberta_config(num_labels=3))
    rows = tiny_rows(32)
    for i, row in enumerate(rows):
        ids = row["input_ids"]
        row["labels"] = i % 3 if head == "sequence" else [-100 if t % 2 else t % 3 for t in ids]
    collate = {
        "sequence": transformers.DataCollatorWithPadding,
        "token": transformers.DataCollatorForTokenClassification,
    }[head](tiny_tokenizer())
    values = {
        "output_dir": str(output),
        "max_steps": 5,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    return DistillationTrainer(
        model.double() if double else model,
        DistillationArguments(**values),
        collate,
        datasets.Dataset.from_list(rows),
        **kwargs,
    )


DISTILLED = {
    "kd": (16, lambda: KD(temperature=3.0, alpha=0.7)),
    "kd_token": (16, lambda: KD(temperature=3.0, alpha=0.7)),
    "hidden": (24, lambda: HiddenStates(alpha=0.5)),
    "hidden_only": (24, lambda: HiddenStates(loss="cosine", alpha=1.0)),
    "relations": (16, lambda: MiniLMRelations(alpha=1.0)),
    "adapter": (16, lambda: KD(temperature=3.0, alpha=0.7)),
    "maps": (16, lambda: AttentionMaps(loss="kl", alpha=0.5)),
}


def distilled_trainer(output, settings, which, double=True, adapter_teacher=True) -> DistillationTrainer:
    """A student with a teacher, for each kind of answer; `hidden` has a wider teacher, hence projections that train.

    `adapter`: a LoRA student taught by itself without its adapter, or by a second copy of the base."""
    width, objective = DISTILLED[which]
    head = "token" if which == "kd_token" else "sequence"
    kind = {"sequence": "RobertaForSequenceClassification", "token": "RobertaForTokenClassification"}[head]
    torch.manual_seed(0 if which == "adapter" else 1)
    teacher = getattr(transformers, kind)(tiny_roberta_config(num_labels=3, hidden_size=width))
    teacher = teacher.double() if double else teacher
    lora = LoraConfig(TaskType.SEQ_CLS, r=2, target_modules=["query", "value"], init_lora_weights=False)
    more = {"peft_config": lora} if which == "adapter" else {}
    if which == "adapter" and adapter_teacher:
        teacher = AdapterTeacher()
    return classifier_trainer(output, settings, double, head, teacher=teacher, objective=objective(), **more)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--images", action="store_true")
    parser.add_argument("--distilled", choices=DISTILLED)
    given = parser.parse_args()
    if given.distilled:
        trainer = distilled_trainer(given.output, given.settings, given.distilled, given.double)
    elif given.images:
        trainer = image_rounds_trainer(given.output, given.settings, given.double)
    else:
        trainer = rounds_trainer(given.output, given.settings, given.dropout, given.double)
    trainer.train(resume_from_checkpoint=given.resume)


if __name__ == "__main__":
    main()
