"""The image loader: every row of the table, every error, the cuts, and what `decoded` makes of odd and broken files."""

import gzip
import io
import logging
import struct
import warnings
from collections import Counter

import datasets
import numpy as np
import PIL
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture

from hfkd.data.images import IMAGE_TASKS, as_rgb, decoded, load_images, verify_images
from hfkd.data.pixels import PixelView
from hfkd.data.rows import with_example_ids
from hfkd.data.splits import load_indices, save_indices
from image_hub import DECLARED, class_names, labels, load, pictures, stored

HUB_TASKS = [task for task, row in IMAGE_TASKS.items() if row.path]
FOLDER_TASKS = [task for task, row in IMAGE_TASKS.items() if not row.path and not row.embedded]


def _noise(seed=0, height=6, width=8, channels=3):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _write(folder, classes, images=4, suffix=".png"):
    """`images` files in a folder for each class."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in range(images):
            Picture.fromarray(_noise(100 * number + image)).save(folder / name / f"{image}{suffix}")
    return folder


def _data(images, **columns):
    """A data set of encoded files (bytes), PIL images or paths."""
    columns = {"label": [0] * len(images), **columns}
    features = Features(image=Image(), label=ClassLabel(names=["a", "b"]))
    images = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in images]
    return Dataset.from_dict({"image": images, **columns}, features=features)


def _file(image, kind="PNG", **settings):
    content = io.BytesIO()
    image = Picture.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(content, kind, **settings)
    return content.getvalue()


def _pixels(dataset, height, width):
    return [np.frombuffer(row, np.uint8).reshape(height, width, 3) for row in dataset["pixels"]]


def _ids(dataset):
    return set(dataset["example_id"][:])


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load)


# ---- the table ----


@pytest.mark.parametrize("task", HUB_TASKS)
def test_rows_with_an_id_work_on_their_schema(task, monkeypatch):
    """A wrong column, split or class order in the table is found on the first day with a network, in front of a user."""
    row, declared, calls = IMAGE_TASKS[task], DECLARED[task], []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: calls.append(names) or load(*names))
    splits = load_images(task)
    assert calls == [(declared["path"], declared["name"])] and row.source
    assert list(splits) == ["train", "validation", "test"]
    for dataset in splits.values():
        assert dataset.column_names == ["image", "label", "example_id"]
        assert dataset.features["image"] == Image()
        assert dataset.features["label"].names == class_names(task)
        assert row.label_names is None or list(row.label_names) == class_names(task)
    source = {"train": row.train, "validation": row.validation or row.train, "test": row.test}
    for split, dataset in splits.items():
        theirs = pictures(task, source[split])
        for example in dataset:
            assert example["label"] == labels(task)[example["example_id"]]
            assert np.array_equal(np.asarray(example["image"]), np.asarray(theirs[example["example_id"]]))
    assert not _ids(splits["train"]) & _ids(splits["validation"]) or row.validation


@pytest.mark.parametrize("task", HUB_TASKS)
def test_the_known_sizes_are_those_of_the_hub(task, hub, caplog):
    """A size that is wrong in the table warns every honest run, until nobody reads the warning any more."""
    row, declared = IMAGE_TASKS[task], DECLARED[task]
    named = {"train": row.train, "validation": row.validation, "test": row.test}
    assert dict(row.rows) == {split: declared["splits"][name] for split, name in named.items() if name}
    classes = declared["classes"]
    assert row.classes == (classes if isinstance(classes, int) else len(classes))
    load_images(task)
    for split, number in row.rows.items():
        assert f"the {split} split of {task} has 8 rows and {number} are known" in caplog.text


def test_the_papers_splits_of_cifar_and_imagenet():
    """Settings chosen on another share than the papers' is a comparison with another protocol."""
    for task, held_out in {"cifar10": 5_000, "cifar100": 5_000, "imagenet_1k": 50_000}.items():
        row = IMAGE_TASKS[task]
        assert round(row.validation_share * row.rows["train"]) == held_out


def test_hidden_labels_are_never_a_test(hub):
    """A score on labels that are all -1 is 0 for a perfect model, and looks like one."""
    splits = load_images("imagenet_1k")
    assert all(label >= 0 for dataset in splits.values() for label in dataset["label"])
    with pytest.raises(ValueError, match=r"the test split has labels that train does not: \['-1'\] .*hidden labels"):
        load_images(dataset_name="ILSVRC/imagenet-1k")


