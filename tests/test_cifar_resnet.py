"""The CIFAR networks: sizes of the papers, a forward written out by hand, and folders that load by name."""

from __future__ import annotations

import logging
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaForSequenceClassification,
    ViTImageProcessorPil,
    pipeline,
)
from transformers.utils import logging as transformers_logging

import launching
from hfkd import KD, CifarResNetConfig, CifarResNetForImageClassification, ModelTeacher, cifar_resnet_config
from hfkd.models.cifar_resnet import NETWORKS, CifarResNetModel
from hfkd.testing import check_teacher, tiny_roberta_config, tiny_tokenizer

# 100 classes: the CRD code's networks, then MC-Distil's, with millions of multiply-adds of a 32 x 32 image
PARAMETERS = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn-16-2": 703_284,
    "wrn-40-1": 569_780,
    "wrn-40-2": 2_255_156,
    "resnet10-xxxs": 8_008,
    "resnet10-xxs": 13_020,
    "resnet10-xs": 27_884,
    "resnet10-s": 83_852,
    "resnet10-m": 320_436,
    "resnet10-l": 1_252_100,
    "resnet10": 4_949_412,
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
}
AUTO = "AutoModelForImageClassification"
MILLION_MACS = {
    "resnet10-xxxs": "0.77",
    "resnet10-xxs": "2.02",
    "resnet10-xs": "2.86",
    "resnet10-s": "4.16",
    "resnet10-m": "16.18",
    "resnet10-l": "63.82",
    "resnet10": "253.5",
    "resnet18": "555.5",
    "resnet34": "1159",
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(name: str = "resnet10-xxxs", num_labels: int = 5, **changes) -> CifarResNetForImageClassification:
    return CifarResNetForImageClassification(cifar_resnet_config(name, num_labels, **changes))


def shaken(model):
    """Batch norm as after training: with fresh statistics, 1 and 0, a wrong one would not show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.3)
    return model.eval()


# ---- sizes ----


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_the_papers(name):
    """A student of another size under the paper's name makes every comparison with its tables wrong."""
    with torch.device("meta"):
        model = network(name, num_labels=100)
    assert model.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", MILLION_MACS)
def test_multiply_adds_are_the_papers(name):
    """Right numbers of weights with a wrong stride cost four times as much, and learn something else."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        per_output = module.weight[0].numel()  # input channels, times the kernel's size
        total += per_output * output.numel()

    with torch.device("meta"):
        model = network(name, num_labels=100).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        model(torch.empty(1, 3, 32, 32))
    digits = len(MILLION_MACS[name].partition(".")[2])
    assert f"{total / 1e6:.{digits}f}" == MILLION_MACS[name]


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "wrn-16-2", "resnet10-xxs"])
def test_initial_weights_are_the_papers(name):
    """With transformers' usual 0.02 the signal of 110 layers dies, and a paper's learning rate no longer fits."""
    model = network(name, num_labels=100)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            deviation = 6 / math.sqrt(2 * module.weight.numel())  # six standard errors of a standard deviation
            assert module.weight.std().item() == pytest.approx(expected, rel=deviation), path
            assert abs(module.weight.mean().item()) < 6 * expected / math.sqrt(module.weight.numel())
            assert module.bias is None
    bound = 1 / math.sqrt(model.config.hidden_sizes[-1])
    assert 0.9 * bound < model.classifier.weight.abs().max() <= bound
    assert 0.5 * bound < model.classifier.weight.std() * math.sqrt(3) < 1.5 * bound
    assert bool((model.classifier.bias == 0).all()) == name.startswith("wrn")


# ---- the forward, written out ----


def convolve(weights, name, x, stride=1):
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2)


def normalise(weights, name, x):
    mean, variance, gain, shift = (
        weights[f"{name}.{entry}"][:, None, None] for entry in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * gain + shift


def basic_by_hand(weights, depths, x):
    """He et al. 2016, figure 2 and section 4.2; conv1x1 and batch norm where the shape changes."""
    x = normalise(weights, "resnet.stem.1", convolve(weights, "resnet.stem.0", x)).clamp(min=0)
    maps = [x]
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name, stride = f"resnet.stages.{stage}.{block}", 2 if stage > 0 and block == 0 else 1
            y = normalise(weights, f"{name}.normalization1", convolve(weights, f"{name}.convolution1", x, stride))
            y = normalise(weights, f"{name}.normalization2", convolve(weights, f"{name}.convolution2", y.clamp(min=0)))
            if f"{name}.shortcut.0.weight" in weights:
                x = normalise(weights, f"{name}.shortcut.1", convolve(weights, f"{name}.shortcut.0", x, stride))
            x = (x + y).clamp(min=0)
        maps.append(x)
    return maps, x


def pre_activation_by_hand(weights, depths, x):
    """Zagoruyko and Komodakis 2016, figure 1 (c), as their code: a new shape is made from the activated input."""
    x = convolve(weights, "resnet.stem.0", x)
    maps = [x]
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name, stride = f"resnet.stages.{stage}.{block}", 2 if stage > 0 and block == 0 else 1
            a = normalise(weights, f"{name}.normalization1", x).clamp(min=0)
            y = convolve(weights, f"{name}.convolution1", a, stride)
            y = convolve(weights, f"{name}.convolution2", normalise(weights, f"{name}.normalization2", y).clamp(min=0))
            changes = f"{name}.shortcut.weight" in weights
            x = y + (convolve(weights, f"{name}.shortcut", a, stride) if changes else x)
        maps.append(x)
    return maps, normalise(weights, "resnet.normalization", x).clamp(min=0)


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "wrn-16-2", "wrn-40-1", "resnet10-xxs", "resnet10-xs"])
def test_the_forward_is_the_papers_equation(name):
    """An activation before instead of after the sum has the same weights, trains, and is another network."""
    model = shaken(network(name).double())
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    by_hand = basic_by_hand if model.config.layer_type == "basic" else pre_activation_by_hand
    maps, last = by_hand(model.state_dict(), model.config.depths, images)
    with torch.no_grad():
        answer = model(images, output_hidden_states=True)
        inside = model.resnet(images)
    logits = last.mean((2, 3)) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(answer.logits, logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(inside.last_hidden_state, last, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(inside.pooler_output[:, :, 0, 0], last.mean((2, 3)), rtol=1e-10, atol=1e-12)
    assert len(answer.hidden_states) == len(maps) == len(model.config.depths) + 1
    for ours, theirs in zip(answer.hidden_states, maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet20", "wrn-16-2", "resnet10-xxxs"])
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (64, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_trains(name, size, channels):
    """A pool of fixed size, as in the papers' code, is wrong without an error for other images than CIFAR's."""
    model = network(name, num_channels=channels)
    answer = model(torch.randn(2, channels, *size), labels=torch.tensor([0, 4]), output_hidden_states=True)
    answer.loss.backward()
    assert answer.logits.shape == (2, 5)
    assert all(bool(torch.isfinite(p.grad).all()) and bool(p.grad.abs().any()) for p in model.parameters())
    halvings = len(model.config.depths) - 1
    expected = tuple(math.ceil(edge / 2**halvings) for edge in size)
    assert answer.hidden_states[-1].shape == (2, model.config.hidden_sizes[-1], *expected)
    assert answer.hidden_states[0].shape == (2, model.config.embedding_size, *size)


# ---- the outside, as transformers' image heads ----


def test_the_loss_is_the_image_heads():
    """A mean where the stock Trainer divides itself makes gradients as many times too large as there are steps accumulated."""
    model, images, labels = network().eval(), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 4, -100])
    answer = model(images, labels)
    rows = -answer.logits.log_softmax(-1)[torch.arange(3), labels[:3]]
    torch.testing.assert_close(answer.loss, rows.mean())
    torch.testing.assert_close(model(images, labels, num_items_in_batch=12).loss, rows.sum() / 12)
    several = network(problem_type="multi_label_classification").eval()
    targets = torch.randint(2, (4, 5)).float()
    found = several(images, targets)
    torch.testing.assert_close(found.loss, F.binary_cross_entropy_with_logits(found.logits, targets))
    number = network(num_labels=1).eval()
    found = number(images, torch.arange(4.0))
    torch.testing.assert_close(found.loss, (found.logits.squeeze(-1) - torch.arange(4.0)).square().mean())


def test_outputs_follow_the_arguments_and_the_configuration():
    """Code for transformers' ResNet asks for tuples and hidden states in either way."""
    model, images = network().eval(), torch.randn(2, 3, 8, 8)
    plain = model(images)
    assert plain.loss is None and plain.hidden_states is None
    loss, logits, states = model(images, torch.tensor([0, 1]), output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, plain.logits) and loss.dim() == 0 and len(states) == 5
    assert len(model.base_model(images, return_dict=False)) == 2
    model.config.output_hidden_states = True
    assert len(model(images).hidden_states) == len(model.base_model(images).hidden_states) == 5
    assert model(images, output_hidden_states=False).hidden_states is None


def test_the_encoder_inside_is_found():
    """hfkd takes features from `base_model`: with none, or with the head in it, they would be logits."""
    model = network()
    assert model.base_model is model.resnet and type(model.base_model) is CifarResNetModel
    teacher = ModelTeacher(shaken(model))
    teacher.prepare(None, {"teacher", "features", "hidden_states"}, "cpu")
    images = torch.randn(2, 3, 8, 8)
    answer = teacher({"pixel_values": images, "labels": torch.tensor([0, 1])})
    assert torch.equal(answer.features, model.base_model(images).last_hidden_state)
    assert torch.equal(answer.logits, model(images).logits) and len(answer.hidden_states) == 5


# ---- folders ----


@pytest.mark.parametrize("name", ["resnet8x4", "wrn-16-2", "resnet10-xxs"])
def test_a_folder_gives_the_same_network_back(name, tmp_path):
    """Batch norm statistics that are left behind turn a trained teacher into one that guesses."""
    model, images = shaken(network(name, num_channels=1, id2label=dict(enumerate("abcde")))), torch.randn(2, 1, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is CifarResNetForImageClassification and not loaded.training
    assert torch.equal(loaded(images).logits, model(images).logits)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any("running_var" in key for key in ours)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(encoder(images).pooler_output, model.resnet(images).pooler_output)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CifarResNetConfig and config.id2label == dict(enumerate("abcde"))
    fields = ("num_channels", "embedding_size", "hidden_sizes", "depths", "layer_type", "num_labels")
    assert all(getattr(config, field) == getattr(model.config, field) for field in fields)


def test_a_folder_without_hfkd_loads_from_the_file_beside_it(tmp_path):
    """Whoever downloads the student need not install the toolkit it was made with."""
    model = shaken(network("wrn-16-2"))
    model.save_pretrained(tmp_path / "student")
    torch.save(model(torch.ones(1, 3, 8, 8)).logits, tmp_path / "logits.pt")
    code = tmp_path / "loads.py"
    code.write_text(
        "import os, sys, torch\n"
        f"from transformers import {AUTO}, dynamic_module_utils\n"
        "os.chdir(sys.argv[1])\n"
        "dynamic_module_utils.HF_MODULES_CACHE = 'modules'  # what the variable of this name is read into\n"
        f"model = {AUTO}.from_pretrained('student', trust_remote_code=True)\n"
        "torch.testing.assert_close(model(torch.ones(1, 3, 8, 8)).logits, torch.load('logits.pt'))\n"
        "assert not any(name.startswith('hfkd') for name in sys.modules)\n"
    )
    run = launching.run(code, str(tmp_path), log=tmp_path / "log")
    assert run.returncode == 0 and (tmp_path / "modules").is_dir(), run.stderr


def test_a_pipeline_takes_a_folder(tmp_path):
    """A student that no pipeline accepts is of no use to those who get it."""
    import numpy as np
    from PIL import Image

    network(id2label=dict(enumerate("abcde"))).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    picture = Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8))
    found = pipeline("image-classification", model=str(tmp_path))(picture)
    assert {entry["label"] for entry in found} == set("abcde")


