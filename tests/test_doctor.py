"""The doctor: each damage that has cost somebody an hour is found by its own check, and a good pair has nothing to mend."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hfkd import doctor
from hfkd.cache import cache_teacher
from hfkd.data import embedded
from hfkd.data.images import load_images
from hfkd.data.pixels import ImageCollator
from hfkd.data.text import load_text, tokenize
from hfkd.doctor import ERROR, OK, WARNING, examine
from hfkd.evaluation import positions_of
from hfkd.memory import bytes_of, step_memory
from hfkd.teachers import ModelTeacher
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

MOODS = ("calm", "glad", "sad")
LENGTH = 32


# ---- a good pair ----


def named(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def taught(model, inputs, labels, steps, rate=1e-2):
    """Until it knows more than chance: a teacher that knows nothing is one of the damages."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,), generator=generator)
        loss = model(**{name: value[rows] for name, value in inputs.items()}, labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def written(folder, name, count, generator):
    """Each mood has a third of the words of its own, among others."""
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(count):
            own = generator.integers(5 + 15 * (i % 3), 20 + 15 * (i % 3), generator.integers(4, 9))
            writer.writerow([" ".join(f"w{word}" for word in (*own, generator.integers(5, 50))), MOODS[i % 3]])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with student, teacher, train.csv and test.csv."""
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    for name, count in (("train", 120), ("test", 90)):
        written(folder, name, count, generator)
    rows, tokenizer = load_text(train_file=folder / "train.csv")["train"], tiny_tokenizer()
    torch.manual_seed(0)
    teacher = RobertaForSequenceClassification(tiny_roberta_config(**named(MOODS)))
    inputs = dict(tokenizer(rows["text"][:], padding=True, return_tensors="pt"))
    taught(teacher, inputs, torch.tensor(rows["label"][:]), 40).save_pretrained(folder / "teacher")
    student = RobertaForSequenceClassification(tiny_roberta_config(num_hidden_layers=1, **named(MOODS)))
    student.save_pretrained(folder / "student")
    for name in ("student", "teacher"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The digits that scikit-learn carries, a teacher of them, a smaller student."""
    folder = tmp_path_factory.mktemp("pictures")
    train = load_images("digits")["train"]
    pixels = torch.tensor(np.stack([np.asarray(image.convert("RGB")) for image in train["image"][:]])).float()
    inputs = {"pixel_values": pixels.permute(0, 3, 1, 2) / 255 * 2 - 1}
    names = named([str(number) for number in range(10)])
    for name, width in (("student", 16), ("teacher", 32)):
        torch.manual_seed(0)
        config = ViTConfig(image_size=8, patch_size=4, hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=2 * width, hidden_dropout_prob=0.0, **names)  # fmt: skip
        model = ViTForImageClassification(config)
        if name == "teacher":
            taught(model, inputs, torch.tensor(train["label"][:]), 60)
        model.save_pretrained(folder / name)
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / name)
    return folder


def looked_at(folder, task=None, student=None, teacher=None, **settings):
    if task is None:
        settings = {
            "train_file": folder / "train.csv",
            "test_file": folder / "test.csv",
            "max_length": LENGTH,
            **settings,
        }
    found = examine(student or folder / "student", teacher or folder / "teacher", task, **settings)
    return {finding.check: finding for finding in found}


def copied(folder, name, tmp_path):
    return shutil.copytree(folder / name, tmp_path / f"other-{name}")


def changed(folder, name, tmp_path, **values):
    """A copy whose config.json says something else."""
    copy = copied(folder, name, tmp_path)
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return copy


def told(names):
    """As config.json has them."""
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


def test_nothing_is_to_be_mended_about_a_good_pair(texts):
    """A doctor who finds something in everybody is no longer listened to."""
    found = looked_at(texts)
    assert {check: finding.level for check, finding in found.items()} == dict.fromkeys(
        ["processes", "student's weights", "teacher's weights", "labels", "tokenizer", "lengths", "teacher's score", "sizes",
         "memory"], OK)  # fmt: skip
    assert not any(finding.remedy for finding in found.values())
    assert "accuracy 98.9 % on 90 held-out rows (the most frequent class 33.3 %" in found["teacher's score"].what


