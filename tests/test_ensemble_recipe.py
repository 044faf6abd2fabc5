"""train_ensemble.py as its users start it: rows, wrong labels, stacks, processes, resumes, reports, and what reads its members.

In-process with tiny networks on folders of small images and files of short texts.
"""

import copy
import csv
import importlib
import json
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoModelForImageClassification, RobertaForSequenceClassification, ViTConfig

import launching
from hfkd import DistillationArguments, DistillationTrainer
from hfkd.data.augment import Augmentation
from hfkd.data.pixels import ImageCollator, PixelView
from hfkd.data.splits import load_indices
from hfkd.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from hfkd.teachers import EnsembleTeacher
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "recipes" / "configs"
BIRDS = ("crow", "finch", "owl")
SIZE = 8


@pytest.fixture(scope="module")
def recipes():
    """The modules by name, imported from the folder as the programs import each other."""
    sys.path.insert(0, str(RECIPES))
    names = ("train_ensemble", "ensemble_study", "member_stack", "distill_image")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of birds, 20 a class to train on, sizes of networks, and texts."""
    folder = tmp_path_factory.mktemp("tiny")
    for offset, (split, count) in enumerate((("train", 20), ("test", 10))):
        for bird, name in enumerate(BIRDS):
            (folder / "birds" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([offset, bird, number]).normal(128, 50, (SIZE, SIZE, 3))
                pixels[..., bird] += 40
                picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                picture.save(folder / "birds" / split / name / f"{number:02d}.png")
    resnet = {"model_type": "cifar_resnet", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
    vit = {"model_type": "vit", "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"resnet": resnet, "vit": {**vit, "intermediate_size": 16}}
    sizes["dropout"] = {**sizes["vit"], "hidden_dropout_prob": 0.1}
    for name, values in sizes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    RobertaForSequenceClassification(tiny_roberta_config(num_hidden_layers=1)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for split, count in (("train", 24), ("test", 12)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = [[f"w{5 + i % 3} w{8 + i % 7}", BIRDS[i % 3]] for i in range(count)]
            csv.writer(file).writerows([["text", "label"], *rows])
    return folder


def flags(**values):
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def own(tiny, output, **changes):
    """Three members on the birds, two epochs."""
    values = {"data_dir": tiny / "birds", "network": tiny / "resnet.yaml", "image_size": SIZE, "output_dir": output}
    values |= {"members": 3, "num_train_epochs": 2, "per_device_train_batch_size": 8, "disable_tqdm": True}
    values |= {"learning_rate": 1e-2, "save_strategy": "no", "validation_share": 0, "noise_rate": 0.2}
    return flags(**{**values, **changes})


def main(recipes, words):
    recipes["train_ensemble"].main(words)


def per_seed(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def logits_of(folder, member):
    return load_file(folder / "runs" / "member" / f"seed-{member}" / "logits.safetensors")


def members_of(folder, count=3):
    return [folder / "runs" / "member" / f"seed-{member}" / "model" for member in range(count)]


@pytest.fixture(scope="module")
def trained(recipes, tiny, tmp_path_factory):
    """One after another."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    main(recipes, own(tiny, folder, num_train_epochs=8))
    return folder


# ---- the stack ----


def batch_norm_network():
    return CifarResNetForImageClassification(
        CifarResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    )


def attention_network():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return AutoModelForImageClassification.from_config(ViTConfig(image_size=SIZE, patch_size=4, num_labels=3, **sizes))


def trainer_of(member, make, folder, rows=44, **changes):
    """44 rows in batches of 8: the last one of an epoch is smaller."""
    torch.manual_seed(member)
    pixels = np.random.default_rng(0).integers(0, 256, (rows, SIZE, SIZE, 3), dtype=np.uint8)
    data = Dataset.from_dict({"pixels": [row.tobytes() for row in pixels], "label": [i % 3 for i in range(rows)]})
    settings = {"num_train_epochs": 2.5, "learning_rate": 3e-2, "lr_scheduler_type": "cosine", "warmup_steps": 0.2}
    settings |= {"weight_decay": 0.1, "max_grad_norm": 0.5, "label_smoothing_factor": 0.1, "save_strategy": "no"}
    args = DistillationArguments(
        output_dir=str(folder),
        **{**settings, **changes},
        seed=member,
        per_device_train_batch_size=8,
        report_to="none",
        disable_tqdm=True,
    )
    augmentation = Augmentation(crop="pad", padding=1, flip=0.5)
    collator = ImageCollator(PixelView((SIZE, SIZE)), augmentation=augmentation, num_labels=3, seed=member)
    return DistillationTrainer(make().double(), args, collator, data)


