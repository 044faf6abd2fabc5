"""Images as both sides see them: views, the collator, and the trainer that shows them."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures
from safetensors.torch import load_file
from transformers import (
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    DonutImageProcessorPil,
    EfficientNetImageProcessorPil,
    LevitImageProcessorPil,
    MobileNetV2ImageProcessorPil,
    MobileViTImageProcessorPil,
    PerceiverImageProcessorPil,
    PoolFormerImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hfkd import DistillationArguments, DistillationTrainer
from hfkd.cache import cache_teacher
from hfkd.data.augment import Augmentation
from hfkd.data.images import decoded
from hfkd.data.pixels import ImageCollator, PixelView
from hfkd.functional import cross_entropy, labelled_units
from hfkd.objectives import DKD, KD, CrossEntropy
from hfkd.teachers import CachedTeacher, ModelTeacher
from hfkd.trainers.inputs import refuse_dispatched_draws

SIZE = {"height": 8, "width": 8}


def pictures(rows: int = 12, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Dataset:
    generator = np.random.default_rng(0)
    shape = (*size, 3) if mode == "RGB" else size
    images = [Pictures.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for _ in range(rows)]
    features = Features(image=Image(), label=ClassLabel(num_classes=3), note=Value("string"))
    columns = {"image": images, "label": [i % 3 for i in range(rows)], "note": ["x"] * rows}
    return Dataset.from_dict(columns, features=features)


def vit(seed: int = 0, size: int = 8, **changes) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=size,
        patch_size=4,
        num_labels=3,
        **changes,
    )
    return ViTForImageClassification(config)


def arguments(folder, **changes) -> DistillationArguments:
    usual = {"per_device_train_batch_size": 4, "max_steps": 3, "report_to": "none", "save_strategy": "no"}
    return DistillationArguments(str(folder), disable_tqdm=True, **{**usual, "learning_rate": 1e-2, **changes})


class Recorder(ViTForImageClassification):
    """What a model really reads."""

    def forward(self, pixel_values=None, **kwargs):
        seen.append(pixel_values.detach().clone())
        return super().forward(pixel_values, **kwargs)


seen: list[torch.Tensor] = []

PROCESSORS = {
    "vit": ViTImageProcessorPil(size=SIZE),
    "shortest edge and crop": MobileNetV2ImageProcessorPil(
        size={"shortest_edge": 10}, crop_size={"height": 8, "width": 8}
    ),
    "deit": DeiTImageProcessorPil(size={"height": 10, "width": 10}, crop_size={"height": 8, "width": 8}),
    "levit": LevitImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    "bytes": ViTImageProcessorPil(size=SIZE, do_rescale=False, image_mean=[120.0] * 3, image_std=[60.0] * 3),
    "not normalised": ViTImageProcessorPil(size=SIZE, do_normalize=False),
    "nearest neighbour": ViTImageProcessorPil(size=SIZE, resample=0),
    "convnext and resnet": ConvNextImageProcessorPil(size={"shortest_edge": 8}, crop_pct=0.5),
    "convnext, warped": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "poolformer": PoolFormerImageProcessorPil(size={"shortest_edge": 8}, crop_size=SIZE, crop_pct=0.5),
    "efficientnet-b0": EfficientNetImageProcessorPil(
        size=SIZE, image_std=[0.47, 0.48, 0.49], rescale_factor=1 / 127.5, rescale_offset=True, include_top=True
    ),
    "mobilevit": MobileViTImageProcessorPil(size={"shortest_edge": 10}, crop_size=SIZE),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_view_is_what_the_processor_makes(name):
    """A model fine-tuned with one normalisation and distilled with another learns from a teacher that answers noise."""
    processor, rows = PROCESSORS[name], pictures(size=(13, 9))
    found = ImageCollator(processor)
    batch = found.on_device(found([{"image": row["image"], "label": row["label"]} for row in rows]))
    expected = processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"].float()
    assert batch["pixel_values"].shape == expected.shape
    step = 1 / 255 / min(PixelView.of(processor).std)  # one grey level: filters round differently
    assert (batch["pixel_values"] - expected).abs().max() <= 2 * step
    assert (batch["pixel_values"] - expected).abs().mean() <= 0.2 * step


def test_a_processor_without_one_size_is_refused():
    """A batch of images of different sizes fails in the middle of an epoch."""
    with pytest.raises(ValueError, match="names no size"):
        PixelView.of(ViTImageProcessorPil(do_resize=False))
    with pytest.raises(ValueError, match="std above 0"):
        PixelView((8, 8), std=(1.0, 0.0, 1.0))
    assert PixelView.of(ConvNextImageProcessorPil(size={"shortest_edge": 32})).size == (32, 32)


@pytest.mark.parametrize("kind", [DonutImageProcessorPil, PerceiverImageProcessorPil])
def test_a_processor_that_does_more_is_refused(kind):
    """A teacher whose processor pads or cuts first would be shown other pictures than it knows, without a sign."""
    with pytest.raises(ValueError, match="does more than to resize"):
        PixelView.of(kind(size={"height": 16, "width": 12}))
    with pytest.raises(ValueError, match="without image_mean"):
        PixelView.of(ViTImageProcessorPil(size=SIZE, image_mean=None))


def test_two_views_that_exchange_red_and_blue_differ():
    """A teacher that reads blue first would be shown the student's pixels, and answer about other colours."""
    rgb, bgr = PixelView((8, 8)), PixelView((8, 8), bgr=True)
    picture = pictures(1)[0]["image"]
    collator = ImageCollator(rgb, bgr)
    batch = collator.on_device(collator([{"image": picture}]))
    assert torch.equal(batch["teacher_pixel_values"], batch["pixel_values"].flip(1))


