"""What people who tried existing tools ran into, one test a line; where the copied snippet has the defect, it is shown first."""

import copy
import json

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, TaskType
from safetensors.torch import load_file

import copied_snippet
from hfkd import DistillationArguments, DistillationTrainer
from hfkd.objectives import (
    KD,
    AttentionMaps,
    CrossEntropy,
    GeneralizedJSD,
    HiddenStates,
    MiniLMRelations,
    PseudoLabel,
)
from hfkd.teachers import CachedTeacher, EnsembleTeacher, ModelTeacher
from hfkd.testing import tiny_roberta_config, tiny_rows, tiny_tokenizer
from hfkd.trainers.arguments import DistillationTrainingArguments
from rounds_run import classifier_trainer


def classifier(seed=1, dropout=0.0, **overrides):
    torch.manual_seed(seed)
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = tiny_roberta_config(**{"num_labels": 3, **dropouts, **overrides})
    return transformers.RobertaForSequenceClassification(config)


def labelled_rows(count=32, labels=3):
    return datasets.Dataset.from_list([{**row, "labels": i % labels} for i, row in enumerate(tiny_rows(count))])


def values(output, **settings):
    usual = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1}
    fixed = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return {"output_dir": str(output), **usual, **fixed, **settings}


def snippet_trainer(output, module=copied_snippet, **settings):
    """As people write it. `module` is where its two classes are imported from."""
    args = module.DistillationTrainingArguments(**values(output, alpha=0.3, temperature=3.0, **settings))
    return module.DistillationTrainer(
        classifier(0),
        args=args,
        teacher_model=classifier(1),
        train_dataset=labelled_rows(),
        data_collator=transformers.DataCollatorWithPadding(tiny_tokenizer()),
    )