def test_the_tiny_validation_split_of_the_chest_x_rays_is_not_used(hub):
    """Settings chosen on 16 images are chosen by chance."""
    splits = load_images("chest_xray")
    train = [np.asarray(picture).tobytes() for picture in pictures("chest_xray", "train")]
    assert all(np.asarray(image).tobytes() in train for image in splits["validation"]["image"])


def test_class_names_in_another_order_are_an_error(monkeypatch):
    """Swapped class names give a teacher that is confidently wrong."""
    names = ["bean_rust", "angular_leaf_spot", "healthy"]
    splits = stored("beans").cast_column("labels", ClassLabel(names=names))
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: splits)
    with pytest.raises(ValueError, match=r"names its classes \['bean_rust', .*the task expects \['angular_leaf_spot'"):
        load_images("beans")


def test_another_number_of_classes_is_an_error(monkeypatch, tmp_path):
    """A head of 100 outputs trained on the 20 coarse classes of CIFAR-100 looks merely bad."""
    splits = stored("cifar100").cast_column("fine_label", ClassLabel(num_classes=120))
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: splits)
    with pytest.raises(ValueError, match="the task cifar100 has 100 classes, and the data has 120"):
        load_images("cifar100")
    with pytest.raises(ValueError, match="the task cub_200 has 200 classes, and the data has 2"):
        load_images("cub_200", _write(tmp_path, ["a", "b"]))


@pytest.mark.parametrize("task", FOLDER_TASKS)
def test_tasks_without_an_id_ask_for_a_folder(task, tmp_path):
    """A guessed Hub id loads somebody's variant of the data, and the score is compared with the paper's."""
    row = IMAGE_TASKS[task]
    with pytest.raises(ValueError, match=f"the task {task} needs --data_dir, .*: no Hub id is known"):
        load_images(task)
    for split in ("train", "test"):
        _write(tmp_path / split, [f"{number:03d}" for number in range(row.classes or 3)], images=2, suffix=".bmp")
    splits = load_images(task, tmp_path, validation_share=0)
    assert [len(dataset) for dataset in splits.values()] == [2 * (row.classes or 3)] * 2
    assert row.metric == row.metrics[0]


@pytest.mark.parametrize(("task", "sizes"), [("mnist_5k", (3500, 500, 1000)), ("digits", (1258, 180, 359))])
def test_embedded_rows_are_cut_as_documented(task, sizes, caplog):
    """A score on other rows than the table says cannot be compared with the table."""
    try:
        splits = load_images(task)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert {split: len(dataset) for split, dataset in splits.items()} == dict(
        zip(("train", "validation", "test"), sizes, strict=True)
    )
    assert "known" not in caplog.text and all(f"{size:,}" in IMAGE_TASKS[task].source for size in sizes)
    together = Counter(number for dataset in splits.values() for number in dataset["example_id"])
    assert set(together) == set(range(sum(sizes))) and set(together.values()) == {1}
    shares = [np.array([*Counter(dataset["label"]).values()]) / len(dataset) for dataset in splits.values()]
    assert all(len(share) == 10 and abs(share - 0.1).max() < 0.02 for share in shares)


def test_fashion_mnist_from_the_debian_package(tmp_path, monkeypatch):
    """The benchmarks' data with images and labels out of step trains, and scores ten per cent."""
    for part, rows in {"train": 40, "t10k": 20}.items():
        pixels, classes = _noise(rows, rows, 28, 28).tobytes(), bytes(number % 10 for number in range(rows))
        images = gzip.compress(struct.pack(">4i", 2051, rows, 28, 28) + pixels[: rows * 784])
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(images)
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">2i", 2049, rows) + classes))
    monkeypatch.setenv("HFKD_FASHION_MNIST", str(tmp_path))
    splits = load_images("fashion_mnist_local")
    assert [len(dataset) for dataset in splits.values()] == [30, 10, 20]  # one of each class at least
    assert all(example["label"] == example["example_id"] % 10 for dataset in splits.values() for example in dataset)


# ---- cuts ----


def _hub_set(monkeypatch, labels, **splits):
    features = Features(image=Image(), label=ClassLabel(names=[f"c{number}" for number in range(max(labels) + 1)]))
    content = _file(_noise())
    rows = {split: labels for split in splits or ("train", "test")} | splits
    built = {
        split: Dataset.from_dict({"image": [{"bytes": content, "path": None}] * len(own), "label": own}, features)
        for split, own in rows.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: DatasetDict(built))