def test_nothing_is_to_be_mended_about_a_good_pair_of_pictures(pictures):
    """Checks of texts alone would leave image students to chance."""
    found = looked_at(pictures, "digits")
    assert {finding.level for finding in found.values()} == {OK}, found
    assert "image processor" in found and "lengths" not in found


def test_nothing_is_to_be_mended_about_a_pair_for_the_embedded_sentences(tmp_path):
    """Made-up words of made-up classes say nothing about real ones: rare words, long sentences, uneven classes."""
    try:
        rows = load_text("movie_sentences")["train"].shard(4, 0)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    counted = Counter(word for text in rows["text"][:] for word in text.lower().split())
    tokenizer = words_of([word for word, _ in counted.most_common(3000)])
    for name, width in (("student", 8), ("teacher", 16)):
        torch.manual_seed(0)
        sizes = {"vocab_size": len(tokenizer), "hidden_size": width, "num_attention_heads": 1, "num_hidden_layers": 1}
        model = RobertaForSequenceClassification(tiny_roberta_config(**sizes, **named(embedded.MOVIE_LABELS)))
        if name == "teacher":
            read = dict(tokenizer(rows["text"][:], truncation=True, max_length=32, padding=True, return_tensors="pt"))
            taught(model, read, torch.tensor(rows["label"][:]), 80)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    found = looked_at(tmp_path, "movie_sentences", max_length=36)
    assert {check: finding.level for check, finding in found.items() if finding.level != OK} == {}
    assert "rotten, fresh" in found["labels"].what


def words_of(words):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=inputs, cls_token="<s>", sep_token="</s>", **names
    )


# ---- weights ----


def test_a_teacher_whose_head_is_new_is_an_error(texts, tmp_path):
    """A new head answers noise, and "distillation does not help" is what a week of runs then shows."""
    copy = copied(texts, "teacher", tmp_path)
    weights = load_file(copy / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("classifier.out_proj")}
    save_file(kept, copy / "model.safetensors", {"format": "pt"})
    found = looked_at(texts, teacher=copy)
    assert found["teacher's weights"].level == ERROR and "train_teacher.py" in found["teacher's weights"].remedy
    assert "classifier.out_proj.bias, classifier.out_proj.weight (2 in all)" in found["teacher's weights"].what
    assert found["teacher's score"].level in (ERROR, WARNING)


def test_a_pretrained_encoder_is_no_teacher_yet(texts, tmp_path):
    """roberta-base as a teacher: whole, and without an answer to the task."""
    RobertaForMaskedLM(tiny_roberta_config()).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    found = looked_at(texts, teacher=tmp_path / "encoder")["teacher's weights"]
    assert found.level == ERROR and "RobertaForMaskedLM" in found.what and "without a head for classes" in found.what


def test_a_pretrained_encoder_is_a_fine_student(texts, tmp_path):
    """A student gets its head from the task; a doctor who calls that an error forbids every first distillation."""
    RobertaForMaskedLM(tiny_roberta_config(num_hidden_layers=1)).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    found = looked_at(texts, student=tmp_path / "encoder")
    assert {check for check, finding in found.items() if finding.level != OK} == set()
    assert "a new head, which training makes" in found["student's weights"].what


def test_a_student_that_lacks_a_layer_is_an_error(texts, tmp_path):
    """A checkpoint of half the depth loads with a warning that scrolls by, and half of the student is noise."""
    copy = changed(texts, "student", tmp_path, num_hidden_layers=2)
    found = looked_at(texts, student=copy)["student's weights"]
    assert found.level == ERROR and "roberta.encoder.layer.1." in found.what


def test_a_head_for_other_classes_does_not_count_as_the_teachers(texts, tmp_path):
    """A head of another shape is silently replaced by a new one."""
    copy = changed(texts, "teacher", tmp_path, **told(["a", "b"]))
    found = looked_at(texts, teacher=copy)
    assert found["teacher's weights"].level == ERROR and "classifier.out_proj" in found["teacher's weights"].what
    assert found["labels"].level == ERROR and "student 3, teacher 2, data 3" in found["labels"].what
    assert found["teacher's score"].what.startswith("not checked")