def test_a_long_strip_is_cut_before_it_is_resized():
    """One picture of 1 x 20,000 pixels would take gigabytes and most of a minute, in the middle of an epoch."""
    view = PixelView((8, 8), resized=10)
    ramp = np.broadcast_to(np.linspace(0, 255, 20_000)[:, None, None], (20_000, 1, 3)).astype(np.uint8)
    found = view.fit(Pictures.fromarray(ramp))
    assert found.shape == (8, 8, 3) and np.abs(found.astype(int) - 127).max() <= 1
    long = Pictures.fromarray(np.random.default_rng(0).integers(0, 256, (60, 4, 3), dtype=np.uint8))
    usual = np.asarray(long.resize((10, 150), resample=2).crop((1, 71, 9, 79))).astype(int)
    cut = view._centre_of_a_strip(long, (150, 10)).astype(int)
    assert (
        np.abs(cut - usual)[1:-1, 1:-1].max() <= 24
    )  # but for the border, where pixels outside of the box are not read


def test_rows_that_are_no_images_are_named():
    """Without this a user reads a KeyError of numpy."""
    collator = ImageCollator(PROCESSORS["vit"])
    with pytest.raises(ValueError, match="neither 'image' nor 'pixels'"):
        collator([{"img": 1, "label": 0}])
    for wrong in (np.zeros((4, 8, 3), np.uint8), np.zeros((8, 4, 6), np.uint8), bytes(100)):
        with pytest.raises(ValueError, match=r"shape .*\(8, 8, 3\)"):
            collator([{"pixels": wrong}])
    with pytest.raises(ValueError, match="'note' holds 'x'"):
        collator([pictures()[0]])
    with pytest.raises(ValueError, match="'label' holds None, which is no number: remove such rows"):
        collator([{"image": pictures()[0]["image"], "label": label} for label in (0, None)])
    for made in ("torch", "numpy"):  # with_format
        with pytest.raises(ValueError, match="not a picture of PIL"):
            collator([pictures().with_format(made)[0]])
    with pytest.raises(ValueError, match="num_labels"):
        ImageCollator(PROCESSORS["vit"], augmentation=Augmentation(mixup=0.2))


