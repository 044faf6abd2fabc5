"""A cache is its teacher's answers to these very rows, or an error: whatever was killed, shuffled or exchanged."""

from __future__ import annotations

import copy
import json
import re
import time

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Image, List, Value, concatenate_datasets, load_from_disk
from transformers import (
    DataCollatorWithPadding,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import launching
from hfkd import cache
from hfkd.cache import cache_members, cache_teacher, load_cache, verify_cache
from hfkd.data.collate import KeyedCollator
from hfkd.fingerprint import content_hash, processing_hash
from hfkd.outputs import TeacherOutput
from hfkd.teachers import AdapterTeacher, CachedTeacher, EnsembleTeacher, ModelTeacher
from hfkd.testing import tiny_roberta_config, tiny_rows, tiny_tokenizer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def chunks_of_16(monkeypatch):
    monkeypatch.setattr(cache, "CHUNK_ROWS", 16)


def classifier(**overrides):
    """Weights large enough that every row has other logits."""
    return RobertaForSequenceClassification(tiny_roberta_config(num_labels=3, initializer_range=0.5, **overrides))


def rows(count=50, **overrides):
    dataset = Dataset.from_list(tiny_rows(count, **overrides))
    return dataset.add_column("label", [i % 3 for i in range(count)])


def directly(model, dataset):
    """Row by row, without padding: what every batch must give."""
    model = model.eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in dataset["input_ids"]]


def made(tmp_path, dataset, model=None, **settings):
    model = model or classifier()
    directory = tmp_path / "cache"
    return cache_teacher(dataset, ModelTeacher(model), directory, **{"batch_size": 8, **settings}), directory, model


# ---- what is in it ----


def test_rows_stand_in_the_data_sets_order(tmp_path, chunks_of_16):
    """Answers in the order of their lengths, beside the rows: every example learns from another one's answer."""
    dataset = rows()
    attached, directory, model = made(tmp_path, dataset, dtype="float32")
    assert np.allclose(attached["teacher_logits"], directly(model, dataset), atol=1e-5)
    assert attached.column_names == [*dataset.column_names, "teacher_logits"]
    assert attached["input_ids"] == dataset["input_ids"] and attached["label"] == dataset["label"]
    assert load_from_disk(str(directory))["example_id"] == list(range(50))


@pytest.mark.parametrize("change", ["shuffle", "select", "sort", "slices"])
def test_indices_mappings_and_chunks_keep_the_order(change, tmp_path, chunks_of_16):
    """datasets keeps a shuffled set as a list of row numbers: read past it, every answer is another row's."""
    dataset = rows()
    dataset = {
        "shuffle": lambda: dataset.shuffle(seed=1),
        "select": lambda: dataset.select([40, 3, 3, 17, 0]),
        "sort": lambda: dataset.sort("label"),
        "slices": lambda: concatenate_datasets([dataset.select(range(30, 50)), dataset.select(range(7))]),
    }[change]()
    attached, directory, model = made(tmp_path, dataset, dtype="float32")
    assert np.allclose(attached["teacher_logits"], directly(model, dataset), atol=1e-5)
    assert attached["input_ids"] == dataset["input_ids"]
    # the same rows, stored in one piece, are the same rows
    again = load_cache(directory, Dataset.from_dict(dataset.to_dict()))
    assert again["teacher_logits"] == attached["teacher_logits"]


def test_a_cached_teacher_answers_as_its_teacher(tmp_path):
    """The law that makes a cache worth having."""
    attached, directory, model = made(tmp_path, rows(), dtype="float32")
    collator = DataCollatorWithPadding(tiny_tokenizer())
    batch = collator([attached[i] for i in (3, 0, 31)])
    teacher = CachedTeacher(cache=directory)
    teacher.prepare(None, {"teacher"}, "cpu")
    online = ModelTeacher(model)(batch).logits
    assert torch.allclose(teacher(batch).logits, online, atol=1e-5)
    assert teacher.facts()["members"][0]["name"] == "RobertaForSequenceClassification"