def our_trainer(output, teacher=None, objective=None, model=None, **settings):
    kwargs = {
        name: settings.pop(name) for name in ("train_dataset", "eval_dataset", "data_collator") if name in settings
    }
    more = {n: settings.pop(n) for n in ("compute_metrics", "callbacks", "peft_config", "model_init") if n in settings}
    return DistillationTrainer(
        None if "model_init" in more else (model or classifier(0)),
        DistillationArguments(**values(output, **settings)),
        processing_class=tiny_tokenizer(),
        **{"train_dataset": labelled_rows(), **kwargs},
        **more,
        teacher=teacher,
        objective=objective,
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- the copied snippet runs unchanged, but for its import ----


class OurModule:
    DistillationTrainer = DistillationTrainer
    DistillationTrainingArguments = DistillationTrainingArguments


def test_the_copied_snippet_works_unchanged_apart_from_its_import(tmp_path):
    """Its alpha weights the task: read as ours, every project that moves over would silently swap the two terms."""
    theirs = losses(snippet_trainer(tmp_path / "a"))
    with pytest.warns(FutureWarning) as hints:
        ours = losses(snippet_trainer(tmp_path / "b", OurModule))
    assert ours == pytest.approx(theirs, rel=1e-5)
    said = " ".join(str(hint.message) for hint in hints)
    assert "alpha=0.7" in said and "teacher=" in said


def test_the_snippets_alpha_is_turned_round_once(tmp_path):
    """A conversion that runs again in copies of the arguments gives back the wrong alpha."""
    with pytest.warns(FutureWarning):
        args = DistillationTrainingArguments(output_dir=str(tmp_path), alpha=0.2)
    assert args.alpha == pytest.approx(0.8) and args.temperature == 2.0
    assert copy.deepcopy(args).alpha == pytest.approx(0.8)


# ---- "gradient accumulation scales the loss" ----


def test_accumulation_scales_the_snippets_loss_and_not_ours(tmp_path):
    """Four times the gradient at four accumulation steps: people tune the learning rate to a bug."""
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    norm = {}
    for name, make in (
        ("snippet", snippet_trainer),
        ("ours", lambda *a, **k: our_trainer(*a, classifier(1), KD(), **k)),
    ):
        for run, settings in (("8x1", {}), ("2x4", parts)):
            trainer = make(tmp_path / f"{name}{run}", max_steps=1, **settings)
            trainer.train()
            norm[name, run] = next(e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e)
    assert norm["snippet", "2x4"] / norm["snippet", "8x1"] == pytest.approx(4, rel=1e-3)
    assert norm["ours", "2x4"] == pytest.approx(norm["ours", "8x1"], rel=1e-4)


# ---- "T^2, alpha and reduction differ between libraries" ----


def test_one_documented_formula(tmp_path):
    """KLDivLoss' default mean divides by the classes too: the soft term is 1,000 times weaker on ImageNet."""
    student, teacher = torch.randn(4, 1000).double(), torch.randn(4, 1000).double()
    output = transformers.utils.ModelOutput(logits=student)
    found = KD(temperature=4.0, alpha=1.0)(output, type("Answer", (), {"logits": teacher}), {})["distill_loss"]
    for row in range(4):
        t, s = (torch.softmax(x[row] / 4, -1).tolist() for x in (teacher, student))
        expected = 16 * sum(
            p * (torch.tensor(p).log() - torch.tensor(q).log()).item() for p, q in zip(t, s, strict=True)
        )
        assert found[row].item() == pytest.approx(expected, rel=1e-5)
    assert "T^2" in KD.equation


# ---- "teacher in train mode, trainable, or in the optimizer" ----


def test_the_snippets_teacher_is_trainable_and_ours_is_frozen(tmp_path):
    """A teacher with gradients costs their memory; one in train mode gives targets with dropout in them."""
    theirs = snippet_trainer(tmp_path / "a")
    assert all(parameter.requires_grad for parameter in theirs.teacher.parameters())
    teacher = classifier(1, dropout=0.5).train()
    before = copy.deepcopy(teacher.state_dict())
    ours = our_trainer(tmp_path / "b", teacher, KD())
    ours.train()
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    optimised = {id(p) for group in ours.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(parameter) for parameter in teacher.parameters()}


# ---- "teacher saved inside the checkpoint" ----


def test_a_checkpoint_holds_the_student_only(tmp_path):
    """A student twice its size on the Hub that no plain from_pretrained loads without warnings."""
    trainer = our_trainer(tmp_path, classifier(1), KD(), save_strategy="steps", save_steps=2)
    trainer.train()
    classifier(0).save_pretrained(tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "model.safetensors").keys()
    assert load_file(tmp_path / "checkpoint-4" / "model.safetensors").keys() == expected
    assert not (tmp_path / "checkpoint-4" / "objective.safetensors").exists()


# ---- "wrong or random teacher weights" ----


def test_a_teacher_with_a_fresh_head_is_refused(tmp_path):
    """from_pretrained only warns: the student then learns noise for a day."""
    body = transformers.RobertaForMaskedLM(tiny_roberta_config(num_labels=3))
    body.save_pretrained(tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    config["architectures"] = ["RobertaForSequenceClassification"]
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="(?s)classifier.*allow_untrained_teacher"):
        our_trainer(tmp_path / "run", str(tmp_path / "teacher"), KD())
    our_trainer(tmp_path / "run", str(tmp_path / "teacher"), KD(), allow_untrained_teacher=True)


def test_a_teacher_no_better_than_chance_is_said_before_training(tmp_path, capfd):
    """Three figures before the first step: else the first hint is a bad student, hours later."""
    transformers.utils.logging.get_logger("hfkd.trainers.teacher_check").setLevel("INFO")
    wrong = classifier(1)
    with torch.no_grad():
        wrong.classifier.out_proj.weight.zero_()
        wrong.classifier.out_proj.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    trainer = our_trainer(tmp_path, wrong, KD(), max_steps=1)
    trainer.train()
    scores = trainer.teacher_scores
    assert scores["teacher"] == scores["chance"] == pytest.approx(11 / 32)  # labels 0, 1, 2 in turn over 32 rows


# ---- "label maps differ (MNLI order!)" ----


def named(model, *names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    return model


def test_labels_are_matched_by_name_where_the_snippet_matches_by_number(tmp_path):
    """roberta-large-mnli says contradiction where the data set says entailment: a student that learns the opposite."""
    ours = ("entailment", "neutral", "contradiction")
    teacher = named(classifier(1), "CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    plain = copy.deepcopy(teacher)
    trainer = our_trainer(tmp_path, teacher, KD(), named(classifier(0), *ours))
    batch = trainer.data_collator([{"input_ids": [0, 7, 2], "attention_mask": [1, 1, 1]}])
    assert torch.equal(trainer.teacher(batch).logits, plain.eval()(**batch).logits[:, [2, 1, 0]])


def test_labels_that_do_not_match_are_shown(tmp_path):
    """'Size mismatch' two hours in says nothing about which class is missing."""
    with pytest.raises(ValueError, match="(?s)good.*positive"):
        our_trainer(tmp_path, named(classifier(1), "a", "b", "positive"), KD(), named(classifier(0), "a", "b", "good"))
    with pytest.raises(ValueError, match="(?s)4.*3|3.*4"):
        our_trainer(tmp_path, classifier(1, num_labels=4), KD())


# ---- "tokenizer or vocabulary differs" ----


def test_another_vocabulary_needs_a_teacher_view(tmp_path):
    """The snippet feeds the student's token ids to a teacher of another vocabulary: fluent nonsense, no error."""
    with pytest.raises(ValueError, match="(?s)50.*80.*teacher_input_ids"):
        our_trainer(tmp_path, classifier(1, vocab_size=80), KD())
    rows = labelled_rows()
    ids = [[token + 20 for token in row] + [60] * (i % 3) for i, row in enumerate(rows["input_ids"])]
    rows = rows.add_column("teacher_input_ids", ids).add_column("teacher_attention_mask", [[1] * len(i) for i in ids])
    trainer = our_trainer(tmp_path, classifier(1, vocab_size=80), KD(), train_dataset=rows)
    trainer.train()
    with pytest.raises(ValueError, match="DistillationCollator"):
        collator = transformers.DataCollatorWithPadding(tiny_tokenizer())
        our_trainer(tmp_path, classifier(1, vocab_size=80), KD(), train_dataset=rows, data_collator=collator)


# ---- "the logits column is pruned" ----


def test_cached_logits_reach_the_objective(tmp_path):
    """The stock Trainer drops columns that the student's forward does not name."""
    rows = labelled_rows()
    cached = rows.add_column("teacher_logits", torch.randn(32, 3).tolist())
    assert (
        "teacher_logits"
        not in transformers.Trainer(
            classifier(0), transformers.TrainingArguments(str(tmp_path / "a"), use_cpu=True), train_dataset=cached
        )
        ._remove_unused_columns(cached)
        .column_names
    )
    found = losses(our_trainer(tmp_path / "b", CachedTeacher(), KD(), train_dataset=cached))
    assert len(found) == 4


# ---- "cached logits against fresh augmentation" ----


def test_cached_answers_are_refused_for_another_view(tmp_path):
    """Random masks change the input, and the cached answer belongs to the old one."""
    rows = labelled_rows().add_column("teacher_logits", torch.randn(32, 3).tolist())
    from hfkd import MaskedLMCollator

    with pytest.raises(ValueError, match="(?s)plain.*masked_lm"):
        our_trainer(
            tmp_path, CachedTeacher(), KD(), train_dataset=rows, data_collator=MaskedLMCollator(tiny_tokenizer())
        )


# ---- "NaN in reverse KL, bf16" ----


@pytest.mark.parametrize("interpolation", [0.0, 0.5, 1.0])
def test_divergences_stay_finite_in_bfloat16_at_large_logits(interpolation):
    """softmax then log gives log(0): one confident teacher turns the run into NaN."""
    student = (torch.randn(8, 5) * 1e4).bfloat16().requires_grad_(True)
    answer = type("Answer", (), {"logits": (torch.randn(8, 5) * 1e4).bfloat16()})
    terms = GeneralizedJSD(interpolation, alpha=1.0)(transformers.utils.ModelOutput(logits=student), answer, {})
    terms["distill_loss"].sum().backward()
    assert torch.isfinite(terms["distill_loss"]).all() and torch.isfinite(student.grad).all()


def test_bad_teacher_logits_name_their_rows(tmp_path):
    """One NaN in a million cached rows: without its number nobody finds it."""
    logits = torch.randn(32, 3)
    logits[17, 1] = float("nan")
    rows = labelled_rows().add_column("teacher_logits", logits.tolist())
    with pytest.raises(ValueError, match=r"(?s)NaN or infinite.*\[17\]"):
        our_trainer(tmp_path, CachedTeacher(), KD(), train_dataset=rows).train()


def test_bf16_training_runs(tmp_path):
    """Mixed precision is what people run: teacher and student must be compared in one precision, the loss in float32."""
    found = losses(our_trainer(tmp_path, classifier(1), KD(), bf16=True))
    exact = losses(our_trainer(tmp_path, classifier(1), KD()))
    assert found == pytest.approx(exact, rel=0.02)


# ---- "compute_metrics / hyper-parameter search missing" ----


def test_predictions_are_the_students_logits_only(tmp_path):
    """Teacher logits or hidden states in predictions silently become what accuracy is computed from."""
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    teacher = classifier(1)
    teacher.classifier.out_proj.weight.data *= 50  # an untrained teacher answers next to nothing
    trainer = our_trainer(
        tmp_path,
        teacher,
        KD(),
        compute_metrics=compute_metrics,
        eval_dataset=labelled_rows(16),
        eval_teacher=True,
    )
    metrics = trainer.evaluate()
    assert isinstance(seen[0], type(torch.zeros(1).numpy())) and seen[0].shape == (16, 3)
    assert {"eval_loss", "eval_accuracy", "eval_distill_loss", "eval_agreement"} <= metrics.keys()
    model, teacher = trainer.model.eval(), trainer.teacher.model
    same, task, distance = 0, 0.0, 0.0
    for row in labelled_rows(16):
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        ours, theirs = model(**inputs).logits[0].double(), teacher(**inputs).logits[0].double()
        same += int(ours.argmax() == theirs.argmax())
        task -= ours.log_softmax(-1)[row["labels"]].item() / 16
        p, q = (theirs / 2).log_softmax(-1), (ours / 2).log_softmax(-1)
        distance += 0.5 * 4 * (p.exp() * (p - q)).sum().item() / 16
    assert metrics["eval_agreement"] == same / 16
    assert metrics["eval_loss"] == pytest.approx(task, rel=1e-5)
    assert metrics["eval_distill_loss"] == pytest.approx(distance, rel=1e-4)


def test_unlabelled_rows_are_predicted(tmp_path):
    """The teacher's columns and the row number reach the student's forward, which does not know them."""
    trainer = our_trainer(tmp_path, classifier(1), KD())
    rows = labelled_rows(16).remove_columns("labels")
    rows = rows.add_column("teacher_input_ids", rows["input_ids"][:])
    assert trainer.predict(rows).predictions.shape == (16, 3)


def test_a_search_loads_the_teacher_once(tmp_path):
    """One teacher per trial fills the memory after a few trials."""
    classifier(1).save_pretrained(tmp_path / "teacher")
    made, teachers = [], []

    def model_init(trial=None):
        made.append(classifier(0))
        return made[-1]

    trainer = our_trainer(
        tmp_path / "run", str(tmp_path / "teacher"), KD(), model_init=model_init, eval_dataset=labelled_rows(16)
    )
    trainer.add_callback(NoteTeacher(trainer, teachers))
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        n_trials=2,
        backend="optuna",
    )
    assert best.hyperparameters["learning_rate"] > 0
    assert len(teachers) == 2 and len(set(teachers)) == 1 and len({id(model) for model in made}) >= 3


class NoteTeacher(transformers.TrainerCallback):
    def __init__(self, trainer, teachers):
        self.trainer, self.teachers = trainer, teachers

    def on_train_begin(self, args, state, control, **kwargs):
        self.teachers.append(id(self.trainer.teacher.model))


# ---- PEFT ----


def test_a_lora_student_is_saved_loaded_and_merged(tmp_path):
    """An adapter that is saved without its head, or merged wrongly, scores like chance after loading."""
    from peft import PeftModel

    lora = LoraConfig(TaskType.SEQ_CLS, r=2, target_modules=["query", "value"], init_lora_weights=False)
    trainer = our_trainer(tmp_path, classifier(1), KD(), peft_config=lora)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    saved = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert saved and all("lora" in name or "classifier" in name for name in saved)
    batch = trainer.data_collator([{"input_ids": [0, 7, 9, 2], "attention_mask": [1] * 4}])
    expected = trainer.model.eval()(**batch).logits
    loaded = PeftModel.from_pretrained(classifier(0), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**batch).logits, expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is transformers.RobertaForSequenceClassification
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=1e-4)


# ---- bad input ----


def test_two_objectives_at_once_are_refused(tmp_path):
    """A temperature on the command line that the objective in the code overrides looks as if it had no effect."""
    with pytest.raises(ValueError, match="keep one"):
        our_trainer(tmp_path, classifier(1), KD(), temperature=4.0)


def test_arguments_name_the_objective(tmp_path):
    """Flags that are parsed and then not used are worse than unknown flags."""
    extra = '{"temperature_on": "teacher"}'
    args = DistillationArguments(**values(tmp_path), objective="kd", temperature=4.0, alpha=0.9, objective_kwargs=extra)
    objective = args.make_objective("cross_entropy")
    assert type(objective) is KD
    assert objective.settings() == {"temperature": 4, "alpha": 0.9, "temperature_on": "teacher", "label_smoothing": 0.0}
    trained = our_trainer(tmp_path, classifier(1), temperature=4.0).objective
    assert type(trained) is KD and trained.temperature == 4
    assert type(our_trainer(tmp_path, classifier(1)).objective) is KD
    assert type(our_trainer(tmp_path).objective) is CrossEntropy
    with pytest.raises(ValueError, match="(?s)no such_thing.*temperature"):
        our_trainer(tmp_path, classifier(1), objective_kwargs={"such_thing": 1})
    with pytest.raises(ValueError, match="(?s)nonsense.*dkd"):
        DistillationArguments(**values(tmp_path), objective="nonsense").make_objective("kd")


def test_an_empty_data_set_is_refused(tmp_path):
    """'StopIteration' or a division by zero inside the data loader says nothing."""
    with pytest.raises(ValueError, match="no rows"):
        our_trainer(tmp_path, classifier(1), KD(), train_dataset=labelled_rows().select([])).train()


def test_a_teacher_of_another_kind_is_refused(tmp_path):
    """A masked language model's logits are over tokens: compared with classes they broadcast or crash late."""
    teacher = transformers.RobertaForMaskedLM(tiny_roberta_config(num_labels=3))
    with pytest.raises(ValueError, match=r"(?s)\(.*50\)"):
        our_trainer(tmp_path, ModelTeacher(teacher), KD()).train()


def test_teacher_and_student_cannot_be_one_module(tmp_path):
    """Freezing the teacher would freeze the student, and training would do nothing."""
    model = classifier(0)
    with pytest.raises(ValueError, match="(?s)deepcopy.*AdapterTeacher"):
        our_trainer(tmp_path, model, KD(), model)


# ---- heads ----


@pytest.mark.parametrize("head", ["multi_label_classification", "regression", "tokens"])
@pytest.mark.parametrize("objective", [None, KD(alpha=0.7)])
def test_every_head_learns_and_accumulates(tmp_path, head, objective):
    """A mean of micro-batch means, or a loss made for class ids, is silently another objective for these heads."""
    rows = tiny_rows(32)
    for i, row in enumerate(rows):
        if head == "tokens":
            row["labels"] = [-100 if t % 2 else t % 3 for t in row["input_ids"]]
        else:
            row["labels"] = [float(i % 2), 1.0, float(i % 3 == 0)] if head != "regression" else float(i % 5)
    kind = (
        transformers.RobertaForTokenClassification
        if head == "tokens"
        else transformers.RobertaForSequenceClassification
    )
    labels = 1 if head == "regression" else 3
    weights = []
    for name, settings in (("8x1", {}), ("2x4", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})):
        torch.manual_seed(0)
        student, teacher = (kind(tiny_roberta_config(num_labels=labels)).double() for _ in range(2))
        trainer = our_trainer(
            tmp_path / name,
            teacher if objective else None,
            copy.deepcopy(objective),
            student,
            train_dataset=datasets.Dataset.from_list(rows),
            **settings,
        )
        trainer.train()
        assert trainer.objective.problem_type == ("single_label_classification" if head == "tokens" else head)
        weights.append(trainer.model.state_dict())
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert all(abs(loss) < 100 for loss in found)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-9)


