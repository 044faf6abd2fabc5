"""CIFAR-5m's files in small: npz parts, class files with and without a header, and what is refused."""

import numpy as np
import pytest

from hfkd.data.cifar5m import LABELS, cifar5m_files, load_cifar5m
from hfkd.data.pixels import ImageCollator, PixelView


def images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def class_files(folder, raw=(), rows=4):
    """Class c has `rows` + c images; those in `raw` lie without a header, as the released labels do."""
    written = {}
    for label in range(10):
        written[label] = images(rows + label, label)
        path = folder / f"class{label}.npy"
        path.write_bytes(written[label].tobytes()) if label in raw else np.save(path, written[label])
    return written


def pixels_of(dataset):
    return [np.frombuffer(row, np.uint8).reshape(32, 32, 3) for row in dataset["pixels"]]


@pytest.fixture
def parts(tmp_path):
    written = []
    for number in range(2):
        labels = np.random.default_rng(number).permutation(np.arange(40) % 10)
        written.append((images(40, 100 + number), labels))
        np.savez(tmp_path / f"cifar5m_part{number}.npz", X=written[-1][0], Y=labels)
    return tmp_path, written


def test_parts_are_read_in_order_with_their_labels(parts, tmp_path):
    """Images beside other images' labels make the ceiling of the study a control of nothing."""
    folder, written = parts
    found = load_cifar5m(folder, cache_dir=tmp_path / "cache")
    assert found["label"][:] == [int(label) for _, labels in written for label in labels]
    assert found.features["label"].names == list(LABELS) and found["example_id"][:] == list(range(80))
    for shown, image in zip(pixels_of(found), np.concatenate([x for x, _ in written]), strict=True):
        np.testing.assert_array_equal(shown, image)


@pytest.mark.parametrize("raw", [(), (0, 3, 9)])
def test_class_files_with_and_without_a_header(tmp_path, raw):
    """A header read as pixels shifts every image of a class by 128 bytes, which no shape shows."""
    written = class_files(tmp_path, raw)
    found = load_cifar5m(tmp_path, cache_dir=tmp_path / "cache")
    assert np.bincount(found["label"][:]).tolist() == [len(written[label]) for label in range(10)]
    for shown, image in zip(pixels_of(found), np.concatenate(list(written.values())), strict=True):
        np.testing.assert_array_equal(shown, image)


def test_rows_per_class_are_counted_over_all_files(parts, tmp_path):
    """Counted in each file by itself (as datasets does with lists of files) the pool is larger than was asked for."""
    folder, written = parts
    found = load_cifar5m(folder, 6, cache_dir=tmp_path / "cache")  # each part has 4 of a class
    assert np.bincount(found["label"][:]).tolist() == [6] * 10
    all_images, all_labels = (np.concatenate(arrays) for arrays in zip(*written, strict=True))
    shown = pixels_of(found)
    for label in range(10):
        first = all_images[all_labels == label][:6]
        own = [image for image, of in zip(shown, found["label"], strict=True) if of == label]
        np.testing.assert_array_equal(own, first)


def test_changed_files_are_read_again(tmp_path):
    """A cache of another download under the same name trains students on images that are gone."""
    class_files(tmp_path)
    before = load_cifar5m(tmp_path, 2, cache_dir=tmp_path / "cache")
    np.save(tmp_path / "class0.npy", images(9, 77))
    after = load_cifar5m(tmp_path, 2, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(pixels_of(after)[0], images(9, 77)[0])
    assert before["pixels"][0] != after["pixels"][0] and before["pixels"][2:] == after["pixels"][2:]


def test_many_rows_lie_on_disk_and_few_in_memory(tmp_path):
    """Fifteen gigabytes in memory end a study of five million images before its first step."""
    class_files(tmp_path)
    assert load_cifar5m(tmp_path, cache_dir=tmp_path / "cache").cache_files
    assert not load_cifar5m(tmp_path, 1, cache_dir=tmp_path / "cache", in_memory=True).cache_files


def test_the_collator_shows_them(tmp_path):
    """Rows that no collator can read would be found after the teachers are trained."""
    written = class_files(tmp_path)
    rows = load_cifar5m(tmp_path, 1, in_memory=True, cache_dir=tmp_path / "cache")
    collator = ImageCollator(PixelView((32, 32)))
    batch = collator.on_device(collator([rows[0], rows[9]]))
    expected = np.stack([written[0][0], written[9][0]]).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(batch["pixel_values"].numpy(), expected, atol=1e-6)
    assert batch["labels"].tolist() == [0, 9]


def test_wrong_folders_and_arrays_are_refused(tmp_path):
    """Without these, a wrong file becomes noise under CIFAR's name, or a class that no student ever sees."""
    with pytest.raises(FileNotFoundError, match="neither cifar5m_part0.npz"):
        load_cifar5m(tmp_path)
    np.save(tmp_path / "class0.npy", images(2, 0))
    with pytest.raises(ValueError, match=r"lacks class1.npy"):
        cifar5m_files(tmp_path)
    class_files(tmp_path)
    with pytest.raises(ValueError, match="5 rows of each class are asked for.*airplane.*4"):
        load_cifar5m(tmp_path, 5, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="1 or more, got 0"):
        load_cifar5m(tmp_path, 0)
    (tmp_path / "class4.npy").write_bytes(b"0" * 3073)
    with pytest.raises(ValueError, match=r"class4.npy has no header and 3073 bytes"):
        load_cifar5m(tmp_path, cache_dir=tmp_path / "cache")
    np.save(tmp_path / "class4.npy", images(2, 0).astype(np.float32))
    with pytest.raises(ValueError, match=r"class4.npy holds images .* of float32"):
        load_cifar5m(tmp_path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"X": images(3, 0)}, "no array Y"),
        ({"X": images(3, 0), "Y": np.array([0, 1, 10])}, "labels from 0 to 10"),
        ({"X": images(3, 0), "Y": np.array([0, 1])}, "for 3 images"),
        ({"X": images(3, 0).transpose(0, 3, 1, 2), "Y": np.array([0, 1, 2])}, "are needed"),
    ],
)
def test_wrong_parts_are_refused(tmp_path, arrays, said):
    """Channels first would be shown as stripes, and labels beyond the classes end a run in an index error."""
    np.savez(tmp_path / "cifar5m_part0.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        load_cifar5m(tmp_path, cache_dir=tmp_path / "cache")
