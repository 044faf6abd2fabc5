"""The CIFAR networks of distillation papers, as models of transformers: ResNet-n, ResNet-8x4, wide ResNets, MC-Distil's.

`import hfkd.models.cifar_resnet` registers them with AutoConfig, AutoModel and AutoModelForImageClassification, so that
their folders load by name. Transformers' own ResNet cannot be them: its stem has stride 4, which leaves 1 pixel of 32 x 32.

resnet20 to resnet110, resnet8x4, resnet32x4 (He et al. 2016, arXiv 1512.03385, section 4.2, with the 1x1 convolutions in the
shortcuts and the widened x4 forms of CRD, arXiv 1910.10699) and wrn-* (Zagoruyko and Komodakis 2016, arXiv 1605.07146,
without dropout) are the networks of the CRD and mdistiller code, by number of parameters and by equation; no weights of
theirs were compared. resnet10-*, resnet10, resnet18 and resnet34 are MC-Distil's: reconstructed from stage widths, with
the multiply-adds that its authors' comments name; its code was not run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

LAYER_TYPES = ("basic", "pre_activation")

# name: (layer_type, embedding_size, hidden_sizes, depths)
NETWORKS: dict[str, tuple[str, int, tuple[int, ...], tuple[int, ...]]] = {
    "resnet20": ("basic", 16, (16, 32, 64), (3, 3, 3)),
    "resnet32": ("basic", 16, (16, 32, 64), (5, 5, 5)),
    "resnet56": ("basic", 16, (16, 32, 64), (9, 9, 9)),
    "resnet110": ("basic", 16, (16, 32, 64), (18, 18, 18)),
    "resnet8x4": ("basic", 32, (64, 128, 256), (1, 1, 1)),
    "resnet32x4": ("basic", 32, (64, 128, 256), (5, 5, 5)),
    "wrn-16-2": ("pre_activation", 16, (32, 64, 128), (2, 2, 2)),
    "wrn-40-1": ("pre_activation", 16, (16, 32, 64), (6, 6, 6)),
    "wrn-40-2": ("pre_activation", 16, (32, 64, 128), (6, 6, 6)),
    "resnet10-xxxs": ("basic", 4, (4, 8, 8, 16), (1, 1, 1, 1)),
    "resnet10-xxs": ("basic", 8, (8, 8, 16, 16), (1, 1, 1, 1)),
    "resnet10-xs": ("basic", 8, (8, 16, 16, 32), (1, 1, 1, 1)),
    "resnet10-s": ("basic", 8, (8, 16, 32, 64), (1, 1, 1, 1)),
    "resnet10-m": ("basic", 16, (16, 32, 64, 128), (1, 1, 1, 1)),
    "resnet10-l": ("basic", 32, (32, 64, 128, 256), (1, 1, 1, 1)),
    "resnet10": ("basic", 64, (64, 128, 256, 512), (1, 1, 1, 1)),
    "resnet18": ("basic", 64, (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": ("basic", 64, (64, 128, 256, 512), (3, 4, 6, 3)),
}


class CifarResNetConfig(PreTrainedConfig):
    """A stem of stride 1 and stages of blocks; every stage but the first halves the image.

    layer_type: "basic" (activation after the sum, batch norm in the shortcut) or "pre_activation" (wide ResNets).
    embedding_size: channels of the stem. hidden_sizes, depths: channels and blocks of each stage.
    The names are those of transformers' ResNetConfig. Raises ValueError for a layer type or sizes that make no network.
    """

    model_type = "cifar_resnet"

    num_channels: int = 3
    embedding_size: int = 16
    hidden_sizes: list[int] | tuple[int, ...] = (16, 32, 64)
    depths: list[int] | tuple[int, ...] = (3, 3, 3)
    layer_type: str = "basic"

    def __post_init__(self, **kwargs: Any) -> None:
        self.hidden_sizes, self.depths = list(self.hidden_sizes), list(self.depths)
        if self.layer_type not in LAYER_TYPES:
            raise ValueError(f"layer_type must be one of {', '.join(LAYER_TYPES)}, got {self.layer_type!r}")
        if not self.depths or len(self.depths) != len(self.hidden_sizes):
            raise ValueError(
                f"hidden_sizes {self.hidden_sizes} and depths {self.depths} must name the same stages, one or more"
            )
        if min(self.num_channels, self.embedding_size, *self.hidden_sizes, *self.depths) < 1:
            raise ValueError(
                f"num_channels {self.num_channels}, embedding_size {self.embedding_size}, hidden_sizes {self.hidden_sizes} and "
                f"depths {self.depths} must all be 1 or more"
            )
        super().__post_init__(**kwargs)


def cifar_resnet_config(name: str, num_labels: int, **changes: Any) -> CifarResNetConfig:
    """The configuration of a network by its name in the papers, in any case: "resnet8x4", "WRN-40-2", "ResNet10-xxs".

    changes: fields of the configuration (num_channels=1, id2label={...}). Raises ValueError for an unknown name.
    """
    if name.lower() not in NETWORKS:
        raise ValueError(f"there is no CIFAR network {name!r}: choose {', '.join(NETWORKS)}")
    layer_type, embedding_size, hidden_sizes, depths = NETWORKS[name.lower()]
    fields: dict[str, Any] = {
        "layer_type": layer_type,
        "embedding_size": embedding_size,
        "hidden_sizes": hidden_sizes,
        "depths": depths,
        "num_labels": num_labels,
    }
    return CifarResNetConfig(**{**fields, **changes})


def convolution(in_channels: int, channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, size, stride=stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))); the shortcut is bn(conv1x1(x)) where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.convolution1 = convolution(in_channels, channels, 3, stride)
        self.normalization1 = nn.BatchNorm2d(channels)
        self.convolution2 = convolution(channels, channels, 3)
        self.normalization2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(convolution(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, hidden_state: Tensor) -> Tensor:
        inner = F.relu(self.normalization1(self.convolution1(hidden_state)))
        return F.relu(self.shortcut(hidden_state) + self.normalization2(self.convolution2(inner)))


class PreActivationBlock(nn.Module):
    """x + conv(relu(bn(conv(a)))) with a = relu(bn(x)); where the shape changes, conv1x1(a) stands for x."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.normalization1 = nn.BatchNorm2d(in_channels)
        self.convolution1 = convolution(in_channels, channels, 3, stride)
        self.normalization2 = nn.BatchNorm2d(channels)
        self.convolution2 = convolution(channels, channels, 3)
        changes = stride != 1 or in_channels != channels
        self.shortcut = convolution(in_channels, channels, 1, stride) if changes else None

    def forward(self, hidden_state: Tensor) -> Tensor:
        activated = F.relu(self.normalization1(hidden_state))
        inner = F.relu(self.normalization2(self.convolution1(activated)))
        kept = hidden_state if self.shortcut is None else self.shortcut(activated)
        return kept + self.convolution2(inner)