def test_settings_are_chosen_on_rows_held_out_of_train(monkeypatch):
    """Settings chosen on the test split make its score a training score."""
    _hub_set(monkeypatch, [number % 5 for number in range(200)])
    splits = load_images(dataset_name="some/id")
    assert [len(dataset) for dataset in splits.values()] == [180, 20, 200]
    assert set(Counter(splits["validation"]["label"]).values()) == {4}
    assert _ids(splits["train"]) | _ids(splits["validation"]) == set(range(200))
    assert load_images(dataset_name="some/id")["validation"][:] == splits["validation"][:]
    assert _ids(load_images(dataset_name="some/id", seed=1)["validation"]) != _ids(splits["validation"])
    assert len(load_images(dataset_name="some/id", validation_share=0.25)["validation"]) == 50
    assert list(load_images(dataset_name="some/id", validation_share=0)) == ["train", "test"]


def test_a_rare_class_stays_in_train(monkeypatch):
    """A class whose only image is held out cannot be learnt, and every prediction of it is wrong."""
    _hub_set(monkeypatch, [0] * 60 + [1] * 2 + [2])
    splits = load_images(dataset_name="some/id", validation_share=0.5)
    assert Counter(splits["train"]["label"]).keys() == {0, 1, 2}
    assert Counter(splits["validation"]["label"]).keys() == {0, 1}
    assert len(splits["validation"]) == 32


def test_a_source_of_one_split_is_cut_in_three(monkeypatch):
    """Without a test split of its own, the data would be scored on what it was trained on."""
    _hub_set(monkeypatch, [0, 1] * 50, everything=[0, 1] * 50)
    splits = load_images(dataset_name="some/id")
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 70, "validation": 10, "test": 20}
    assert sorted(number for dataset in splits.values() for number in dataset["example_id"]) == list(range(100))


def test_cuts_can_be_kept(monkeypatch, tmp_path):
    """A cut that cannot be written down cannot be repeated with another library."""
    _hub_set(monkeypatch, [0, 1] * 20)
    splits = load_images(dataset_name="some/id")
    rows = load_indices(save_indices(tmp_path / "cut.json", **{s: data["example_id"] for s, data in splits.items()}))
    assert rows == {split: dataset["example_id"][:] for split, dataset in splits.items()}


def test_rows_are_numbered_before_the_cut(hub):
    """Numbered afterwards, by the trainer, every image of the train split would be copied to do it."""
    for dataset in load_images("cifar10").values():
        assert with_example_ids(dataset) is dataset


def test_cuts_that_cannot_be_made(monkeypatch):
    """A share that is silently ignored, or leaves nothing, is found in the first evaluation."""
    _hub_set(monkeypatch, [0, 1] * 4)
    with pytest.raises(ValueError, match="validation_share is 1.0: a share .* from 0 to below 1"):
        load_images(dataset_name="some/id", validation_share=1.0)
    with pytest.raises(ValueError, match="7 of 8 rows are to be held out for validation, .* 2 classes .* 6 are left"):
        load_images(dataset_name="some/id", validation_share=0.9)
    _hub_set(monkeypatch, [0, 1, 2])
    with pytest.raises(ValueError, match="some of 3 rows are to be held out .* 3 classes kept for training 0 are left"):
        load_images(dataset_name="some/id")
    _hub_set(monkeypatch, [0, 1], train=[0, 1], valid=[0, 1, 0])
    with pytest.raises(ValueError, match=r"a validation split of its own \(3 rows\): leave out validation_share"):
        load_images(dataset_name="some/id", validation_share=0.1)
    assert len(load_images(dataset_name="some/id", validation_share=0)["validation"]) == 3  # nothing is cut


# ---- folders ----


def test_a_folder_with_splits(tmp_path, caplog):
    """Class ids in another order than every other loader gives make published heads answer with the wrong names."""
    for split in ("train", "val", "test"):
        _write(tmp_path / split, ["b", "a", "10", "9"], images=2)
    (tmp_path / "train" / "a" / "deeper").mkdir()
    Picture.fromarray(_noise()).save(tmp_path / "train" / "a" / "deeper" / "IMAGE.JPEG")
    (tmp_path / "train" / "a" / "notes.txt").write_text("x")
    (tmp_path / "train" / "a" / "._0.png").write_text("what some systems leave")
    (tmp_path / "train" / ".cache").mkdir()
    splits = load_images(data_dir=tmp_path)
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 9, "validation": 8, "test": 8}
    assert splits["train"].features["label"].names == ["10", "9", "a", "b"]
    assert splits["test"]["label"][:] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert np.array_equal(np.asarray(splits["test"][6]["image"]), _noise(0))  # b was written first
    assert "2 files below" in caplog.text and "are no images" in caplog.text