# ---- names and sizes that are refused ----


def test_names_are_read_in_any_case():
    """The papers write WRN-40-2 and ResNet10-xxs."""
    assert cifar_resnet_config("WRN-40-2", 100).depths == [6, 6, 6]
    assert cifar_resnet_config("ResNet10-xxs", 7).num_labels == 7
    assert cifar_resnet_config("resnet20", 10, depths=(1, 1, 1)).depths == [1, 1, 1]


def test_an_unknown_name_lists_the_known_ones():
    """ResNet-44 is in the paper and not in the table: a KeyError does not say what is."""
    with pytest.raises(ValueError, match="'resnet44'.*resnet20.*wrn-40-2.*resnet34"):
        cifar_resnet_config("resnet44", 10)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer_type": "bottleneck"}, "layer_type.*basic, pre_activation.*'bottleneck'"),
        ({"depths": (1, 1)}, r"hidden_sizes \[16, 32, 64\] and depths \[1, 1\]"),
        ({"depths": (), "hidden_sizes": ()}, "one or more"),
        ({"hidden_sizes": (16, 0, 64)}, r"hidden_sizes \[16, 0, 64\].*1 or more"),
    ],
)
def test_sizes_that_make_no_network_are_refused(changes, sentence):
    """Without this the error comes from inside torch, and for too few depths there is none."""
    with pytest.raises(ValueError, match=sentence):
        cifar_resnet_config("resnet20", 10, **changes)