def test_alpha_1_trains_without_labels(tmp_path):
    """Distilling on unlabelled text is half of what people want a teacher for."""
    rows = labelled_rows().remove_columns("labels")
    assert len(losses(our_trainer(tmp_path, classifier(1), KD(alpha=1.0), train_dataset=rows))) == 4
    with pytest.raises(ValueError, match="(?s)alpha is 0.5.*labels"):
        our_trainer(tmp_path, classifier(1), KD(alpha=0.5), train_dataset=rows).train()


def test_kd_with_alpha_0_is_cross_entropy(tmp_path):
    """A baseline by another path than alpha 0 would differ by more than the teacher."""
    baseline = our_trainer(tmp_path / "a", objective=CrossEntropy())
    nothing = our_trainer(tmp_path / "b", classifier(1), KD(alpha=0.0))
    baseline.train(), nothing.train()
    for name, tensor in baseline.model.state_dict().items():
        assert torch.equal(nothing.model.state_dict()[name], tensor)


def test_torch_compile_trains_the_same(tmp_path):
    """A compiled student whose hooks or reduction are lost learns something else, faster."""
    compiled = losses(
        our_trainer(tmp_path / "a", classifier(1), KD(), torch_compile=True, torch_compile_backend="eager")
    )
    assert compiled == pytest.approx(losses(our_trainer(tmp_path / "b", classifier(1), KD())), rel=1e-5)