def test_pickled_weights_are_refused(texts, tmp_path):
    """A pickle runs what its author wrote, on the machine with the token."""
    copy = copied(texts, "teacher", tmp_path)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    found = looked_at(texts, teacher=copy)
    assert found["teacher's weights"].level == ERROR and "pickle" in found["teacher's weights"].what
    assert found["memory"].what.startswith("not checked") and found["labels"].what.startswith("not checked")


def test_code_that_a_checkpoint_brings_is_refused_and_not_run(texts, tmp_path):
    """trust_remote_code hands the machine to whoever can push to that repository."""
    copy = changed(texts, "teacher", tmp_path, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (copy / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    found = looked_at(texts, teacher=copy)["teacher's weights"]
    assert found.level == ERROR and "code of its own" in found.what and "trust_remote_code" in found.remedy
    assert not (tmp_path / "ran").exists()


def test_weights_that_were_cut_off_are_an_error(texts, tmp_path):
    """A copy that ended early is found now, not after the data was prepared."""
    copy = copied(texts, "teacher", tmp_path)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = looked_at(texts, teacher=copy)["teacher's weights"]
    assert found.level == ERROR and "cannot be loaded" in found.what


def test_a_model_that_reads_something_else_is_an_error(texts, pictures):
    """Folders of two studies mixed up: the message of the library would be about an argument of a tokenizer."""
    for whose in ("student", "teacher"):
        found = looked_at(texts, **{whose: pictures / "teacher"})[f"{whose}'s weights"]
        assert found.level == ERROR and found.what == "teacher reads pixel_values, and the rows are texts"


def test_a_model_that_is_nowhere_is_one_sentence(texts):
    """A stack of calls of three libraries, for a misspelt name."""
    found = looked_at(texts, teacher="nobody/nothing")["teacher's weights"]
    assert found.level == ERROR and found.what == "nobody/nothing is neither a local folder nor reachable on the Hub"


# ---- labels ----


def test_the_same_classes_in_another_order_are_matched(texts, tmp_path):
    """A teacher that is right in its own order must not be refused, nor scored as if it were wrong."""
    copy = changed(texts, "teacher", tmp_path, **told(["sad", "calm", "glad"]))
    weights = load_file(copy / "model.safetensors")
    for name in ("weight", "bias"):
        weights[f"classifier.out_proj.{name}"] = weights[f"classifier.out_proj.{name}"][[2, 0, 1]]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    found = looked_at(texts, teacher=copy)
    assert found["labels"].level == OK and "in another order" in found["labels"].what
    assert "accuracy 98.9 %" in found["teacher's score"].what


def test_names_in_another_order_than_the_weights_learned_show_in_the_score(texts, tmp_path):
    """No map of names tells that a teacher's are wrong; its accuracy does."""
    copy = changed(texts, "teacher", tmp_path, **told(["glad", "sad", "calm"]))
    found = looked_at(texts, teacher=copy)
    assert found["labels"].level == OK
    assert found["teacher's score"].level == ERROR and "no better than guessing" in found["teacher's score"].what


def test_other_classes_are_an_error(texts, tmp_path):
    """As many classes of another task: the logits fit, and mean something else."""
    copy = changed(texts, "teacher", tmp_path, **told(["cat", "dog", "fish"]))
    found = looked_at(texts, teacher=copy)["labels"]
    assert found.level == ERROR and "calm, glad, sad" in found.what and "cat, dog, fish" in found.what


def test_classes_without_names_are_a_warning(texts, tmp_path):
    """LABEL_0 may be any of them: whoever reads this can check, and a run cannot."""
    copy = changed(texts, "teacher", tmp_path, **told([f"LABEL_{i}" for i in range(3)]))
    found = looked_at(texts, teacher=copy)["labels"]
    assert found.level == WARNING and "matched by number" in found.what


def test_a_student_that_names_its_classes_in_another_order_than_the_data_is_an_error(texts, tmp_path):
    """Labels are numbered by the data, the teacher is aligned to the student's names: the two terms contradict each other."""
    copy = changed(texts, "student", tmp_path, **told(["sad", "calm", "glad"]))
    found = looked_at(texts, student=copy)["labels"]
    assert found.level == ERROR and "id2label of the data" in found.remedy


def test_two_kinds_of_problem_are_an_error(texts, tmp_path):
    """A sigmoid of one side and a softmax of the other give a finite loss that means nothing."""
    student = changed(texts, "student", tmp_path, problem_type="single_label_classification")
    teacher = changed(texts, "teacher", tmp_path, problem_type="multi_label_classification")
    found = looked_at(texts, student=student, teacher=teacher)["labels"]
    assert found.level == ERROR and "multi_label_classification" in found.what


# ---- what the models read ----


def test_a_tokenizer_beyond_the_embedding_is_an_error(texts, tmp_path):
    """One added token is an index error in the one batch that has it, hours later."""
    copy = copied(texts, "student", tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(copy)
    found = looked_at(texts, student=copy)["tokenizer"]
    assert found.level == ERROR and "ids up to 50, its embedding holds 50" in found.what
    assert "resize_token_embeddings" in found.remedy


def test_two_tokenizers_are_a_warning(texts, tmp_path):
    """A teacher that reads the student's ids reads other words, and answers with confidence."""
    copy = copied(texts, "student", tmp_path)
    tiny_tokenizer(40).save_pretrained(copy)
    found = looked_at(texts, student=copy)["tokenizer"]
    assert found.level == WARNING and "(40 tokens)" in found.what and "teacher_tokenizer" in found.remedy


def test_a_model_without_a_tokenizer(texts, tmp_path):
    """For a student that is the end; a teacher of the same vocabulary may be meant to share one."""
    for name, level in (("student", ERROR), ("teacher", WARNING)):
        copy = copied(texts, name, tmp_path)
        for file in copy.glob("tokenizer*"):
            file.unlink()
        found = looked_at(texts, **{name: copy})
        assert found["tokenizer"].level == level and f"no tokenizer lies beside the {name}" in found["tokenizer"].what


def test_texts_beyond_the_positions_are_an_error(texts, tmp_path):
    """The first long text ends the run with an index error inside an embedding."""
    shutil.copytree(texts, tmp_path / "long")
    with (tmp_path / "long" / "test.csv").open("a") as file:
        file.write(" ".join(["w5"] * 100) + ",calm\n")
    found = looked_at(tmp_path / "long", max_length=64)["lengths"]
    assert (
        found.level == ERROR and "texts of up to 102 tokens, cut at 64; the student has positions for 38" in found.what
    )
    assert "--max_length 38" in found.remedy
    assert looked_at(tmp_path / "long", max_length=38)["lengths"].level == OK


def test_a_length_that_a_tokenizer_does_not_allow_is_an_error(texts, tmp_path):
    """The recipes refuse it, after they have loaded everything."""
    copy, tokenizer = copied(texts, "teacher", tmp_path), tiny_tokenizer()
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(copy)
    found = looked_at(texts, teacher=copy)["lengths"]
    assert found.level == ERROR and found.what == "max_length is 32, the teacher's tokenizer allows 20"


def test_texts_that_are_cut_are_a_warning(texts):
    """What stands at the end of a review is its verdict."""
    found = looked_at(texts, max_length=8)["lengths"]
    assert found.level == WARNING and "% of texts are longer than max_length 8" in found.what


@pytest.mark.parametrize(
    "model",
    [
        lambda: RobertaForSequenceClassification(tiny_roberta_config(max_position_embeddings=20)),
        lambda: BertForSequenceClassification(BertConfig(**SMALL)),
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=20)
        ),
    ],
    ids=["roberta", "bert", "distilbert"],
)
def test_positions_are_those_the_model_can_read(model):
    """One too many is an index error, one too few cuts texts: RoBERTa counts from behind its padding id."""
    model = model().eval()
    most = positions_of(model)
    model(torch.full((1, most), 7))
    with pytest.raises((RuntimeError, IndexError)):
        model(torch.full((1, most + 1), 7))


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 16, "max_position_embeddings": 20, "pad_token_id": 1}  # fmt: skip