def test_two_columns_of_labels_are_refused():
    """The last of the two would be learned, whichever it is: coarse classes in place of fine ones."""
    with pytest.raises(ValueError, match="both would be labels"):
        ImageCollator(PROCESSORS["vit"])([{"image": pictures()[0]["image"], "labels": 1, "label": 0}])


def test_pixels_are_mixed_without_labels_too():
    """A student that learns from the teacher alone would train without the mixup that its card names."""
    rows, view = pictures(4).remove_columns(["note", "label"]), PixelView((8, 8))
    mixed = ImageCollator(view, augmentation=Augmentation(mixup=1.0), num_labels=3)
    features = [{**row, "example_id": i, "label": 0} for i, row in enumerate(rows)]
    with_labels = mixed.on_device(mixed(features))
    unlabelled = mixed.on_device(mixed([{k: v for k, v in row.items() if k != "label"} for row in features]))
    plain = ImageCollator(view)
    assert torch.equal(unlabelled["pixel_values"], with_labels["pixel_values"])
    assert not torch.equal(unlabelled["pixel_values"], plain.on_device(plain(features))["pixel_values"])
    assert "labels" not in unlabelled


def test_grey_and_transparent_images_become_rgb():
    """A single grey image in a folder of photographs stops a run after hours."""
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        picture = Pictures.fromarray(np.full((8, 8), 128, np.uint8)).convert(mode)
        assert ImageCollator(PROCESSORS["vit"])([{"image": picture}])["pixels"].shape == (1, 3, 8, 8)


def test_stored_bytes_arrays_and_pictures_are_the_same_pixels():
    """Rows read back in another order of rows, columns or channels are noise that a model still learns a little from."""
    collator, rows = ImageCollator(PixelView((6, 8))), pictures(3, size=(11, 9))
    stored = decoded(rows.remove_columns("note"), collator.canvas)
    arrays = [{"pixels": collator.canvas.fit(row["image"])} for row in rows]
    expected = collator([{"image": row["image"]} for row in rows])["pixels"]
    assert expected.shape == (3, 3, 6, 8)
    assert torch.equal(collator(stored.to_list())["pixels"], expected)
    assert torch.equal(collator(arrays)["pixels"], expected)


def test_soft_labels_cost_the_weighted_sum_of_hard_ones():
    """Under mixup the task term would learn the first image's label alone."""
    torch.manual_seed(0)
    logits, first, second = torch.randn(6, 5).double(), torch.randint(5, (6,)), torch.randint(5, (6,))
    share = torch.rand(6).double()
    one_hot = torch.nn.functional.one_hot
    soft = share[:, None] * one_hot(first, 5) + (1 - share)[:, None] * one_hot(second, 5)
    expected = share * cross_entropy(logits, first) + (1 - share) * cross_entropy(logits, second)
    assert torch.allclose(cross_entropy(logits, soft), expected)
    assert torch.equal(cross_entropy(logits, one_hot(first, 5).double()), cross_entropy(logits, first))
    assert labelled_units(soft).tolist() == [True] * 6
    smooth = cross_entropy(logits, soft, label_smoothing=0.1)
    assert torch.allclose(smooth, cross_entropy(logits, 0.9 * soft + 0.1 / 5))


def test_dkd_refuses_soft_labels():
    """The target class of a mixed image is not one class; one_hot of floats is an error nobody understands."""
    from transformers.utils import ModelOutput

    from hfkd.outputs import TeacherOutput

    logits = torch.randn(2, 3)
    with pytest.raises(ValueError, match="leave mixup and cutmix off"):
        DKD()(ModelOutput(logits=logits), TeacherOutput(logits=logits), {"labels": torch.full((2, 3), 1 / 3)})