def test_plain_training_arguments_are_accepted(tmp_path):
    """Whoever comes from the stock Trainer brings its arguments."""
    args = transformers.TrainingArguments(**values(tmp_path))
    trainer = DistillationTrainer(
        classifier(0), args, None, labelled_rows(), processing_class=tiny_tokenizer(), teacher=classifier(1)
    )
    assert type(trainer.objective) is KD
    trainer.train()
    assert trainer.state.global_step == 4


def test_the_classifier_driver_of_the_laws_takes_a_teacher(tmp_path):
    """Online teacher and the same answers as columns: the cache changes what is paid, never what is learned."""
    teacher = classifier(1).double()
    online = classifier_trainer(tmp_path / "a", {}, teacher=copy.deepcopy(teacher), objective=KD())
    online.train()
    rows = online.train_dataset
    with torch.no_grad():
        answers = [teacher.eval()(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in rows["input_ids"]]
    cached = classifier_trainer(tmp_path / "b", {}, teacher=CachedTeacher(), objective=KD())
    cached.train_dataset = rows.add_column("teacher_logits", answers)
    cached._signature_columns = None
    cached.train()
    for name, tensor in online.model.state_dict().items():
        torch.testing.assert_close(cached.model.state_dict()[name], tensor, rtol=0, atol=1e-5)


def test_the_inside_of_a_teacher_of_other_labels_teaches(tmp_path):
    """Hidden states do not depend on the labels: a pre-trained encoder with any head may teach its inside."""
    teacher = named(classifier(1, num_labels=4), "a", "b", "c", "d")
    trainer = our_trainer(tmp_path, teacher, HiddenStates(), eval_teacher=True, eval_dataset=labelled_rows(16))
    assert len(losses(trainer)) == 4
    metrics = trainer.evaluate()
    assert "eval_distill_loss" in metrics and "eval_agreement" not in metrics


# ---- found by trying to break it ----


def test_the_teacher_sees_token_types_that_its_student_does_not_take(tmp_path):
    """A BERT teacher that loses its token types reads every pair of texts as one text."""
    torch.manual_seed(0)
    small = {"vocab_size": 50, "num_hidden_layers": 1, "num_labels": 2}
    bert = transformers.BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, **small)
    teacher = transformers.BertForSequenceClassification(bert)
    teacher.bert.embeddings.token_type_embeddings.weight.data *= 50
    teacher.classifier.weight.data *= 50
    distil = transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16, num_labels=2)
    student = transformers.DistilBertForSequenceClassification(distil)
    rows = [{"input_ids": [2, 7, 3, 8, 9, 3], "attention_mask": [1] * 6, "token_type_ids": [0, 0, 0, 1, 1, 1]}] * 8
    rows = datasets.Dataset.from_list([{**row, "labels": i % 2} for i, row in enumerate(rows)])
    trainer = our_trainer(tmp_path, teacher, KD(), student, train_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "token_type_ids" in batch
    expected = teacher(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}).logits
    torch.testing.assert_close(trainer.teacher(batch).logits, expected)
    without = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert float((without - expected).abs().max()) > 1e-4