def test_half_precision_weights_read_images_of_full_precision():
    """Images come in float32; a network in bfloat16 would end with an error about biases in its first convolution."""
    config = cifar_resnet_config("resnet20", 3, depths=(1, 1, 1))
    model = CifarResNetForImageClassification(config).eval().to(torch.bfloat16)
    assert model(torch.randn(2, 3, 16, 16)).logits.dtype == torch.bfloat16


def test_images_with_other_channels_are_refused():
    """MNIST on a network for RGB fails deep inside torch with the sizes of a weight."""
    with pytest.raises(ValueError, match="have 1 channels, the network takes 3"):
        network()(torch.zeros(2, 1, 8, 8))


# ---- as a teacher ----


def test_a_teacher_loads_by_its_folder_in_a_new_process(tmp_path):
    """The folder's own name for its class is in no list until hfkd's file is imported; nobody would know to import it."""
    shaken(network()).save_pretrained(tmp_path)
    code = tmp_path / "loads.py"
    code.write_text(
        "import sys\n"
        "from hfkd import ModelTeacher\n"
        "assert 'hfkd.models.cifar_resnet' not in sys.modules\n"
        "print(type(ModelTeacher(sys.argv[1]).model).__name__)\n"
    )
    run = launching.run(code, str(tmp_path), log=tmp_path / "log")
    assert run.returncode == 0, run.stderr
    assert run.stderr.split()[-1] == "CifarResNetForImageClassification"