def test_image_processors(pictures, tmp_path):
    """Another size than the model's ends the run; another normalisation halves the teacher's accuracy and says nothing."""
    copy = copied(pictures, "student", tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(copy)
    found = looked_at(pictures, "digits", student=copy)["image processor"]
    assert found.level == ERROR and "reads pictures of (8, 8), its image processor makes (16, 16)" in found.what
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1] * 3).save_pretrained(copy)
    found = looked_at(pictures, "digits", student=copy)["image processor"]
    assert found.level == WARNING and "mean 0.1/0.1/0.1" in found.what and "mean 0.5/0.5/0.5" in found.what
    assert "ImageCollator" in found.remedy
    (copy / "preprocessor_config.json").unlink()
    assert looked_at(pictures, "digits", student=copy)["image processor"].level == ERROR


# ---- the teacher's score ----


def test_a_teacher_that_guesses_is_an_error(texts, tmp_path):
    """Weights of a first step, saved by mistake: all names fit, all shapes fit, nothing was learned."""
    torch.manual_seed(1)
    copy = copied(texts, "teacher", tmp_path)
    RobertaForSequenceClassification(tiny_roberta_config(**named(MOODS))).save_pretrained(copy)
    found = looked_at(texts, teacher=copy)["teacher's score"]
    assert found.level == ERROR and "the most frequent class 33.3 %, chance 33.3 %" in found.what