def test_what_the_labels_show_is_noted_in_the_students_config(tmp_path):
    """A saved multi-label student without its problem type gets a softmax from every pipeline."""
    rows = [{**row, "labels": [1.0, 0.0, float(i % 2)]} for i, row in enumerate(tiny_rows(16))]
    trainer = our_trainer(tmp_path, train_dataset=datasets.Dataset.from_list(rows))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["problem_type"] == "multi_label_classification"


def test_a_multi_label_ensemble_averages_sigmoids(tmp_path):
    """Members that do not say so were averaged as if one label excluded the others."""
    rows = [{**row, "labels": [1.0, 0.0, float(i % 2)]} for i, row in enumerate(tiny_rows(16))]
    members = [classifier(seed) for seed in (1, 2)]
    trainer = our_trainer(tmp_path, EnsembleTeacher(members), KD(), train_dataset=datasets.Dataset.from_list(rows))
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mean = sum(torch.sigmoid(member(**inputs).logits) for member in members) / 2
    torch.testing.assert_close(torch.sigmoid(trainer.teacher(batch).logits), mean)


def test_a_softmax_teacher_does_not_teach_a_sigmoid_student(tmp_path):
    """The numbers have the same shape, and nothing fails."""
    teacher = classifier(1, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="(?s)single_label.*multi_label"):
        our_trainer(tmp_path, teacher, KD())