def test_a_folder_of_classes_is_cut(tmp_path):
    """A folder without splits that is trained on whole has nothing left to be scored on."""
    splits = load_images(data_dir=str(_write(tmp_path, ["cat", "dog"], images=20)))
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 28, "validation": 4, "test": 8}
    assert set(Counter(splits["test"]["label"]).values()) == {4}


def test_a_class_may_be_called_train(tmp_path):
    """CIFAR-100 has a class train: as a split, it would be the only class of the data."""
    splits = load_images(data_dir=_write(tmp_path, ["train", "bus"], images=10))
    assert splits["train"].features["label"].names == ["bus", "train"]


@pytest.mark.parametrize("missing_in", ["train", "test"])
def test_class_folders_that_differ_are_named(tmp_path, missing_in):
    """One misspelt folder shifts the ids of all classes after it in one split only."""
    for split in ("train", "test"):
        _write(tmp_path / split, ["cat", "dog", "cow"] if split != missing_in else ["cat", "dgo", "cow"])
    missing, unknown = ("dgo", "dog") if missing_in == "train" else ("dog", "dgo")
    with pytest.raises(
        ValueError, match=rf"of test differ .*: \['{missing}'\] are missing, \['{unknown}'\] are unknown"
    ):
        load_images(data_dir=tmp_path)


def test_a_class_folder_without_images_does_not_count(tmp_path):
    """A class that is empty in train is never learnt, and its test images are always wrong."""
    for split in ("train", "test"):
        _write(tmp_path / split, ["cat", "dog", "cow"])
    for file in (tmp_path / "train" / "cow").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"none are missing, \['cow'\] are unknown to train"):
        load_images(data_dir=tmp_path)


def test_copies_in_hidden_folders_do_not_count(tmp_path):
    """.ipynb_checkpoints holds a second copy of an image: one in train and one in test make the test score a lie."""
    _write(tmp_path, ["a", "b"])
    _write(tmp_path / "a" / ".ipynb_checkpoints", ["more"])
    splits = load_images(data_dir=tmp_path, validation_share=0)
    assert sum(len(dataset) for dataset in splits.values()) == 8


def test_links_to_folders_are_named_and_lost_images_are_missed(tmp_path, caplog):
    """Images behind a link that is not followed, or that points nowhere, are gone from the data without a word."""
    _write(tmp_path / "data", ["a", "b"])
    _write(tmp_path / "elsewhere", ["c"])
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere" / "c")  # a whole class is read
    (tmp_path / "data" / "a" / "more").symlink_to(tmp_path / "elsewhere" / "c")
    (tmp_path / "data" / "b" / "lost.png").symlink_to(tmp_path / "unmounted.png")
    splits = load_images(data_dir=tmp_path / "data")
    assert splits["train"].features["label"].names == ["a", "b", "c"]
    assert sum(len(dataset) for dataset in splits.values()) == 13
    assert "1 links to folders are not followed" in caplog.text
    with pytest.raises(ValueError, match=r"lost.png.*no such file"):
        verify_images(splits)


def test_accents_may_be_written_in_two_ways(tmp_path):
    """A test folder that went through a Mac has the same class names in other bytes, and the error shows no difference."""
    _write(tmp_path / "train", ["caf\u00e9", "b"])
    _write(tmp_path / "test", ["cafe\u0301", "b"])
    splits = load_images(data_dir=tmp_path)
    assert splits["test"].features["label"].names == ["b", "caf\u00e9"] and len(splits["test"]) == 8