@pytest.mark.parametrize("settings", [{}, {"crop": "pad", "flip": 0.5, "mixup": 0.5, "cutmix": 1.0}])
def test_teacher_and_student_see_the_same_pixels(tmp_path, settings):
    """Two draws of one augmentation teach the student what the teacher says about another image."""
    seen.clear()
    student, teacher = vit(), Recorder(vit(1).config)
    rows = pictures()
    sides = PixelView((8, 8), (0.5,) * 3, (0.5,) * 3), PixelView((8, 8), (0.1, 0.2, 0.3), (0.3, 0.2, 0.1))
    collator = ImageCollator(*sides, Augmentation(**settings) if settings else None, num_labels=3)
    trainer = DistillationTrainer(student, arguments(tmp_path), collator, rows, teacher=teacher, objective=KD())
    batches = []
    original = student.forward
    student.forward = lambda pixel_values, **kwargs: batches.append(pixel_values) or original(pixel_values, **kwargs)
    trainer._forward_names = {"pixel_values"}
    trainer.train()
    for ours, theirs in zip(batches[-3:], seen[-3:], strict=True):
        mean, std = (torch.tensor(values)[:, None, None] for values in ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1)))
        assert torch.allclose(ours * 0.5 + 0.5, theirs * std + mean, atol=1e-5)
    assert len(seen) == 3 + 2  # and the slice before training, in two batches


def test_a_smaller_student_sees_the_same_picture():
    """A teacher at 224 and a student at 32 pixels must read one crop, not two."""
    collator = ImageCollator(PixelView((4, 4)), PixelView((8, 8)), Augmentation(crop="pad", padding=2))
    rows = [{"image": row["image"], "example_id": i} for i, row in enumerate(pictures(4))]
    batch = collator.on_device(collator(rows))
    assert batch["pixel_values"].shape == (4, 3, 4, 4) and batch["teacher_pixel_values"].shape == (4, 3, 8, 8)
    shrunk = torch.nn.functional.interpolate(batch["teacher_pixel_values"], (4, 4), mode="bilinear", antialias=True)
    assert torch.allclose(shrunk, batch["pixel_values"])
    same = ImageCollator(PixelView((8, 8)), PixelView((8, 8)))
    assert "teacher_pixel_values" not in same.on_device(same(rows))


def test_evaluation_is_not_augmented(tmp_path):
    """Accuracy on randomly cropped and mixed test images is the accuracy of another task."""
    rows = pictures()
    collator = ImageCollator(
        PixelView((8, 8)), augmentation=Augmentation(crop="pad", flip=0.5, mixup=1.0), num_labels=3
    )
    student = vit()
    trainer = DistillationTrainer(student, arguments(tmp_path), collator, rows, rows, objective=CrossEntropy())
    found = trainer.evaluate()["eval_loss"]
    pixels = torch.stack([torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) / 255 for row in rows])
    with torch.no_grad():
        expected = cross_entropy(student.eval()(pixels).logits, torch.tensor(rows["label"])).mean()
    assert found == pytest.approx(float(expected), abs=1e-5)
    predicted = trainer.predict(rows.remove_columns("label")).predictions
    with torch.no_grad():
        assert np.allclose(predicted, student(pixels).logits.numpy(), atol=1e-5)


def trained(folder, rows, resume=None, **changes):
    collator = ImageCollator(
        PixelView((8, 8)), augmentation=Augmentation(crop="pad", flip=0.5, mixup=0.4, erasing=0.5), num_labels=3
    )
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **changes}
    trainer = DistillationTrainer(vit(), arguments(folder, **settings), collator, rows, teacher=vit(1), objective=KD())
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.state_dict()