@pytest.mark.parametrize("objective", [HiddenStates(), AttentionMaps(), MiniLMRelations()])
def test_two_tokenizers_have_no_common_positions(tmp_path, objective):
    """Token 5 of one side is another word on the other: hidden states of unlike words are pulled together."""
    rows = labelled_rows()
    rows = rows.add_column("teacher_input_ids", rows["input_ids"][:])
    with pytest.raises(ValueError, match="position by position"):
        our_trainer(tmp_path, classifier(1), objective, train_dataset=rows)


def test_a_search_over_the_objectives_settings_reaches_it(tmp_path):
    """A search whose trials are all the same run prints a best temperature all the same."""
    seen = []

    class Note(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((round(args.temperature, 6), round(trainer._objective.temperature, 6)))

    trainer = our_trainer(
        tmp_path, classifier(1), model_init=lambda: classifier(0), eval_dataset=labelled_rows(16), callbacks=[Note()]
    )
    space = lambda trial: {"temperature": trial.suggest_float("temperature", 1.0, 9.0)}  # noqa: E731
    trainer.hyperparameter_search(hp_space=space, n_trials=2, backend="optuna")
    assert len({ours for _, ours in seen}) == 2 and all(asked == ours for asked, ours in seen)
    fixed = our_trainer(tmp_path, classifier(1), KD(), model_init=lambda: classifier(0), eval_dataset=labelled_rows(16))
    with pytest.raises(ValueError, match="search changes"):
        fixed.hyperparameter_search(hp_space=space, n_trials=1, backend="optuna")


def test_the_snippets_own_arguments_class_is_understood(tmp_path):
    """Whoever keeps their copy of the arguments and takes our trainer got alpha 0.5 and temperature 2, whatever they asked."""
    args = copied_snippet.DistillationTrainingArguments(**values(tmp_path, alpha=0.1, temperature=7.0))
    with pytest.warns(FutureWarning, match="alpha=0.9"):
        trainer = DistillationTrainer(
            classifier(0), args, None, labelled_rows(), processing_class=tiny_tokenizer(), teacher=classifier(1)
        )
    assert trainer.objective.alpha == pytest.approx(0.9) and trainer.objective.temperature == 7


def test_copies_of_the_snippets_arguments_keep_their_alpha(tmp_path):
    """alpha turned round twice is the other term's weight."""
    import dataclasses

    with pytest.warns(FutureWarning):
        args = DistillationTrainingArguments(output_dir=str(tmp_path), alpha=0.3)
    assert dataclasses.replace(args, seed=7).alpha == pytest.approx(0.7)
    with pytest.warns(FutureWarning):
        (parsed,) = transformers.HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path)]
        )
    assert (parsed.alpha, parsed.temperature) == (0.5, 2.0)