def test_classes_stay_in_the_teachers_order_and_the_student_gets_its_own(tmp_path):
    """A cache written in one student's order would be permuted twice for the next."""
    names = ["contradiction", "neutral", "entailment"]
    ids = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model, dataset = classifier(**ids), rows(10)
    student = tiny_roberta_config(id2label={0: "entailment", 1: "contradiction", 2: "neutral"}, num_labels=3)
    teacher = ModelTeacher(model)
    teacher.align_labels(student)
    attached = cache_teacher(dataset, teacher, tmp_path / "cache", dtype="float32")
    assert np.allclose(attached["teacher_logits"], directly(model, dataset), atol=1e-5)
    assert teacher.label_order.tolist() == [2, 0, 1]  # as the caller left it
    cached = CachedTeacher(cache=tmp_path / "cache")
    cached.align_labels(student)
    batch = {"teacher_logits": torch.tensor(attached["teacher_logits"])}
    expected = np.stack(directly(model, dataset))[:, [2, 0, 1]]
    assert np.allclose(cached(batch).logits, expected, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_per_token_are_stored_without_padding(side, tmp_path, chunks_of_16):
    """Padding that is stored is padded again for other batches, and shifts the answers against the tokens."""
    model = RobertaForTokenClassification(tiny_roberta_config(num_labels=3, initializer_range=0.5))
    tokenizer, dataset = tiny_tokenizer(), rows(20)
    tokenizer.padding_side = side
    settings = {"collator": DataCollatorWithPadding(tokenizer), "processing_class": tokenizer}
    attached, directory, _ = made(tmp_path, dataset, model, dtype="float32", features=True, **settings)
    teacher = ModelTeacher(model)
    teacher.needs = frozenset({"teacher", "features"})
    for row in attached:
        alone = teacher({"input_ids": torch.tensor([row["input_ids"]])})
        assert np.asarray(row["teacher_logits"]).shape == (len(row["input_ids"]), 3)
        assert np.allclose(row["teacher_logits"], alone.logits[0], atol=1e-5)
        assert np.allclose(row["teacher_features"], alone.features[0], atol=1e-4)
    assert verify_cache(directory, dataset, teacher, **settings) < 1e-4


def test_a_bare_encoder_has_features_only(tmp_path):
    """Feature distillation from an encoder needs no logits, and must not ask for any."""
    model, dataset = RobertaModel(tiny_roberta_config()), rows(10)
    attached, directory, _ = made(tmp_path, dataset, model, features=True)
    assert "teacher_logits" not in attached.column_names
    assert [len(row) for row in attached["teacher_features"]] == [len(ids) for ids in dataset["input_ids"]]
    assert verify_cache(directory, dataset, ModelTeacher(model)) < 1e-2
    with pytest.raises(ValueError, match="answered no logits.*features=True"):
        cache_teacher(dataset, ModelTeacher(model), tmp_path / "other")


def test_features_that_nobody_asked_for_are_not_stored(tmp_path):
    """Hidden states of a whole data set fill a disk that logits would not have touched."""

    class Generous(ModelTeacher):
        def respond(self, batch, progress=None):
            return TeacherOutput(logits=super().respond(batch, progress).logits, features=torch.zeros(8, 5, 16))

    attached = cache_teacher(rows(8), Generous(classifier()), tmp_path / "cache", batch_size=8)
    assert "teacher_features" not in attached.column_names


def test_answers_lie_on_the_students_tokens(tmp_path):
    """With two tokenizers the teacher has more tokens than the row has labels."""
    model = RobertaForTokenClassification(tiny_roberta_config(num_labels=3, initializer_range=0.5))
    dataset = Dataset.from_dict(
        {
            "input_ids": [[0, 7, 2], [0, 8, 9, 2]],
            "teacher_input_ids": [[0, 7, 7, 7, 2], [0, 8, 9, 9, 9, 9, 2]],
            "teacher_positions": [[0, 1, 4], [0, 1, 2, 6]],
        }
    )
    attached, _, _ = made(tmp_path, dataset, model, dtype="float32")
    for row in attached:
        direct = model.eval()(torch.tensor([row["teacher_input_ids"]])).logits[0].detach()
        assert np.allclose(row["teacher_logits"], direct[row["teacher_positions"]], atol=1e-5)


def test_an_ensemble_is_cached_with_all_its_members(tmp_path):
    """A hash of the first member alone takes another ensemble's cache."""
    models, dataset = [classifier() for _ in range(3)], rows(20)
    attached = cache_teacher(dataset, EnsembleTeacher(models[:2]), tmp_path / "cache", dtype="float32")
    expected = np.mean([torch.tensor(np.stack(directly(m, dataset))).softmax(-1).numpy() for m in models[:2]], axis=0)
    assert np.allclose(np.exp(attached["teacher_logits"]), expected, atol=1e-5)
    load_cache(tmp_path / "cache", dataset, teacher=EnsembleTeacher(models[:2]))
    for other in (EnsembleTeacher([models[0], models[2]]), EnsembleTeacher(models[:2], "logits")):
        with pytest.raises(ValueError, match="something else.*(weights|teacher)"):
            load_cache(tmp_path / "cache", dataset, teacher=other)
    with pytest.raises(ValueError, match="votes or draws"):
        cache_teacher(dataset, EnsembleTeacher(models, "vote"), tmp_path / "votes")


def images(count=6):
    from PIL.Image import fromarray

    pictures = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
    return Dataset.from_dict({"image": [fromarray(picture) for picture in pictures]})


def vision_teacher():
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return ModelTeacher(ViTForImageClassification(config))


def test_images_are_cached_through_a_transform(tmp_path):
    """Joining the columns drops the transform, and training then fails, or trains on raw images."""
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    dataset, teacher = images(), vision_teacher()

    def transform(batch):
        made = dict(processor(batch["image"], return_tensors="pt"))
        return made | {name: batch[name] for name in batch if name.startswith("teacher_")}

    dataset = dataset.with_transform(transform)
    settings = {"columns": ("image",), "processing_class": processor}
    attached = cache_teacher(dataset, teacher, tmp_path / "cache", dtype="float32", **settings)
    row = attached[2]
    direct = teacher({"pixel_values": torch.as_tensor(np.asarray(row["pixel_values"]))[None]}).logits[0]
    assert np.allclose(row["teacher_logits"], direct, atol=1e-5)
    assert verify_cache(tmp_path / "cache", dataset, teacher, processing_class=processor) < 1e-5
    with pytest.raises(ValueError, match="none; the data set has image.*columns="):
        cache_teacher(dataset, teacher, tmp_path / "other")


def test_images_are_known_by_their_bytes_not_their_place(tmp_path):
    """Hashed with their paths, every image cache would be worthless on another machine."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for i, row in enumerate(images(3)):
            row["image"].save(tmp_path / folder / f"{i}.png")
    here, there = (
        Dataset.from_dict({"image": [str(tmp_path / place / f"{i}.png") for i in range(3)]}).cast_column(
            "image", Image()
        )
        for place in ("here", "there")
    )
    assert content_hash(here, ["image"])[0] == content_hash(there, ["image"])[0]
    assert content_hash(here, ["image"])[0] != content_hash(there.select([0, 2, 1]), ["image"])[0]


# ---- the manifest ----


def test_the_manifest_names_everything_and_no_local_path(tmp_path):
    """What is not written down cannot be checked; what names a home folder cannot be published."""
    folder = tmp_path / "secret-place" / "my-teacher"
    classifier().save_pretrained(folder)
    dataset, tokenizer = rows(10), tiny_tokenizer()
    directory = tmp_path / "cache"
    cache_teacher(dataset, ModelTeacher(folder), directory, processing_class=tokenizer)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["teacher"]["name"] == "my-teacher" and manifest["rows"] == 10
    assert manifest["columns"] == ["attention_mask", "input_ids"] and manifest["dtype"] == "float16"
    assert manifest["config"]["num_labels"] == 3 and manifest["view"] == "plain"
    assert all(len(manifest[name]) == 64 for name in ("weights", "data", "processing"))
    for path in directory.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert b"secret-place" not in path.read_bytes(), path
    assert not (tmp_path / "cache.unfinished").exists()


def test_equal_rows_have_one_hash_and_others_another():
    """A hash that misses a changed token serves answers to rows that are no longer there."""
    plain = {"input_ids": [[5, 6], [7], [], [8, 9, 10]], "text": ["a", None, "", "bc"], "x": [0.5, 1.0, 2.0, 3.0]}
    columns = list(plain)

    def content(dataset):
        return content_hash(dataset, columns)[0]

    dataset = Dataset.from_dict(plain)
    first = content(dataset)
    assert content(Dataset.from_list([dict(row) for row in dataset])) == first
    assert content(concatenate_datasets([dataset.select([0]), dataset.select([1, 2, 3])])) == first
    assert content(dataset.select([3, 2, 1, 0]).select([3, 2, 1, 0])) == first
    assert content(dataset.add_column("other", [1, 2, 3, 4])) == first
    assert content(dataset.with_format("torch")) == first
    for width in ("int32", "int64", "uint16"):  # datasets makes a column of this name int32 by itself
        assert content(dataset.cast_column("input_ids", List(Value(width)))) == first
    changed = [
        {"input_ids": [[5, 6], [7], [], [8, 9, 11]]},
        {"input_ids": [[5], [6, 7], [], [8, 9, 10]]},
        {"input_ids": [[5, 6], [7], [8, 9, 10], []]},
        {"text": ["a", "", None, "bc"]},
        {"text": ["a", None, "b", "c"]},
        {"x": [0.5, 1.0, 3.0, 2.0]},
    ]
    hashes = [content(Dataset.from_dict({**plain, **change})) for change in changed]
    assert len({first, *hashes}) == len(changed) + 1
    assert content(dataset.select([0, 1, 2])) != first


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary"])
def test_slices_at_any_place_have_the_same_hash(kind, tmp_path):
    """Tables remember where a slice began: read from the buffer's start, a slice hashes as its neighbours."""
    long = rows(2500)
    texts = [f"text {i}" * (i % 5) for i in range(2500)]
    long = long.add_column("text", [text.encode() for text in texts] if "binary" in kind else texts)
    long = long.cast_column("text", Value(kind))
    columns = ["input_ids", "text"]
    parts = concatenate_datasets([long.select(range(0, 700)), long.select(range(700, 2500))])
    long.save_to_disk(tmp_path / "saved", num_shards=3)
    for other in (parts, load_from_disk(str(tmp_path / "saved"))):
        assert content_hash(other, columns)[0] == content_hash(long, columns)[0]
    one, other = long.select(range(10, 20)), Dataset.from_list([long[i] for i in range(10, 20)])
    assert content_hash(one, columns)[0] == content_hash(other, columns)[0]


def test_tokenizers_are_told_apart_by_what_they_do():
    """The padding of the last call is state, not identity; another vocabulary is another tokenizer."""
    tokenizer = tiny_tokenizer()
    before = processing_hash(tokenizer)
    tokenizer(["w5 w6", "w7"], padding=True, truncation=True, max_length=3)
    assert processing_hash(tokenizer) == before == processing_hash(tiny_tokenizer())
    assert processing_hash(tiny_tokenizer(49)) != before
    small, large = (ViTImageProcessorPil(size={"height": n, "width": n}) for n in (8, 16))
    assert processing_hash(small) != processing_hash(large)
    assert processing_hash(ViTImageProcessorPil(size={"height": 8, "width": 8})) == processing_hash(small)


# ---- what load_cache and cache_teacher refuse ----


def changed_row(dataset):
    return dataset.map(lambda row, i: {"input_ids": [0, 9, 2] if i == 7 else row["input_ids"]}, with_indices=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.shuffle(seed=0), r"data\): [0-9a-f]{64} there, [0-9a-f]{64} here"),
        (changed_row, r"data\): [0-9a-f]{64} there"),
        (lambda d: d.select(range(40)), r"rows \(rows\): 50 there, 40 here"),
        (
            lambda d: d.remove_columns("attention_mask"),
            r"columns.*\['attention_mask', 'input_ids'\] there, \['input_ids'\]",
        ),
    ],
)
def test_a_cache_of_other_rows_is_refused(change, sentence, tmp_path):
    """The worst silent failure of a cache: every row learns from the answer to another one."""
    dataset = rows()
    _, directory, model = made(tmp_path, dataset)
    for again in (load_cache, lambda directory, d: cache_teacher(d, ModelTeacher(model), directory)):
        with pytest.raises(ValueError, match=sentence):
            again(directory, change(dataset))
    assert len(load_cache(directory, dataset.remove_columns("label"))) == 50  # a column the teacher never read