def test_folders_that_cannot_be_used(tmp_path, caplog):
    """A folder read in a way that nobody meant trains a task that nobody has."""
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*gone \(looked in"):
        load_images(data_dir=tmp_path / "gone")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"empty holds no images \(0 other files\).*\.bmp, .*\.webp"):
        load_images(data_dir=tmp_path / "empty")
    (tmp_path / "empty" / "cat" / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"empty holds no images \(1 other files\)"):
        load_images(data_dir=tmp_path / "empty")
    flat = _write(tmp_path / "flat", ["train", "test"])
    with pytest.raises(ValueError, match=r"4 images lie directly in .*train, the first is 0.png: every image belongs"):
        load_images(data_dir=flat)
    with pytest.raises(ValueError, match=r"4 images lie directly in .*cat, the first"):
        load_images(data_dir=_write(tmp_path / "one", ["cat"]) / "cat")
    _write(tmp_path / "half" / "val", ["a", "b"])
    _write(tmp_path / "half" / "test", ["a", "b"])
    with pytest.raises(ValueError, match="half has test and val, and no folder train"):
        load_images(data_dir=tmp_path / "half")
    for split in ("train", "val", "dev", "extra"):
        _write(tmp_path / "both" / split, ["a", "b"])
    with pytest.raises(ValueError, match="both has dev and val, which mean the same: keep one"):
        load_images(data_dir=tmp_path / "both")
    (tmp_path / "both" / "dev").rename(tmp_path / "both" / "more")
    load_images(data_dir=tmp_path / "both")
    assert "extra, more are not read: they are no split" in caplog.text


# ---- other sources ----


def test_sources_that_do_not_go_together(tmp_path):
    """Two sources at once: one is ignored, and the card names the wrong one."""
    with pytest.raises(ValueError, match="unknown task 'cifar': the known ones are mnist_5k, "):
        load_images("cifar")
    with pytest.raises(ValueError, match="the task cifar10 brings its own data, and --data_dir .* leave out one"):
        load_images("cifar10", tmp_path)
    with pytest.raises(ValueError, match="choose one source of data"):
        load_images("cifar10", dataset_name="some/id")
    with pytest.raises(ValueError, match="choose one source of data"):
        load_images(data_dir=tmp_path, dataset_name="some/id")
    with pytest.raises(ValueError, match="the task cub_200 needs --data_dir"):
        load_images("cub_200", dataset_name="some/id")
    with pytest.raises(ValueError, match="fine is for --dataset_name: the folders of --data_dir"):
        load_images(data_dir=tmp_path, label_column="fine")
    with pytest.raises(ValueError, match=r"no data: give --task \(mnist_5k, .*\), --data_dir or --dataset_name"):
        load_images()


def test_no_network_names_the_id_and_the_ways_out(monkeypatch):
    """A bare connection error leaves people on a closed machine without a next step."""

    def refuse(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConnectionError) as caught:
        load_images("cifar100")
    for words in ("uoft-cs/cifar100", "--data_dir", "mnist_5k", "local folder", "cache"):
        assert words in str(caught.value)


def test_an_id_that_is_not_there_is_not_blamed_on_the_network(monkeypatch):
    """A typing error reported as a network error costs an afternoon."""

    def refuse(*arguments, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(FileNotFoundError, match="'no/such' is no folder here and no data set on the Hub"):
        load_images(dataset_name="no/such")


def test_a_saved_data_set_is_read_where_it_lies(tmp_path):
    """A loader that copies 150 GB of images to rename a column fills the disk before the first step."""
    stored("beans").save_to_disk(tmp_path / "beans")
    splits = load_images(dataset_name=str(tmp_path / "beans"))
    assert list(splits) == ["train", "validation", "test"]
    assert splits["train"].column_names == ["image", "label", "example_id"]
    for split, dataset in splits.items():
        assert {file["filename"] for file in dataset.cache_files} == {
            str(tmp_path / "beans" / split / "data-00000-of-00001.arrow")
        }


def test_columns_without_a_task(monkeypatch):
    """A model trained on the wrong one of two columns looks merely bad."""
    columns = {"photo": pictures("beans", "train"), "kind": list("abababab"), "label": ["1", "10", "2", "1"] * 2}
    features = Features(photo=Image(), kind=Value("string"), label=Value("string"))
    whole = Dataset.from_dict(columns, features=features)
    splits = {"train": whole}
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: DatasetDict(splits))
    found = load_images(dataset_name="some/id", validation_share=0)["train"]
    assert found.features["label"].names == ["1", "2", "10"] and found.features["image"] == Image()
    named = load_images(dataset_name="some/id", label_column="kind", validation_share=0)["train"]
    assert named.features["label"].names == ["a", "b"]
    splits["train"] = whole.add_column("class", list("abababab"))
    with pytest.raises(ValueError, match="the label column may be label or class: choose with --label_column"):
        load_images(dataset_name="some/id")
    splits["train"] = whole.remove_columns("label")
    with pytest.raises(
        ValueError, match="the label column is not there: name it with --label_column; columns are photo"
    ):
        load_images(dataset_name="some/id")
    splits["train"] = whole.remove_columns("photo")
    with pytest.raises(
        ValueError, match="the image column is not there: name it with --image_column; columns are kind"
    ):
        load_images(dataset_name="some/id")
    with pytest.raises(ValueError, match=r"the column 'kind' of the train split holds Value\('string'\), not images"):
        load_images(dataset_name="some/id", image_column="kind")
    splits["train"] = whole
    with pytest.raises(
        ValueError, match="the train split has no column 'foto': --image_column; columns are photo, kind"
    ):
        load_images(dataset_name="some/id", image_column="foto")
    splits["test"] = whole.select([])
    with pytest.raises(ValueError, match="the test split is empty"):
        load_images(dataset_name="some/id")