def test_a_metric_that_ends_in_loss_stays(tmp_path):
    """eval_log_loss overwritten by eval_loss, and eval_loss left at a mean of batch means."""
    trainer = our_trainer(tmp_path, compute_metrics=lambda _: {"log_loss": 42.0}, eval_dataset=labelled_rows(12))
    metrics = trainer.evaluate()
    assert metrics["eval_log_loss"] == 42.0 and metrics["eval_loss"] == pytest.approx(1.0986, abs=0.05)


def test_streamed_rows_train_with_a_teacher(tmp_path):
    """Data sets that do not fit are why people stream."""
    rows = labelled_rows().to_iterable_dataset()
    assert len(losses(our_trainer(tmp_path, classifier(1), KD(), train_dataset=rows, max_steps=3))) == 3
    several = [{**row, "labels": [1.0, 0.0, 1.0]} for row in tiny_rows(16)]
    streamed = datasets.Dataset.from_list(several).to_iterable_dataset()
    trainer = our_trainer(tmp_path, train_dataset=streamed, max_steps=2)
    assert trainer.objective.problem_type == "multi_label_classification"
    assert len(losses(trainer)) == 2


def test_evaluation_rows_need_no_numbers(tmp_path):
    """A list or a stream to evaluate on is nothing that a teacher has a say in."""
    for rows in ([*labelled_rows(8)], labelled_rows(8).to_iterable_dataset()):
        metrics = our_trainer(tmp_path, classifier(1), KD(), eval_dataset=rows).evaluate()
        assert metrics["eval_loss"] > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_projections_train_twice_and_compiled(tmp_path, compiled):
    """A second train() with an optimizer that lacks the projections, or a compiled output that loses its logits."""
    teacher = classifier(1, hidden_size=32)
    settings = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    trainer = our_trainer(tmp_path, teacher, HiddenStates(), **settings)
    first = losses(trainer)
    before = trainer.objective.attached.maps[0].weight.clone()
    second = losses(trainer)
    assert second[0] < first[0] and not torch.equal(trainer.objective.attached.maps[0].weight, before)