def test_augmented_training_resumes_as_it_would_have_gone_on(tmp_path):
    """Draws from a global generator make a resumed run another run."""
    rows = pictures()
    whole = trained(tmp_path / "whole", rows)
    resumed = trained(tmp_path / "resumed", rows, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    again = trained(tmp_path / "again", rows, dataloader_num_workers=1)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_without_a_collator_the_processors_decide(tmp_path):
    """A teacher with its own normalisation would silently read the student's."""
    teacher = ModelTeacher(vit(1))
    teacher.processing_class = ViTImageProcessorPil(size=SIZE, image_mean=[0.1] * 3)
    processor, rows = PROCESSORS["vit"], pictures()
    trainer = DistillationTrainer(
        vit(), arguments(tmp_path), None, rows, processing_class=processor, teacher=teacher, objective=KD()
    )
    assert trainer.data_collator.teacher_view == PixelView.of(teacher.processing_class)
    trainer.train()
    with pytest.raises(ValueError, match=r"mean \(0.1, 0.1, 0.1\)"):
        DistillationTrainer(vit(), arguments(tmp_path), ImageCollator(processor), rows, teacher=teacher, objective=KD())
    ready = rows.map(lambda row: {"pixel_values": processor(row["image"])["pixel_values"][0]}, remove_columns=["image"])
    with pytest.raises(ValueError, match="pass data_collator=ImageCollator"):
        DistillationTrainer(
            vit(), arguments(tmp_path), None, ready, processing_class=processor, teacher=teacher, objective=KD()
        )


@pytest.mark.parametrize("made", ["torch", "stream"])
def test_a_teachers_normalisation_counts_for_every_kind_of_rows(tmp_path, made):
    """Rows that name no columns went unchecked: the teacher read the student's normalisation and taught noise."""
    teacher = ModelTeacher(vit(1))
    teacher.processing_class = ViTImageProcessorPil(size=SIZE, image_mean=[0.1] * 3)
    rows = pictures().remove_columns("note")
    rows = list(rows) if made == "torch" else rows.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"mean \(0.1, 0.1, 0.1\)"):
        DistillationTrainer(
            vit(), arguments(tmp_path), ImageCollator(PROCESSORS["vit"]), rows, teacher=teacher, objective=KD()
        )


def test_pictures_of_any_rows_reach_the_model(tmp_path):
    """transformers' own idiom, a transform that makes pixel_values, and torch data sets ended in errors about columns."""
    rows, processor = pictures().remove_columns("note"), PROCESSORS["vit"]

    def made(batch):
        return {
            "pixel_values": processor(batch["image"], return_tensors="pt")["pixel_values"],
            "labels": batch["label"],
        }

    kinds = {"column": rows, "list": list(rows), "transform": rows.with_transform(made)}
    found = {}
    for name, given in kinds.items():
        settings = arguments(tmp_path, remove_unused_columns=name != "transform")
        trainer = DistillationTrainer(
            vit(), settings, None, given, processing_class=processor, teacher=vit(1), objective=KD()
        )
        trainer.train()
        found[name] = trainer.model.state_dict()
    for name in ("list", "transform"):
        assert all(torch.allclose(found[name][key], found["column"][key], atol=1e-6) for key in found["column"])


class Draws(ImageCollator):
    def on_device(self, batch):
        if "draws" in batch:
            drawn.append(dict(zip(batch["example_id"].tolist(), batch["draws"].tolist(), strict=True)))
        return super().on_device(batch)


drawn: list[dict] = []


@pytest.mark.parametrize("workers", [0, 2])
def test_every_pass_over_a_stream_is_augmented_anew(tmp_path, workers):
    """Of a stream the Trainer counts no epochs: the second pass over the data repeated the crops of the first."""
    rows = pictures().remove_columns("note").add_column("example_id", list(range(12)))
    passes = {}
    for name, given in (("map", rows), ("stream", rows.to_iterable_dataset(num_shards=3))):
        drawn.clear()
        collator = Draws(PixelView((8, 8)), augmentation=Augmentation(crop="pad", padding=2, flip=0.5))
        settings = arguments(
            tmp_path, max_steps=9, dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0
        )
        DistillationTrainer(vit(), settings, collator, given).train()
        passes[name] = [{k: v for batch in drawn[i : i + 3] for k, v in batch.items()} for i in (0, 3, 6)]
    assert passes["stream"] == passes["map"]
    assert passes["map"][0] != passes["map"][1] != passes["map"][2]