def test_splits_that_are_not_there(monkeypatch, hub):
    """Scoring on a split that was taken for another is a score nobody asked for."""
    _hub_set(monkeypatch, [0, 1], one=[0, 1], two=[0, 1])
    with pytest.raises(ValueError, match="some/id has no split 'train': its splits are one, two"):
        load_images(dataset_name="some/id")
    broken = {split: dataset for split, dataset in stored("beans").items() if split != "validation"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: DatasetDict(broken))
    with pytest.raises(ValueError, match="AI-Lab-Makerere/beans has no split 'validation': its splits are train, test"):
        load_images("beans")


# ---- decoding ----


@pytest.mark.parametrize(("size", "height", "width"), [(5, 5, 5), ((4, 10), 4, 10), (PixelView((3, 7)), 3, 7)])
def test_decoded_rows_are_the_resized_images(size, height, width):
    """Height and width swapped, or rows out of step with labels, trains without a word on nonsense."""
    arrays = [_noise(seed, 20 + seed, 30 - seed) for seed in range(6)]
    splits = DatasetDict(train=_data([Picture.fromarray(array) for array in arrays], label=[0, 1, 0, 1, 1, 0]))
    shuffled = DatasetDict(train=splits["train"].select([5, 3, 1]))
    found = decoded(shuffled, size)["train"]
    assert found.column_names == ["label", "pixels"] and found.features["label"].names == ["a", "b"]
    assert found["label"][:] == [0, 1, 1]
    for pixels, number in zip(_pixels(found, height, width), [5, 3, 1], strict=True):
        expected = Picture.fromarray(arrays[number]).resize((width, height), Picture.Resampling.BILINEAR)
        assert np.array_equal(pixels, np.asarray(expected))


def test_decoded_images_are_those_that_the_collator_would_make():
    """Decoding ahead with another filter or crop than training from files changes the score with the memory at hand."""
    view = PixelView((8, 8), resized=10, resample=Picture.Resampling.BICUBIC)
    image = Picture.fromarray(_noise(3, 20, 30))
    assert np.array_equal(_pixels(decoded(_data([image]), view), 8, 8)[0], view.fit(image))
    nearest = decoded(_data([image]), 8, resample=Picture.Resampling.NEAREST)
    assert np.array_equal(_pixels(nearest, 8, 8)[0], np.asarray(image.resize((8, 8), Picture.Resampling.NEAREST)))
    with pytest.raises(ValueError, match=r"resample is 0, and the view has its own \(3\): leave out one"):
        decoded(_data([image]), view, resample=0)


def test_images_without_labels_are_decoded():
    """Further pre-training needs images only."""
    found = decoded(_data([_noise(seed) for seed in range(3)]).select_columns("image"), 4)
    assert found.column_names == ["pixels"] and len(found) == 3


def test_more_images_than_one_chunk_holds():
    """Rows of the second chunk beside the labels of the first are a second of every thousand mislabelled."""
    flat = [np.full((1, 1, 3), number % 251, np.uint8) for number in range(2_300)]
    rows = [{"bytes": b"P6 1 1 255\n" + pixel.tobytes(), "path": None} for pixel in flat]
    found = decoded(Dataset.from_dict({"image": rows, "number": list(range(2_300))}).cast_column("image", Image()), 1)
    assert all(row["pixels"][0] == row["number"] % 251 for row in found)