@pytest.mark.parametrize("make", [batch_norm_network, attention_network])
@pytest.mark.parametrize("solver", [{}, {"optim": "sgd", "optim_args": "momentum=0.9", "lr_milestones": [1.0, 2.0]}])
def test_stacked_members_end_where_they_end_alone(recipes, tmp_path, make, solver):
    """A stack that clips all members together, or shares a running mean, trains other teachers than the record says."""
    alone, together = ([trainer_of(k, make, tmp_path, **solver) for k in range(3)] for _ in range(2))
    starts = [copy.deepcopy(trainer.model.state_dict()) for trainer in alone]
    for trainer in alone:
        trainer.train()
    steps = recipes["member_stack"].train_stacked(together)
    assert steps == alone[0].state.global_step == 15
    for start, one, other in zip(starts, alone, together, strict=True):
        ours, theirs = other.model.state_dict(), one.model.state_dict()
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-11)
        assert any((start[name] != theirs[name]).float().mean() > 0.9 for name in theirs), "something was trained"
    first, second = (trainer.model.classifier.weight for trainer in together[:2])
    assert not torch.allclose(first, second), "members of one start and order would hide every mix-up"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2: stacked members"),
        ({"optim": "adafactor"}, "optim=.*works element by element"),
        ({"save_strategy": "epoch"}, "save_strategy"),
        ({"objective": "cross_entropy", "rows": 40}, r"theirs are \[40, 44\] rows"),
    ],
)
def test_what_a_stack_would_train_otherwise_is_refused(recipes, tmp_path, changes, message):
    """Members that silently ended elsewhere than alone would be another experiment under the same name."""
    trainers = [trainer_of(0, attention_network, tmp_path, **changes), trainer_of(1, attention_network, tmp_path)]
    with pytest.raises(ValueError, match=message):
        recipes["member_stack"].train_stacked(trainers)


# ---- the recipe ----