def test_a_teacher_that_knows_only_the_most_frequent_class_is_an_error(texts, tmp_path):
    """95 % accuracy, all of it from the majority."""
    copy = copied(texts, "teacher", tmp_path)
    weights = load_file(copy / "model.safetensors")
    weights["classifier.out_proj.bias"] = torch.tensor([0.0, 0.0, 99.0])
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    lines = [f"w{5 + i % 40},{'calm' if i < 5 else 'sad'}\n" for i in range(100)]
    (tmp_path / "uneven.csv").write_text("".join(["text,label\n", *lines]))
    found = looked_at(texts, teacher=copy, test_file=tmp_path / "uneven.csv")["teacher's score"]
    assert found.level == ERROR and "accuracy 95.0 %" in found.what and "most frequent class 95.0 %" in found.what


def test_a_good_teacher_of_uneven_classes_is_no_error(texts, tmp_path):
    """Beside a class of 95 % a good teacher can be less often right than a constant answer."""
    lines = [f"{'w6 w7' if i < 6 or i % 9 == 0 else 'w40 w41'},{'calm' if i < 6 else 'sad'}\n" for i in range(100)]
    (tmp_path / "uneven.csv").write_text("".join(["text,label\n", *lines]))
    found = looked_at(texts, test_file=tmp_path / "uneven.csv")["teacher's score"]
    assert found.level == WARNING and "no better than the most frequent class" in found.what


def test_logits_that_are_not_finite_are_an_error(texts, tmp_path):
    """One NaN in a teacher is a NaN in every weight of the student after one step."""
    copy = copied(texts, "teacher", tmp_path)
    weights = load_file(copy / "model.safetensors")
    weights["classifier.out_proj.bias"][0] = torch.nan
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    found = looked_at(texts, teacher=copy)["teacher's score"]
    assert found.level == ERROR and "90 of 90 rows get logits that are NaN or infinite" in found.what


# ---- sizes, memory, processes ----


def test_a_student_that_is_larger_than_its_teacher_is_a_warning(texts):
    """The two names exchanged: the large model is trained, and the small one asked."""
    found = looked_at(texts, student=texts / "teacher", teacher=texts / "student")
    assert found["sizes"].level == WARNING and "exchanged" in found["sizes"].remedy


def test_a_batch_that_does_not_fit_is_an_error(texts, monkeypatch):
    """Out of memory comes with the longest batch, which comes when it comes."""
    monkeypatch.setattr(doctor, "free_memory", lambda: 2**20)
    assert looked_at(texts, batch_size=2)["memory"].level == OK
    found = looked_at(texts, batch_size=1000)["memory"]
    assert found.level == ERROR and "gradient_accumulation_steps" in found.remedy and "estimate" in found.what


@pytest.mark.parametrize(("dropout", "length"), [(0.1, 24), (0.0, 48)])
def test_the_estimate_is_near_the_measured_peak(dropout, length):
    """An estimate that is off by half sends people to a smaller batch, or into an error at night."""
    torch.manual_seed(0)
    student, teacher = (encoder(width, dropout) for width in (64, 128))
    teacher.eval().requires_grad_(False)

    def batch(rows):
        return {
            "input_ids": torch.full((rows, length), 7),
            "attention_mask": torch.ones(rows, length, dtype=torch.long),
        }

    need = step_memory(student, batch, 8, teacher)
    measured = peak_of_steps(student, teacher, batch(8)) + bytes_of([*student.parameters(), *teacher.parameters()])
    assert need.total / 1.25 < measured < need.total * 1.25
    assert need.activations > 4 * need.weights  # else the weights alone would pass