def test_photographs_stand_upright(tmp_path):
    """A phone stores portraits lying down and says so: read without it, half of the data is turned by 90 degrees."""
    exif = Picture.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the stored rows
    lying = _noise(1, 6, 10)
    (tmp_path / "photo.png").write_bytes(_file(lying, exif=exif))
    found = decoded(_data([str(tmp_path / "photo.png")]), (10, 6))
    assert np.array_equal(_pixels(found, 10, 6)[0], np.rot90(lying, 3))


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bits_keep_their_shades(dtype):
    """Pillow clips 16-bit grey at 255: an X-ray becomes a white square, and the model learns from white squares."""
    values = np.arange(64, dtype=dtype).reshape(8, 8) * np.dtype(dtype).type(1000)
    for content in (_file(values, "TIFF"), b"P5 8 8 65535\n" + values.astype(">u2").tobytes()):
        found = np.asarray(as_rgb(Picture.open(io.BytesIO(content))))
        assert np.array_equal(found, np.repeat((values // 256)[:, :, None], 3, axis=2))


def test_numbers_without_a_range_are_not_guessed():
    """Floats of [0, 1] read as bytes are a black image."""
    with pytest.raises(ValueError, match="floating-point numbers, whose range is unknown"):
        as_rgb(Picture.fromarray(np.ones((2, 2), np.float32)))
    with pytest.raises(ValueError, match="run from -1 to 3, more than 16 bits"):
        as_rgb(Picture.fromarray(np.array([[-1, 3]], np.int32)))


def test_transparent_pixels_are_white():
    """The colours beneath a transparent background are whatever the editor left there: often black, often noise."""
    red = np.zeros((1, 3, 4), np.uint8) + np.array([255, 0, 0, 0], np.uint8)
    red[0, :, 3] = [0, 51, 255]
    expected = [[255, 255, 255], [255, 204, 204], [255, 0, 0]]  # 51 of 255 is a fifth of red over white
    assert np.abs(np.asarray(as_rgb(Picture.fromarray(red)))[0].astype(int) - expected).max() <= 1
    grey = np.array([[[7, 0], [7, 255]]], np.uint8)
    assert np.asarray(as_rgb(Picture.fromarray(grey, "LA")))[0].tolist() == [[255] * 3, [7] * 3]
    palette = Picture.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    content = io.BytesIO(_file(palette, transparency=0))
    assert np.asarray(as_rgb(Picture.open(content)))[0].tolist() == [[255] * 3, [0, 0, 255]]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, 255),
        ("L", 9, 9),
        ("P", 0, None),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
    ],
)
def test_every_mode_becomes_rgb(mode, color, expected):
    """One grey image in a folder of photographs stops the epoch in which its turn comes."""
    found = as_rgb(Picture.new(mode, (2, 3), color))
    assert found.mode == "RGB" and found.size == (2, 3)
    if expected is not None:
        assert np.array_equal(np.asarray(found), np.broadcast_to(expected, (3, 2, 3)))


def test_conversions_are_said_once(caplog):
    """Said for each image, it drowns the log; not said, nobody knows that the X-rays were 16 bits deep."""
    grey, color = Picture.fromarray(_noise(channels=0)), Picture.fromarray(_noise())
    clear = Picture.fromarray(_noise(channels=4))
    decoded(DatasetDict(train=_data([grey, color, grey]), test=_data([clear, grey])), 4)
    said = [record.getMessage() for record in caplog.records if "RGB" in record.getMessage()]
    assert said == ["of 5 images, converted to RGB (transparent ones over white): 3 of mode L, 1 of mode RGBA"]
    caplog.clear()
    verify_images(_data([color]))
    assert not caplog.records


# ---- broken files ----