def test_another_teachers_cache_is_refused(tmp_path):
    """Retrained teachers keep their folder's name: only the weights tell."""
    dataset = rows()
    _, directory, model = made(tmp_path, dataset)
    load_cache(directory, dataset, teacher=ModelTeacher(copy.deepcopy(model)))
    other = copy.deepcopy(model)
    other.classifier.out_proj.bias.data[0] += 1e-3
    for refused in (
        lambda: load_cache(directory, dataset, teacher=ModelTeacher(other)),
        lambda: cache_teacher(dataset, ModelTeacher(other), directory),
    ):
        with pytest.raises(ValueError, match=r"\(weights\): [0-9a-f]{64} there, [0-9a-f]{64} here.*choose another"):
            refused()
    with pytest.raises(ValueError, match=r"\(teacher\).*float32.*there.*bfloat16.*here"):
        load_cache(directory, dataset, teacher=ModelTeacher(copy.deepcopy(model), dtype="bfloat16"))


def test_other_preprocessing_is_refused(tmp_path):
    """Rows tokenized by another tokenizer can have the same shapes, and even share most ids."""
    dataset, tokenizer = rows(), tiny_tokenizer()
    _, directory, model = made(tmp_path, dataset, processing_class=tokenizer)
    load_cache(directory, dataset, processing_class=tiny_tokenizer())
    with pytest.raises(
        ValueError, match=r"tokenizer or processor \(processing\): [0-9a-f]{64} there, [0-9a-f]{64} here"
    ):
        load_cache(directory, dataset, processing_class=tiny_tokenizer(49))
    with pytest.raises(ValueError, match=r"\(processing\).* None here"):
        cache_teacher(dataset, ModelTeacher(model), directory)