def encoder(width, dropout):
    config = tiny_roberta_config(
        hidden_size=width, intermediate_size=4 * width, max_position_embeddings=64, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, num_labels=2,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def peak_of_steps(student, teacher, batch):
    """Bytes that torch's allocator holds at most during two steps, beyond what it held before."""
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):
            logits = student.train()(**batch).logits
            with torch.no_grad():
                target = teacher(**batch).logits.softmax(-1)
            torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean").backward()
            optimizer.step()
            optimizer.zero_grad()
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_an_estimate_leaves_models_and_random_numbers_as_they_were():
    """A doctor who leaves dropout on, or moves the seed, changes the run that follows."""
    model = encoder(16, 0.1).eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    step_memory(model, lambda rows: {"input_ids": torch.full((rows, 8), 7)}, 4, model)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training and not any(len(part._forward_hooks) for part in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


def test_processes_that_do_not_know_of_each_other_are_an_error(texts, monkeypatch):
    """Two independent runs, each on all of the data, writing into one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = looked_at(texts)["processes"]
    assert found.level == ERROR and "the launcher started 2, and accelerate sees 1" in found.what
    assert "ACCELERATE_USE_CPU" in found.remedy


# ---- cached answers ----


@pytest.fixture(scope="module")
def cached(texts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "answers"
    tokenizer = tiny_tokenizer()
    rows = tokenize(load_text(train_file=texts / "train.csv")["train"], tokenizer, LENGTH)
    cache_teacher(rows, ModelTeacher(texts / "teacher"), directory, processing_class=tokenizer)
    return directory


def test_a_cache_of_this_teacher_is_fine(texts, cached):
    """A check that refuses its own cache makes people leave the flag out."""
    found = looked_at(texts, cache=cached)["cache"]
    assert found.level == OK and "120 rows of this teacher; asked about 32 again" in found.what


def test_a_cache_of_something_else_is_an_error(texts, cached, tmp_path):
    """Answers of another teacher, to other rows, at another length, or half of a file."""
    torch.manual_seed(3)
    other = copied(texts, "teacher", tmp_path)
    RobertaForSequenceClassification(tiny_roberta_config(**named(MOODS))).save_pretrained(other)
    assert "the teacher's weights" in looked_at(texts, teacher=other, cache=cached)["cache"].what
    assert "the rows' content" in looked_at(texts, max_length=6, cache=cached)["cache"].what
    assert "rows" in looked_at(texts, train_file=texts / "test.csv", cache=cached)["cache"].what
    half = shutil.copytree(cached, tmp_path / "half")
    table = next(half.glob("*.arrow"))
    table.write_bytes(table.read_bytes()[:-50])
    found = looked_at(texts, cache=half)["cache"]
    assert found.level == ERROR and "damaged" in found.what and "cache_teacher.py" in found.remedy
    assert looked_at(texts, cache=tmp_path / "nowhere")["cache"].level == ERROR


def test_a_cache_of_pictures_is_asked_again(pictures, tmp_path):
    """What is cached of pictures depends on both views of them."""
    train = load_images("digits")["train"]
    processor = ViTImageProcessorPil.from_pretrained(pictures / "teacher")
    collator = ImageCollator(processor, processor)
    cache_teacher(train, ModelTeacher(pictures / "teacher"), tmp_path / "cache", collator=collator, columns=("image",))
    found = looked_at(pictures, "digits", cache=tmp_path / "cache")["cache"]
    assert found.level == OK, found


# ---- inputs ----


def test_data_that_is_not_there_ends_it_at_once(texts):
    """Without rows there is nothing to look at: that is an error of the call, not a finding."""
    with pytest.raises(ValueError, match="unknown task 'movies'"):
        examine(texts / "student", texts / "teacher", "movies")
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        looked_at(texts, batch_size=0)