@pytest.fixture
def broken(tmp_path):
    """Twelve rows, of which 1, 3, 4, 6, 7, 9 and 10 cannot be read; the number of a row is in its first pixel."""
    files = [_file(np.full((30, 30, 3), number, np.uint8)) for number in range(12)]
    noise = _file(_noise(0, 64, 64), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(noise[: len(noise) // 2])
    (tmp_path / "page.png").write_bytes(b"<html>404 Not Found</html>")
    (tmp_path / "empty.png").write_bytes(b"")
    files[1] = str(tmp_path / "cut.jpg")
    files[3] = str(tmp_path / "page.png")
    files[4] = str(tmp_path / "empty.png")
    files[6] = str(tmp_path / "gone.png")
    files[7] = files[7][:-40]  # into the pixels: without its last 12 bytes alone a PNG is still whole
    files[9] = None
    files[10] = _file(Picture.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    return _data(files, label=[number % 2 for number in range(12)])


@pytest.mark.parametrize("look", [lambda data, **skip: decoded(data, 4, **skip), verify_images])
def test_broken_files_are_counted_and_named_at_once(look, broken, tmp_path):
    """Found one by one, each in the middle of an epoch, seven broken files cost seven runs."""
    with pytest.raises(ValueError) as caught:
        look(broken)
    message = str(caught.value)
    assert message.startswith("7 of 12 images cannot be read: ")
    assert f"{tmp_path / 'cut.jpg'}, row 1 (image file is truncated" in message
    assert f"{tmp_path / 'page.png'}, row 3 (no image in a format that Pillow knows)" in message
    assert f"{tmp_path / 'empty.png'}, row 4 (" in message
    assert f"{tmp_path / 'gone.png'}, row 6 (there is no such file)" in message
    assert "; row 7 (" in message and "; ..." in message and "row 9" not in message
    assert "--skip_bad_images" in message


def test_broken_files_are_skipped_when_asked(broken, caplog):
    """A skipped image that takes its neighbour's label along is worse than the broken file."""
    found = decoded(broken, 4, skip_bad_images=True)
    assert [pixels[0, 0, 0] for pixels in _pixels(found, 4, 4)] == [0, 2, 5, 8, 11]
    assert found["label"][:] == [0, 0, 1, 0, 1]
    assert "7 of 12 images cannot be read" in caplog.text and "Their rows are left out" in caplog.text
    looked = verify_images(broken, skip_bad_images=True)
    assert [np.asarray(image)[0, 0, 0] for image in looked["image"]] == [0, 2, 5, 8, 11]
    assert looked.features == broken.features


def test_a_machine_out_of_memory_is_no_broken_file(monkeypatch):
    """With skip_bad_images, whatever did not fit into memory at that moment would be missing from the data."""

    def refuse(image):
        raise MemoryError

    monkeypatch.setattr("hfkd.data.images.as_rgb", refuse)
    with pytest.raises(MemoryError):
        verify_images(_data([_noise()]), skip_bad_images=True)


def test_whole_data_stays_as_it_is():
    """A look that copies ImageNet is one that nobody takes."""
    data = _data([_noise(seed) for seed in range(3)])
    assert verify_images(data) is data


def test_the_split_of_a_broken_file_is_named(broken):
    """Row 3 of which split?"""
    good = broken.select([0, 2])
    with pytest.raises(ValueError, match=r"1 of 3 images cannot be read: row 0 of test \("):
        verify_images(DatasetDict(train=good, test=broken.select([10])))
    with pytest.raises(ValueError, match=r"no image of test is left: row 0 of test \("):
        verify_images(DatasetDict(train=good, test=broken.select([10])), skip_bad_images=True)
    with pytest.raises(ValueError, match="no image of the data is left: row 0"):
        decoded(broken.select([9]), 4, skip_bad_images=True)
    with pytest.raises(ValueError, match="there is no column 'image' with images: columns are label"):
        decoded(broken.remove_columns("image"), 4)


@pytest.mark.parametrize("side", [12, 20])  # above the limit Pillow warns, above twice the limit it raises
def test_decompression_bombs_are_bad_images(side, monkeypatch):
    """A few kilobytes that unpack to gigabytes take the machine down, with everything else that runs on it."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    data = _data([_file(np.zeros((side, side, 3), np.uint8)), _file(_noise())])
    before = list(warnings.filters)
    with pytest.raises(ValueError, match=r"1 of 2 images .*row 0 \(Image size \(\d+ pixels\) exceeds .*bomb"):
        verify_images(data)
    assert len(decoded(data, 4, skip_bad_images=True)) == 1
    assert warnings.filters == before


def test_no_folder_of_this_machine_is_kept_with_the_pixels(tmp_path):
    """A home directory in a data set's description is pushed with the teacher's answers for all to read."""
    splits = load_images(data_dir=_write(tmp_path, ["cat", "dog"], images=10))
    found = decoded(splits, 4)["train"]
    found.save_to_disk(tmp_path / "saved")
    written = b"".join(file.read_bytes() for file in (tmp_path / "saved").iterdir())
    assert len(written) > 500 and str(tmp_path).encode() not in written and b".png" not in written


def test_decoded_rows_can_be_saved_and_read_again(tmp_path):
    """A column that only this process can read makes a cache of teacher answers worthless tomorrow."""
    logging.getLogger("datasets").setLevel(logging.ERROR)
    found = decoded(_data([_noise(seed) for seed in range(4)], label=[0, 1, 1, 0]), (6, 8))
    found.save_to_disk(tmp_path)
    again = datasets.load_from_disk(str(tmp_path))
    assert again[:] == found[:] and np.array_equal(_pixels(again, 6, 8)[3], _noise(3))