def test_one_teacher_serves_many_trainers(tmp_path):
    """A loop over seeds with one teacher: hooks that stay behind stop the second run."""
    teacher = classifier(1)
    for _ in range(2):
        assert len(losses(our_trainer(tmp_path, teacher, MiniLMRelations()))) == 4
    assert not any("_Kept" in str(module._forward_hooks) for module in teacher.modules())
    assert len(losses(our_trainer(tmp_path, teacher, KD()))) == 4


def test_votes_teach_through_pseudo_labels(tmp_path):
    """A vote has labels and no logits: without an objective that reads them the ensemble is of no use."""
    for combine in ("vote", "sample"):
        ensemble = EnsembleTeacher([classifier(seed) for seed in (1, 2, 3)], combine=combine)
        rows = labelled_rows().remove_columns("labels")
        assert len(losses(our_trainer(tmp_path, ensemble, PseudoLabel(), train_dataset=rows))) == 4


def test_predictions_come_in_the_order_of_the_rows(tmp_path):
    """The stock sampler groups evaluation rows by length too: predictions belong to other rows, and nothing says so."""
    trainer = our_trainer(tmp_path, train_sampling_strategy="group_by_length")
    found = trainer.predict(labelled_rows(16))
    assert found.label_ids.tolist() == [i % 3 for i in range(16)]


def test_grouping_by_length_sees_rows_that_a_transform_makes(tmp_path):
    """Rows tokenized on the fly have no column of tokens to measure."""
    plain = labelled_rows()
    columns = {name: plain[name][:] for name in plain.column_names}
    made = datasets.Dataset.from_dict({"number": list(range(32))}).with_transform(
        lambda batch: {name: [values[i] for i in batch["number"]] for name, values in columns.items()}
    )
    trainer = our_trainer(
        tmp_path, train_dataset=made, train_sampling_strategy="group_by_length", remove_unused_columns=False
    )
    assert len(losses(trainer)) == 4


def test_a_slice_without_a_label_does_not_stop_training(tmp_path):
    """Token data often begins with rows of which nothing is labelled."""
    rows = [{**row, "labels": [-100] * len(row["input_ids"])} for row in tiny_rows(32)]
    student, teacher = (transformers.RobertaForTokenClassification(tiny_roberta_config(num_labels=3)) for _ in range(2))
    trainer = our_trainer(tmp_path, teacher, KD(), student, train_dataset=datasets.Dataset.from_list(rows))
    assert losses(trainer) == [0.0] * 4 and trainer.teacher_scores is None