def test_rows_without_numbers_are_refused_where_something_is_drawn_for_them(tmp_path):
    """A TypeError about len() says nothing about what is missing; plain pictures need no number."""
    rows, plain = pictures().remove_columns("note"), ImageCollator(PixelView((8, 8)))
    augmenting = ImageCollator(PixelView((8, 8)), augmentation=Augmentation(flip=0.5))
    for given in (list(rows), rows.to_iterable_dataset()):
        with pytest.raises(TypeError, match="need an `example_id`"):
            DistillationTrainer(vit(), arguments(tmp_path), augmenting, given)
        trainer = DistillationTrainer(vit(), arguments(tmp_path), plain, given, given)
        trainer.train(), trainer.evaluate()
    with pytest.raises(ValueError, match="pictures of one size have no lengths"):
        settings = arguments(tmp_path, train_sampling_strategy="group_by_length")
        DistillationTrainer(vit(), settings, plain, rows, processing_class=PROCESSORS["vit"]).train()


@pytest.mark.parametrize(
    ("rows", "dispatched", "works"), [("map", None, True), ("map", True, False), ("stream", None, False)]
)
def test_augmentation_is_not_sent_from_one_process_to_another(rows, dispatched, works):
    """Two processes over a stream ended with "Can only concatenate tensors" of accelerate, which names nothing to change."""
    given = {"map": [], "stream": pictures(2).to_iterable_dataset()}[rows]
    augmenting = ImageCollator(PixelView((8, 8)), augmentation=Augmentation(flip=0.5))
    refuse_dispatched_draws(augmenting, given, 1, dispatched)
    refuse_dispatched_draws(ImageCollator(PixelView((8, 8))), given, 2, dispatched)
    refuse_dispatched_draws(augmenting, given, 2, False)
    with contextlib.nullcontext() if works else pytest.raises(ValueError, match="'dispatch_batches': False"):
        refuse_dispatched_draws(augmenting, given, 2, dispatched)


def test_rows_that_fill_no_batch_are_refused(tmp_path):
    """The stock Trainer ends after 0 steps, and the untrained student is saved and scored as if it were trained."""
    settings = arguments(tmp_path, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="3 rows, a batch 4"):
        DistillationTrainer(vit(), settings, ImageCollator(PixelView((8, 8))), pictures(3)).train()


def test_a_cache_of_another_normalisation_is_refused(tmp_path):
    """Answers to pictures in other colours or of another size would be handed back as this teacher's."""
    rows = pictures()
    cache_teacher(rows, vit(1), tmp_path / "cache", collator=ImageCollator(PixelView((8, 8))))
    with pytest.raises(ValueError, match="the size and normalisation of the images"):
        other = ImageCollator(PixelView((8, 8), mean=(0.5, 0.5, 0.5)))
        cache_teacher(rows, vit(1), tmp_path / "cache", collator=other)
    again = cache_teacher(rows, vit(1), tmp_path / "cache", collator=ImageCollator(PixelView((8, 8))))
    assert "teacher_logits" in again.column_names


def test_a_cache_of_plain_images_serves_plain_training_only(tmp_path):
    """Cached answers about the upright picture, given for the flipped one, are wrong without a sign."""
    rows, plain = pictures(), ImageCollator(PixelView((8, 8)))
    with_answers = cache_teacher(rows, vit(1), tmp_path / "cache", collator=plain, dtype="float32")
    cached = CachedTeacher(cache=tmp_path / "cache")
    online = DistillationTrainer(vit(), arguments(tmp_path), plain, rows, teacher=copy.deepcopy(vit(1)), objective=KD())
    offline = DistillationTrainer(vit(), arguments(tmp_path), plain, with_answers, teacher=cached, objective=KD())
    for trainer in (online, offline):
        trainer.train()
    ours, theirs = online.model.state_dict(), offline.model.state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    augmenting = ImageCollator(PixelView((8, 8)), augmentation=Augmentation(flip=0.5))
    with pytest.raises(ValueError, match="cached for the view 'plain'"):
        DistillationTrainer(vit(), arguments(tmp_path), augmenting, with_answers, teacher=cached, objective=KD())
    with pytest.raises(ValueError, match="view 'augmented'"):
        cache_teacher(rows, vit(1), tmp_path / "other", collator=augmenting)