def test_a_teacher_from_a_folder_keeps_the_contract(tmp_path):
    """Batch norm in training mode would make each answer depend on the other rows of the batch."""
    model, images = shaken(network()), torch.randn(3, 3, 8, 8)
    model.save_pretrained(tmp_path)
    teacher = ModelTeacher(tmp_path)
    check_teacher(teacher, {"pixel_values": images, "labels": torch.tensor([0, 1, 2])})
    assert torch.equal(teacher({"pixel_values": images}).logits, model(images).logits)


class TheirConfig(PreTrainedConfig):
    model_type = "their_own"
    width: int = 4


class TheirClassifier(PreTrainedModel):
    config_class = TheirConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values):
        raise NotImplementedError


def test_a_teacher_of_a_registered_class_loads_by_its_folder(tmp_path):
    """A class that AutoModel knows and ModelTeacher does not sends people to load the module by hand."""
    TheirClassifier(TheirConfig()).save_pretrained(tmp_path)
    AutoConfig.register("their_own", TheirConfig, exist_ok=True)
    with pytest.raises(ValueError, match="TheirClassifier.*registered with an Auto class.*pass the module"):
        ModelTeacher(tmp_path)
    AutoModelForImageClassification.register(TheirConfig, TheirClassifier, exist_ok=True)
    assert type(ModelTeacher(tmp_path).model) is TheirClassifier


@pytest.fixture
def said():
    """What transformers' loggers say, at level warning."""
    lines = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    root = transformers_logging.get_logger("transformers")
    root.addHandler(handler)
    transformers_logging.warning_once.cache_clear()
    yield lines
    root.removeHandler(handler)


def test_the_image_processor_lies_beside_the_weights(tmp_path, said):
    """Without it a teacher sees images in the student's size and colours, answers worse, and nobody is told."""
    network().save_pretrained(tmp_path)
    assert ModelTeacher(tmp_path).processing_class is None
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = ModelTeacher(tmp_path).processing_class
    assert dict(processor.size) == {"height": 8, "width": 8}
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert not said
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NobodysProcessor"}')
    assert ModelTeacher(tmp_path).processing_class is None


def test_a_tokenizer_comes_before_an_image_processor(tmp_path):
    """The tokenizer is what is compared with the student's: hidden by another file, a wrong vocabulary goes unseen."""
    RobertaForSequenceClassification(tiny_roberta_config()).save_pretrained(tmp_path)
    ViTImageProcessorPil().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert ModelTeacher(tmp_path).processing_class.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_small_network_learns_from_a_large_one(tmp_path):
    """All of the above is for this: KD by the trainer, from a folder, saved and loaded again."""
    import datasets

    from hfkd import DistillationArguments, DistillationTrainer

    shaken(network("resnet8x4")).save_pretrained(tmp_path / "teacher")
    images = torch.randn(16, 3, 8, 8)
    rows = datasets.Dataset.from_dict({"pixel_values": images.tolist(), "labels": [i % 5 for i in range(16)]})
    arguments = DistillationArguments(
        output_dir=str(tmp_path / "student"),
        per_device_train_batch_size=8,
        num_train_epochs=10,
        learning_rate=0.01,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    teacher = str(tmp_path / "teacher")
    trainer = DistillationTrainer(network(), arguments, None, rows, teacher=teacher, objective=KD(2.0, 1.0))
    trainer.train()
    losses = [entry["distill_loss"] for entry in trainer.state.log_history if "distill_loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    trainer.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded(images).logits, trainer.model.eval()(images).logits)