def test_a_stack_saves_what_members_alone_save(recipes, tiny, tmp_path):
    """Two ways that leave other files or other scores could not be mixed in one study, and --stack would be an experiment."""
    for name, stack in (("alone", 1), ("stack", 2)):  # the third member of the stack is alone
        main(
            recipes, own(tiny, tmp_path / name, stack=stack, max_steps=4, learning_rate=1e-3, network=tiny / "vit.yaml")
        )
    files = [{str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*")} for name in ("alone", "stack")]
    assert files[0] == files[1]
    for member in range(3):
        one, other = logits_of(tmp_path / "alone", member), logits_of(tmp_path / "stack", member)
        assert set(one) == {"logits", "train_logits"}
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=1e-4)
    same = [
        [{k: row[k] for k in ("run", "seed", "steps")} for row in per_seed(tmp_path / n)] for n in ("alone", "stack")
    ]
    assert same[0] == same[1]


def test_the_saved_members_answer_as_they_were_scored(trained, tiny):
    """Members that cannot be loaded together, or in another order of classes, are no ensemble."""
    teacher = EnsembleTeacher([str(path) for path in members_of(trained)], combine="vote")
    pictures = [np.asarray(Image.open(path)) for path in sorted((tiny / "birds" / "test").rglob("*.png"))]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    votes = teacher({"pixel_values": (pixels - 0.5) / 0.5}, None).labels.numpy()
    logits = np.stack([logits_of(trained, member)["logits"] for member in range(3)])
    labels = np.repeat(range(3), 10)
    counts = np.stack([(logits.argmax(-1) == label).sum(0) for label in range(3)], axis=-1)
    clear = np.sort(counts, axis=-1)[:, -1] > np.sort(counts, axis=-1)[:, -2]
    assert clear.any() and (votes[clear] == counts.argmax(-1)[clear]).all()
    line = next(line for line in (trained / "results.md").read_text().splitlines() if "ensemble, vote |" in line)
    assert float(line.split("|")[2]) == pytest.approx(100 * np.mean(votes == labels), abs=0.005)
    for row, answer in zip(per_seed(trained), logits, strict=True):
        assert float(row["accuracy"]) == pytest.approx(np.mean(answer.argmax(-1) == labels))


def test_a_member_is_a_teacher_for_the_other_recipes(recipes, trained, tiny, tmp_path):
    """`--teacher FOLDER` is what the ensemble was trained for."""
    words = flags(data_dir=tiny / "birds", teacher=members_of(trained)[1], student_config=tiny / "resnet.yaml", seeds=1)
    bounds = flags(max_steps=1, image_size=SIZE, output_dir=tmp_path / "run", disable_tqdm=True)
    recipes["distill_image"].main([*words, *bounds])
    teacher = next(row for row in per_seed(tmp_path / "run") if row["run"] == "teacher")
    assert teacher["seed"] == "0"


def test_wrong_labels_are_counted_and_the_same_for_all(recipes, tiny, tmp_path):
    """Noise that reached the test images, or differed between members, would be another paper's experiment."""
    ensemble = recipes["train_ensemble"].prepare(own(tiny, tmp_path / "run", noise_rate=0.25))
    for kind in ensemble.kinds:
        clean, noisy = (np.asarray(kind.view.train[name][:]) for name in ("clean_label", "label"))
        assert clean.tolist() == [0] * 20 + [1] * 20 + [2] * 20
        assert noisy.tolist() == ensemble.kinds[0].view.train["label"][:]
        for label in range(3):  # three classes: the default partner is the next one
            assert np.bincount(noisy[clean == label], minlength=3)[[label, (label + 1) % 3]].tolist() == [15, 5]
        assert kind.view.held_out[""]["label"][:] == [0] * 10 + [1] * 10 + [2] * 10
        assert kind.view.held_out["train_"]["label"][:] == noisy.tolist()
    seeds = [kind.view.collator.seed for kind in ensemble.kinds]
    assert seeds == [0, 1, 2], "members with one seed of crops have errors alike"
    other = recipes["train_ensemble"].prepare(own(tiny, tmp_path / "run", noise_rate=0.25, draw_seed=1))
    assert other.kinds[0].view.train["label"][:] != ensemble.kinds[0].view.train["label"][:]
    flat = recipes["train_ensemble"].prepare(own(tiny, tmp_path / "run", noise="symmetric", noise_rate=0.2))
    counts = np.bincount(np.asarray(flat.kinds[0].view.train["label"][:])[:20], minlength=3)
    assert counts.tolist() == [16, 2, 2]


def test_members_are_trained_on_the_rows_that_the_record_names(recipes, tiny, tmp_path):
    """Disjoint teachers whose record names other rows cannot be checked against the pool or repeated."""
    words = own(tiny, tmp_path / "run", rows="disjoint", num_train_epochs=1, members=2, draw_seed=1)
    main(recipes, words)
    saved = load_indices(tmp_path / "run" / "splits.json")
    assert not set(saved["member_0"]) & set(saved["member_1"]) and len(saved["member_0"]) == 30
    ensemble = recipes["train_ensemble"].prepare([*words, "--resume_from_checkpoint", "True"])
    for kind in ensemble.kinds:
        assert kind.view.train["example_id"][:] == saved[f"member_{kind.seed}"]


def test_the_report_is_that_of_the_sampler_module(trained):
    """Numbers of another member or matrix would call a denoiser a sampler."""
    found = json.loads((trained / "sampler.json").read_text())
    expected = (0.8 * np.eye(3) + 0.2 * np.roll(np.eye(3), 1, axis=1)) / 3
    labels = np.repeat(range(3), 10)
    for member, row in enumerate(per_seed(trained)):
        report, predictions = found[f"member {member}"], logits_of(trained, member)["logits"].argmax(-1)
        confusion = np.zeros((3, 3))
        np.add.at(confusion, (labels, predictions), 1 / 30)
        np.testing.assert_allclose(report["expected"], expected)
        np.testing.assert_allclose(report["confusion"], confusion)
        assert report["total_variation"] == pytest.approx(np.abs(confusion - expected).sum() / 2)
        assert report["noisy_train_accuracy"] == float(row["train_accuracy"])
    assert (trained / "confusions.png").stat().st_size > 10_000


def test_only_missing_members_are_trained(recipes, tiny, trained, tmp_path):
    """A stopped ensemble of ten that begins anew costs ten teachers; one with other settings mixes two."""
    shutil.copytree(trained, tmp_path / "run")
    words = own(tiny, tmp_path / "run", num_train_epochs=8)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint True"):
        main(recipes, words)
    results = {k: tmp_path / "run" / "runs" / "member" / f"seed-{k}" / "result.json" for k in range(4)}
    before = {k: (results[k].read_text(), results[k].stat().st_mtime_ns) for k in range(3)}
    results[1].unlink()
    main(recipes, [*words, "--members", "4", "--resume_from_checkpoint", "True"])
    assert len(per_seed(tmp_path / "run")) == 4 and results[3].exists()
    for k in (0, 2):
        assert (results[k].read_text(), results[k].stat().st_mtime_ns) == before[k]
    again, first = json.loads(results[1].read_text()), json.loads(before[1][0])
    assert again["accuracy"] == first["accuracy"] and again["train_accuracy"] == first["train_accuracy"]
    with pytest.raises(ValueError, match=r"made with other settings.*rows"):
        main(recipes, [*words, "--noise_rate", "0.1", "--resume_from_checkpoint", "True"])


def test_other_settings_are_said_before_more_members_are_trained(recipes, tiny, tmp_path):
    """A stack (or processes) that trains nine teachers for hours and only then says that the tenth was made otherwise."""
    main(recipes, own(tiny, tmp_path, members=1, max_steps=2))
    with pytest.raises(ValueError, match=r"made with other settings.*learning_rate"):
        main(recipes, own(tiny, tmp_path, stack=2, max_steps=2, learning_rate=1e-3, resume_from_checkpoint=True))
    assert not list((tmp_path / "runs" / "member").glob("seed-[12]/*"))


def test_members_that_read_texts(recipes, tiny, tmp_path):
    """A recipe that takes any task and trains image members only fails on the text study it was written for."""
    words = flags(train_file=tiny / "train.csv", test_file=tiny / "test.csv", model_name_or_path=tiny / "model")
    bounds = flags(
        max_steps=2, per_device_train_batch_size=12, members=2, disable_tqdm=True, output_dir=tmp_path / "run"
    )
    main(recipes, [*words, *bounds, "--rows", "overlapping", "--noise_rate", "0.2", "--share", "0.9"])
    assert [row["run"] for row in per_seed(tmp_path / "run")] == ["member"] * 2
    teacher = EnsembleTeacher([str(path) for path in members_of(tmp_path / "run", 2)])
    assert teacher.config.id2label == dict(enumerate(BIRDS))


def test_the_kind_of_data_is_found_in_flags_and_files(recipes, tmp_path):
    """Texts read as images end in a message about pixels that nobody understands."""
    about_texts = recipes["train_ensemble"].about_texts
    (tmp_path / "texts.yaml").write_text("task: ag_news\n")
    in_file = ["--config", str(tmp_path / "texts.yaml")]
    assert about_texts(in_file) and about_texts(["--task=ag_news"]) and about_texts(["--train_file", "x.csv"])
    assert not about_texts([]) and not about_texts([*in_file, "--task", "digits"])
    assert not about_texts([*in_file, "--data_dir", "x"]) and about_texts(["--dataset_name", "x", "--text_column", "y"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": 0}, "--members must be 1 or more, got 0"),
        ({"processes": 0}, "--processes must be 1 or more, got 0"),
        ({"rows": "twice"}, "--rows twice: choose same, overlapping, disjoint"),
        ({"noise": "salt"}, "--noise salt: choose partners or symmetric"),
        ({"noise_rate": 1.0}, "a class without clean labels"),
        ({"noise_rate": 0, "partners": [1, 2, 0]}, r"--partners \[1, 2, 0\] are for"),
        ({"partners": [1, 2]}, "3 classes need 3 partners, not 2"),
        ({"only": [3]}, r"--only \[3\]: the 3 members have the numbers 0 to 2"),
        ({"rows": "disjoint", "members": 30}, "member 0 has 2 rows and none of"),
        ({"objective": "kd"}, "members learn from labels alone"),
        ({"stack": 2, "network": "dropout.yaml"}, "cannot be stacked .*dropout: set it to 0"),
        ({"stack": 2, "save_strategy": "steps"}, "save_strategy=.*nothing is saved"),
    ],
)
def test_wrong_inputs_are_said_before_training(recipes, tiny, tmp_path, changes, message):
    """Said after nine teachers, it costs nine teachers."""
    if "network" in changes:
        changes = {**changes, "network": tiny / changes["network"]}
    with pytest.raises(ValueError, match=message):
        recipes["train_ensemble"].prepare(own(tiny, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "runs").exists()


# ---- processes ----


@pytest.mark.launch
def test_processes_train_whole_members_and_keep_them(tiny, trained, tmp_path):
    """A member trained in another process under the same number must be the same member, or a resume mixes two ensembles."""
    words = own(tiny, tmp_path / "run", num_train_epochs=8, processes=2)
    done = launching.run(RECIPES / "train_ensemble.py", *words, log=tmp_path / "log", timeout=580)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("mean of the members") == 1
    for member in range(3):
        one, other = logits_of(trained, member), logits_of(tmp_path / "run", member)
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert (tmp_path / "run" / "results.md").read_text() == (trained / "results.md").read_text()


def test_a_process_that_stops_is_named_and_the_others_are_kept(recipes, tiny, tmp_path, monkeypatch):
    """An ensemble that goes on with two of its three members would be scored as three."""
    module = recipes["train_ensemble"]
    ensemble = module.prepare(own(tiny, tmp_path / "run", processes=2))
    monkeypatch.setattr(module.sys, "executable", shutil.which("false"))
    with pytest.raises(SystemExit, match=r"members \[\[0, 2\], \[1\]\] stopped.*--resume_from_checkpoint True"):
        module.spread(ensemble, [])


@pytest.mark.launch
def test_the_stack_benchmark_measures_both_sides(tmp_path):
    """A benchmark that no longer runs, or whose sides learn other things, keeps a claim alive that nobody checks."""
    path = tmp_path / "numbers.json"
    tiny = ["--networks", "vit-8", "resnet10-xxxs", "--members", "2", "--batches", "4", "--steps", "2"]
    benchmark = RECIPES / "benchmarks" / "stacked_members.py"
    done = launching.run(benchmark, *tiny, "--json", str(path), log=tmp_path / "log")
    assert done.returncode == 0, done.stderr
    for found in json.loads(path.read_text()):
        assert found["one_by_one"] > 0 and found["ratio"] == pytest.approx(found["stacked"] / found["one_by_one"])
        assert found["difference"] < 1e-9 and f"| {found['ratio']:.2f} |" in done.stderr


# ---- the YAMLs ----


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("train_ensemble_*.yaml")))
def test_every_yaml_runs_two_steps(recipes, tiny, monkeypatch, tmp_path, config):
    """A misspelt key in a paper's setting is found out on the GPU that was rented for it."""
    features = Features(
        img=ImageFeature(),
        label=ClassLabel(names=recipes["ensemble_study"].image_data.IMAGE_TASKS["cifar10"].label_names),
    )
    rows = {"img": [Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(50)], "label": [i % 10 for i in range(50)]}
    stored = Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: DatasetDict(train=stored, test=stored))
    given = yaml.safe_load((CONFIGS / config).read_text())
    words = ["--config", str(CONFIGS / config)] + ([] if "task" in given else flags(data_dir=tiny / "birds"))
    changes = {"network": tiny / "resnet.yaml", "members": 2, "output_dir": tmp_path / "run", "max_steps": 2}
    main(recipes, [*words, *flags(**changes, evaluation_rows=20, disable_tqdm=True)])
    settings = json.loads((tmp_path / "run" / "runs" / "member" / "seed-0" / "settings.json").read_text())
    assert {row["steps"] for row in per_seed(tmp_path / "run")} == {"2"}
    for name in ("learning_rate", "weight_decay", "lr_milestones", "optim_args", "flip", "crop", "max_grad_norm"):
        assert name not in given or settings[name] == given[name]


def test_the_papers_settings_are_the_papers():
    """A changed noise rate or schedule under a paper's name reports another experiment as a replication."""
    found = yaml.safe_load((CONFIGS / "train_ensemble_cifar10.yaml").read_text())
    expected = {"members": 10, "noise_rate": 0.2, "num_train_epochs": 200, "learning_rate": 0.1, "network": "resnet18"}
    expected |= {"lr_milestones": [100, 150], "optim_args": "momentum=0.9", "per_device_train_batch_size": 128}
    assert {name: found[name] for name in expected} == expected