def test_the_teacher_is_scored_on_rows_of_all_classes(tmp_path):
    """Image folders are sorted by class: on the first 256 rows a constant answer is always right, and any teacher warned of."""
    rows = pictures(600).sort("label")
    trainer = DistillationTrainer(vit(), arguments(tmp_path), ImageCollator(PixelView((8, 8))), rows, teacher=vit(1))
    trainer.train()
    assert trainer.teacher_scores["chance"] == pytest.approx(1 / 3, abs=0.01)


def test_the_best_model_is_loaded_whole(tmp_path):
    """transformers saves ViT under other names than it trains under: the stock Trainer's best model is a random encoder."""
    rows = pictures()
    settings = arguments(
        tmp_path,
        save_strategy="steps",
        save_steps=3,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        learning_rate=1e-3,
    )
    scores = iter([1.0, 0.0])
    collator = ImageCollator(PixelView((8, 8)))
    trainer = DistillationTrainer(
        vit(), settings, collator, rows, rows, compute_metrics=lambda _: {"accuracy": next(scores)}
    )
    trainer.train()
    best = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-3").state_dict()
    assert all(torch.equal(best[name], weights) for name, weights in trainer.model.state_dict().items())


class Fitted(KD):
    """An objective with a learned value, as AdaAlpha has one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight_", None)


def test_learned_values_are_saved_and_resumed(tmp_path):
    """Class weights that are lost on resume turn the second half of a run into another method."""
    rows, collator = pictures(), ImageCollator(PixelView((8, 8)))
    objective = Fitted()
    objective.weight_ = torch.tensor([0.25, 0.5])
    settings = arguments(tmp_path, save_strategy="steps", save_steps=2)
    DistillationTrainer(vit(), settings, collator, rows, teacher=vit(1), objective=objective).train()
    saved = load_file(tmp_path / "checkpoint-2" / "objective.safetensors")
    assert saved["weight_"].tolist() == [0.25, 0.5]
    fresh = Fitted()
    trainer = DistillationTrainer(vit(), settings, collator, rows, teacher=vit(1), objective=fresh)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert fresh.weight_.tolist() == [0.25, 0.5]
    with pytest.raises(ValueError, match="weight_, which KD does not learn: the checkpoint is of another objective"):
        other = DistillationTrainer(vit(), settings, collator, rows, teacher=vit(1), objective=KD())
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_milestones_are_those_of_the_papers(tmp_path):
    """A schedule in epochs that is read as steps trains 450 epochs at a tenth of the rate."""
    rows, rates = pictures(8), []
    settings = arguments(
        tmp_path,
        max_steps=-1,
        num_train_epochs=10,
        warmup_steps=4,
        lr_milestones=[4, 8],
        learning_rate=1.0,
        optim="sgd",
    )
    settings.optim_args = "momentum=0.9,nesterov=True"
    trainer = DistillationTrainer(vit(), settings, ImageCollator(PixelView((8, 8))), rows, objective=CrossEntropy())
    step = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kw: rates.append(trainer.lr_scheduler.get_last_lr()[0]) or step(*args, **kw)
    trainer.train()  # two steps an epoch
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, *[1.0] * 4, *[0.1] * 8, *[0.01] * 4])
    assert trainer.optimizer.optimizer.defaults["nesterov"] and trainer.optimizer.optimizer.defaults["momentum"] == 0.9
    for wrong in ([4, 12], [8, 4], [0, 4]):
        with pytest.raises(ValueError, match="ascending order, above 0 and below num_train_epochs=10"):
            arguments(tmp_path, num_train_epochs=10, lr_milestones=wrong)