class CifarResNetPreTrainedModel(PreTrainedModel):
    config_class = CifarResNetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = {"BasicBlock", "PreActivationBlock"}  # noqa: RUF012, transformers declares it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Convolutions: normal, variance 2 / (size^2 * output channels). The head: torch's, for wide ResNets with bias 0."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if self.config.layer_type == "basic":
                init.uniform_(module.bias, -bound, bound)


class CifarResNetModel(CifarResNetPreTrainedModel):
    """Without a head. pixel_values: (batch, num_channels, height, width), from 8 x 8.

    Answers last_hidden_state (batch, channels, height', width'), activated; pooler_output (batch, channels, 1, 1), its
    mean over the image; hidden_states: the maps after the stem and after each stage, those of wide ResNets not activated.
    """

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        block = BasicBlock if config.layer_type == "basic" else PreActivationBlock
        stem: list[nn.Module] = [convolution(config.num_channels, config.embedding_size, 3)]
        if config.layer_type == "basic":
            stem += [nn.BatchNorm2d(config.embedding_size), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        self.stages = nn.ModuleList()
        channels = config.embedding_size
        for number, (size, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            first = block(channels, size, 1 if number == 0 else 2)
            self.stages.append(nn.Sequential(first, *(block(size, size, 1) for _ in range(depth - 1))))
            channels = size
        self.normalization = nn.BatchNorm2d(channels) if config.layer_type == "pre_activation" else None
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values have {pixel_values.shape[1]} channels, the network takes {self.config.num_channels}: set "
                "num_channels in its configuration, or convert the images"
            )
        maps = [self.stem(pixel_values.to(self.dtype))]  # as transformers' ViT: images come in float32
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        last = maps[-1] if self.normalization is None else F.relu(self.normalization(maps[-1]))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        answer = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=last,
            pooler_output=last.mean((2, 3), keepdim=True),
            hidden_states=tuple(maps) if wanted else None,
        )
        return answer if (self.config.return_dict if return_dict is None else return_dict) else answer.to_tuple()


class CifarResNetForImageClassification(CifarResNetPreTrainedModel):
    """With a linear head on the pooled map. labels: (batch,) class ids, or what transformers' image heads take else.

    `save_pretrained` puts this file beside the weights, so that they load with trust_remote_code=True where there is no hfkd;
    where it is imported, the classes here are used and no code of the folder runs.
    """

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.resnet = CifarResNetModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        outputs = self.resnet(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output.flatten(1))
        # With kwargs: they hold num_items_in_batch, by which the stock Trainer expects the sum to be divided
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        answer = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        return answer if (self.config.return_dict if return_dict is None else return_dict) else answer.to_tuple()


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
AutoModel.register(CifarResNetConfig, CifarResNetModel, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
# Whoever downloads a student need not install the toolkit that it was made with
CifarResNetConfig.register_for_auto_class()
CifarResNetModel.register_for_auto_class("AutoModel")
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