@pytest.mark.parametrize(("field", "value"), [("dtype", "float32"), ("features", True)])
def test_other_contents_are_refused(field, value, tmp_path):
    """Asked for float32 and given float16, a comparison of the two compares nothing."""
    dataset = rows()
    _, directory, model = made(tmp_path, dataset)
    with pytest.raises(ValueError, match=rf"\({field}\): .* there, {value} here"):
        cache_teacher(dataset, ModelTeacher(model), directory, **{field: value})


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_cache_is_refused(damage, tmp_path):
    """Half a file can still be opened, and a flipped bit is a wrong answer for one row for ever."""
    dataset = rows()
    _, directory, model = made(tmp_path, dataset)
    (arrow,) = directory.glob("*.arrow")
    content = arrow.read_bytes()
    if damage == "remove":
        arrow.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        arrow.write_bytes(content[:-100] if damage == "truncate" else flipped)
    for use in (
        lambda: load_cache(directory, dataset),
        lambda: cache_teacher(dataset, ModelTeacher(model), directory),
        lambda: verify_cache(directory, dataset, ModelTeacher(model)),
    ):
        with pytest.raises(ValueError, match="missing" if damage == "remove" else "damaged or truncated"):
            use()


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path):
    """A wrong path must not cost anybody their files."""
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match="holds other files"):
        cache_teacher(rows(5), ModelTeacher(classifier()), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "all of it"
    with pytest.raises(ValueError, match="no readable manifest.json"):
        load_cache(tmp_path, rows(5))


def test_a_finished_cache_is_returned_without_asking(tmp_path):
    """Asking again costs the hours that the cache was to save."""

    class Silent(ModelTeacher):
        def respond(self, batch, progress=None):
            raise AssertionError("asked again")

        def facts(self):
            return {**super().facts(), "kind": "ModelTeacher"}

    dataset = rows()
    attached, directory, model = made(tmp_path, dataset)
    again = cache_teacher(dataset, Silent(model), directory, batch_size=3)
    assert again["teacher_logits"] == attached["teacher_logits"]
    with pytest.raises(ValueError, match="has teacher_logits already"):
        load_cache(directory, again)


def test_the_longest_rows_come_first(tmp_path):
    """Too little memory must show at once and not after hours; and rows of one length cost no padding."""
    widths = []

    class Listening(ModelTeacher):
        def respond(self, batch, progress=None):
            widths.append(batch["input_ids"].shape[1])
            return super().respond(batch, progress)

    dataset = rows()
    cache_teacher(dataset, Listening(classifier()), tmp_path / "cache", batch_size=8)
    lengths = sorted(map(len, dataset["input_ids"]), reverse=True)
    assert widths == lengths[::8] and widths[0] > widths[-1]


def test_what_cannot_be_cached_is_refused_at_once(tmp_path):
    """Each of these would otherwise be found after hours, or never."""
    teacher = ModelTeacher(classifier())
    with pytest.raises(ValueError, match="no rows"):
        cache_teacher(rows(5).select([]), teacher, tmp_path / "a")
    with pytest.raises(TypeError, match="DatasetDict: give one split"):
        cache_teacher(DatasetDict(train=rows(5)), teacher, tmp_path / "a")
    with pytest.raises(ValueError, match="'int8'"):
        cache_teacher(rows(5), teacher, tmp_path / "a", dtype="int8")
    with pytest.raises(ValueError, match="columns to cache: text"):
        cache_teacher(rows(5), teacher, tmp_path / "a", columns=("text",))
    with pytest.raises(ValueError, match="answered no features"):
        cache_teacher(images_as_pixels(), NoFeatures(vision_teacher().model), tmp_path / "a", features=True)
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(classifier(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="cache the model with ModelTeacher"):
        cache_teacher(rows(5), AdapterTeacher(adapted), tmp_path / "a")
    assert not any(tmp_path.iterdir())


class NoFeatures(ModelTeacher):
    def respond(self, batch, progress=None):
        return TeacherOutput(logits=super().respond(batch, progress).logits)


def images_as_pixels():
    return Dataset.from_dict({"pixel_values": np.random.default_rng(0).random((4, 3, 8, 8), dtype=np.float32)})


def test_columns_of_numbers_need_no_collator(tmp_path):
    """Pixels that were made beforehand are cached as they are."""
    dataset, teacher = images_as_pixels(), vision_teacher()
    attached = cache_teacher(dataset, teacher, tmp_path / "cache", dtype="float32", features=True)
    direct = teacher({"pixel_values": torch.tensor(dataset["pixel_values"])})
    assert np.allclose(attached["teacher_logits"], direct.logits, atol=1e-5)
    assert np.asarray(attached["teacher_features"]).shape == (4, 5, 16)


# ---- random inputs, bad numbers ----


class RandomMask:
    """A collator without a name for its view that masks at random."""

    def __call__(self, examples):
        batch = DataCollatorWithPadding(tiny_tokenizer())(examples)
        masked = torch.rand(batch["input_ids"].shape) < 0.3
        return {**batch, "input_ids": batch["input_ids"].masked_fill(masked, 4)}


class Keyed(KeyedCollator):
    view = "augmented"


def test_random_inputs_are_refused(tmp_path):
    """Answers to one random crop, compared with another crop in every epoch, teach the student the wrong picture."""
    dataset, teacher = rows(), ModelTeacher(classifier())
    with pytest.raises(ValueError, match="input_ids differ when the same rows are collated twice"):
        cache_teacher(dataset, teacher, tmp_path / "cache", collator=RandomMask())
    with pytest.raises(ValueError, match=r"view 'augmented'.*ModelTeacher"):
        cache_teacher(dataset, teacher, tmp_path / "cache", collator=Keyed())
    pixels = images().with_transform(lambda batch: {"pixel_values": [torch.rand(3, 8, 8) for _ in batch["image"]]})
    with pytest.raises(ValueError, match="pixel_values differ"):
        cache_teacher(pixels, vision_teacher(), tmp_path / "cache", columns=("image",))
    assert not any(tmp_path.iterdir())


class Spoiled(ModelTeacher):
    """Answers `value` for rows that begin with a given token."""

    def __init__(self, model, value, tokens):
        super().__init__(model)
        self.value, self.tokens = value, torch.tensor(tokens)

    def respond(self, batch, progress=None):
        logits = super().respond(batch, progress).logits
        bad = torch.isin(batch["input_ids"][:, 1], self.tokens)
        return TeacherOutput(logits=torch.where(bad[:, None], self.value, logits))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_without_a_number_are_named(value, tmp_path):
    """One NaN in a cache makes every later run NaN, at a step that looks random."""
    dataset = rows()
    token = dataset[13]["input_ids"][1]
    bad = [i for i, ids in enumerate(dataset["input_ids"]) if ids[1] == token]
    with pytest.raises(ValueError, match="NaN or infinite for rows") as error:
        cache_teacher(dataset, Spoiled(classifier(), value, [token]), tmp_path / "cache", batch_size=64)
    assert str(bad) in str(error.value)


def test_values_too_large_for_float16_are_refused_and_fit_into_float32(tmp_path):
    """float16 ends at 65504 and turns the rest into infinity without a word."""
    dataset = rows(10)
    teacher = Spoiled(classifier(), 7e4, list(range(50)))
    with pytest.raises(ValueError, match=r"70000, more than float16 holds.*dtype='float32'"):
        cache_teacher(dataset, teacher, tmp_path / "cache")
    attached = cache_teacher(dataset, teacher, tmp_path / "cache", dtype="float32")  # the advice works
    assert attached["teacher_logits"][0] == [7e4] * 3


# ---- verify ----


def test_verify_measures_the_difference(tmp_path):
    """The one check that runs the teacher: it must see what hashes cannot, and not cry wolf about rounding."""
    dataset, tokenizer = rows(), tiny_tokenizer()
    _, directory, model = made(tmp_path, dataset)
    exact = np.stack(directly(model, dataset))
    rounding = np.abs(exact - exact.astype(np.float16)).max()
    found = verify_cache(directory, dataset, ModelTeacher(model), rows=1000)
    assert 0 < found == pytest.approx(rounding, rel=0.05)
    assert verify_cache(directory, dataset, ModelTeacher(model), rows=5) <= found
    collator = DataCollatorWithPadding(tokenizer)
    assert verify_cache(directory, dataset, ModelTeacher(model), collator=collator) <= found + 1e-6


def test_verify_names_the_first_row_with_both_values(tmp_path):
    """'The cache is wrong' leaves a choice of 400 000 rows to look at."""
    dataset = rows()
    attached, directory, model = made(tmp_path, dataset)
    with pytest.raises(ValueError, match=r"row \d+: the cached teacher_logits is \[.*\], this teacher answers \[.*\]"):
        verify_cache(directory, dataset, ModelTeacher(classifier()))
    token = dataset[20]["input_ids"][1]
    first = next(i for i, ids in enumerate(dataset["input_ids"]) if ids[1] == token)
    shown = f"{attached[first]['teacher_logits'][0]:.4g}"
    with pytest.raises(ValueError, match=rf"row {first}: .*\[{shown}.*answers \[9, 9, 9\]"):
        verify_cache(directory, dataset, Spoiled(model, 9.0, [token]))


@pytest.mark.parametrize(("dtype", "change"), [("float16", 2e-2), ("float32", 1e-3)])
def test_verify_sees_a_small_change(dtype, change, tmp_path):
    """A teacher trained for a few more steps differs by little: within a generous tolerance it passes for the same."""
    dataset = rows()
    _, directory, model = made(tmp_path, dataset, dtype=dtype)
    other = copy.deepcopy(model)
    other.classifier.out_proj.bias.data += change
    with pytest.raises(ValueError, match="row 0: "):
        verify_cache(directory, dataset, ModelTeacher(other), rows=50)


def test_verify_draws_the_rows_by_its_seed(tmp_path):
    """The same few rows every time never find the bad one; other rows every time cannot be reproduced."""
    asked = []

    class Listening(ModelTeacher):
        def respond(self, batch, progress=None):
            asked.append(batch["input_ids"].shape[0])
            return super().respond(batch, progress)

    dataset = rows()
    _, directory, model = made(tmp_path, dataset)
    found = [verify_cache(directory, dataset, Listening(model), rows=7, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2] and sum(asked) == 21


# ---- killed, and several at once ----

SCRIPT = """
import time
from datasets import Dataset
from hfkd import cache
from hfkd.teachers import ModelTeacher
from hfkd.testing import tiny_rows
cache.CHUNK_ROWS = 16

class Slow(ModelTeacher):
    def respond(self, batch, progress=None):
        time.sleep({delay})
        print("asked", len(batch["input_ids"]))
        return super().respond(batch, progress)
    def facts(self):
        return {{**super().facts(), "kind": "ModelTeacher"}}

cache.cache_teacher(Dataset.from_list(tiny_rows(200)), Slow({folder!r}), {directory!r}, batch_size=8, dtype="float32")
"""


def start(tmp_path, directory, delay, log):
    script = tmp_path / "caches.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path / "teacher"), directory=str(directory), delay=delay))
    return launching.started(script, log=log)[0]


def arrow_bytes(directory):
    return [path.read_bytes() for path in sorted(directory.glob("*.arrow"))]


@pytest.mark.launch
def test_a_killed_call_goes_on_and_ends_as_if_never_killed(tmp_path, chunks_of_16):
    """Rows lost or doubled by a kill shift every later answer; starting over costs the hours already spent."""
    classifier().save_pretrained(tmp_path / "teacher")
    dataset, directory = rows(200), tmp_path / "killed"
    unfinished = tmp_path / "killed.unfinished"
    process = start(tmp_path, directory, 0.1, tmp_path)
    while len(list(unfinished.glob("rows-*.arrow"))) < 4:
        assert process.is_alive(), (tmp_path / "printed-0.txt").read_text()
        time.sleep(0.02)
    process.kill()
    process.join()
    done = sorted(unfinished.glob("rows-*.arrow"))
    assert not directory.exists() and 4 <= len(done) < 13
    kept = {path: path.stat().st_mtime_ns for path in done}
    with pytest.raises(ValueError, match="unfinished: call cache_teacher again"):
        load_cache(directory, dataset)
    with pytest.raises(ValueError, match=r"\(weights\).*there.*Delete it, or choose another"):
        cache_teacher(dataset, ModelTeacher(classifier()), directory, batch_size=8, dtype="float32")
    with pytest.raises(ValueError, match=r"batch_size\): 8 there, 4 here"):
        cache_teacher(dataset, ModelTeacher(tmp_path / "teacher"), directory, batch_size=4, dtype="float32")
    assert {path: path.stat().st_mtime_ns for path in done} == kept
    done[1].write_bytes(done[1].read_bytes()[:-200])  # a disk that lied about fsync

    asked = []

    class Counting(ModelTeacher):
        def respond(self, batch, progress=None):
            asked.append(len(batch["input_ids"]))
            return super().respond(batch, progress)

        def facts(self):
            return {**super().facts(), "kind": "ModelTeacher"}

    resumed = cache_teacher(dataset, Counting(tmp_path / "teacher"), directory, batch_size=8, dtype="float32")
    assert sum(asked) == 200 - 16 * (len(done) - 1)
    cache_teacher(dataset, ModelTeacher(tmp_path / "teacher"), tmp_path / "whole", batch_size=8, dtype="float32")
    assert arrow_bytes(directory) == arrow_bytes(tmp_path / "whole")
    assert load_from_disk(str(directory))["example_id"] == list(range(200))
    assert np.allclose(
        resumed["teacher_logits"],
        directly(RobertaForSequenceClassification.from_pretrained(tmp_path / "teacher"), dataset),
        atol=1e-5,
    )
    assert not unfinished.exists()


@pytest.mark.launch
def test_several_processes_make_one_cache(tmp_path):
    """Every process of torchrun runs the recipe: without turns they write into each other's files."""
    classifier().save_pretrained(tmp_path / "teacher")
    logs = [tmp_path / "first", tmp_path / "second"]
    processes = [start(tmp_path, tmp_path / "cache", 0.02, log) for log in logs]
    for process in processes:
        process.join(120)
    outputs = [(log / "printed-0.txt").read_text() for log in logs]
    assert all(process.exitcode == 0 for process in processes), outputs
    assert sorted(sum(map(int, re.findall(r"asked (\d+)", out))) for out in outputs) == [0, 200]
    assert len(load_cache(tmp_path / "cache", rows(200))) == 200


# ---- members of an ensemble ----


@pytest.mark.parametrize("combine", ["mean", "logits", "vote", "sample"])
def test_an_ensemble_of_cached_members_answers_as_the_members_do(tmp_path, chunks_of_16, combine):
    """Members' columns exchanged, or one attached twice, still make an ensemble, of other teachers."""
    members, dataset = [classifier() for _ in range(3)], rows()
    attached, cached = cache_members(dataset, members, tmp_path / "pool", dtype="float32", batch_size=8)
    added = [f"teacher_logits_{number}" for number in range(3)]
    assert attached.column_names == [*dataset.column_names, *added] and attached["label"] == dataset["label"]
    for name, member in zip(added, members, strict=True):
        assert np.allclose(attached[name], directly(member, dataset), atol=1e-5)
    batch = DataCollatorWithPadding(tiny_tokenizer())([attached[i] for i in (3, 0, 31, 49)])
    for count in (1, 3):  # fewer members of the same cache
        expected = EnsembleTeacher(members[:count], combine)(batch)
        teacher = EnsembleTeacher(cached[:count], combine)
        assert set(added[:count]) <= set(teacher.columns)
        answer = teacher(batch)
        if answer.logits is None:
            assert torch.equal(answer.labels, expected.labels)
        else:
            assert torch.allclose(answer.logits, expected.logits, atol=1e-5)


def test_members_that_were_asked_are_not_asked_again(tmp_path):
    """A killed call that starts anew asks ten teachers about five million rows twice."""
    members, dataset = [classifier() for _ in range(2)], rows(20)
    cache_members(dataset, members[:1], tmp_path)
    written = (tmp_path / "member-0" / "manifest.json").stat().st_mtime_ns
    asked = []
    for member in members:
        member.register_forward_hook(lambda module, *_: asked.append(module))
    attached, _ = cache_members(dataset, members, tmp_path)
    assert set(asked) == {members[1]} and "teacher_logits_1" in attached.column_names
    assert (tmp_path / "member-0" / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="the teacher's weights"):
        cache_members(dataset, members[::-1], tmp_path)
    with pytest.raises(ValueError, match="teacher_logits_0 already"):
        cache_members(attached, members, tmp_path)
    with pytest.raises(ValueError, match="at least one member"):
        cache_members(dataset, [], tmp_path)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("combine", ["vote", "sample"])
def test_votes_and_draws_are_not_cached_as_they_are(tmp_path, combine, soft):
    """Draws of one epoch, kept for all of them: RPL would silently become one fixed noisy label an example."""
    teacher = EnsembleTeacher([classifier()], combine, soft=soft)
    with pytest.raises(ValueError, match=f"cache_members.*'{combine}'"):
        cache_teacher(rows(4), teacher, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_members_classes_are_matched_from_the_cache(tmp_path):
    """Two members that number their classes differently, averaged by number, know nothing."""
    names = [["a", "b", "c"], ["c", "a", "b"]]
    members = [classifier(id2label=dict(enumerate(n)), label2id={x: i for i, x in enumerate(n)}) for n in names]
    attached, cached = cache_members(rows(12), members, tmp_path, dtype="float32")
    batch = DataCollatorWithPadding(tiny_tokenizer())([attached[i] for i in range(12)])
    online = EnsembleTeacher(members)(batch).logits
    assert torch.allclose(EnsembleTeacher(cached)(batch).logits, online, atol=1e-5)
    other = classifier(id2label={0: "joy", 1: "anger", 2: "fear"}, label2id={"joy": 0, "anger": 1, "fear": 2})
    _, strangers = cache_members(rows(12), [members[0], other], tmp_path / "other")
    with pytest.raises(ValueError, match="members do not match.*joy"):
        EnsembleTeacher(strangers, "vote")
