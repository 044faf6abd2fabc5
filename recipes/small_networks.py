"""Three networks with one layer whose weights are followed: random features, a perceptron, a small CNN. Grey images.

Without normalisation layers: behind one, the size of the weights before it means nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

FOLLOWED = {
    "random_features": "head",
    "mlp": "hidden",
    "cnn": "first",
}  # the layer that learns from the data's directions


class SmallConfig(PreTrainedConfig):
    """kind: one of FOLLOWED. width: random features, hidden units, or filters of the first convolution."""

    model_type = "small_classifier"

    kind: str = "mlp"
    image_size: int = 28
    width: int = 128


class SmallClassifier(PreTrainedModel):
    """pixel_values (batch, channels, height, width), of which the channels' mean is read -> logits (batch, num_labels).

    random_features: head(relu(drawn x + shift)), where drawn and shift stay, and the head starts at 0, without a bias: the
    linear model of the theory. mlp: head(relu(hidden(x))). cnn: two convolutions of 5 x 5, each with relu and
    a maximum over 2 x 2, and a head.
    """

    config_class = SmallConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SmallConfig):
        super().__init__(config)
        pixels, width = config.image_size**2, config.width
        if config.kind == "random_features":
            # Buffers: a parameter that is frozen here comes back trainable from from_pretrained
            self.register_buffer("drawn", torch.randn(width, pixels) * math.sqrt(2 / pixels))
            self.register_buffer("shift", torch.rand(width) - 0.5)
            self.head = nn.Linear(width, config.num_labels, bias=False)
        elif config.kind == "mlp":
            self.hidden = nn.Linear(pixels, width)
            self.head = nn.Linear(width, config.num_labels)
        else:
            self.first = nn.Conv2d(1, width, 5, padding=2)
            self.second = nn.Conv2d(width, 2 * width, 5, padding=2)
            self.head = nn.Linear(2 * width * (config.image_size // 4) ** 2, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Torch's uniform draws; the head of random features is 0."""
        if not isinstance(module, nn.Linear | nn.Conv2d):
            return
        if self.config.kind == "random_features":
            init.zeros_(module.weight)
            return
        bound = 1 / math.sqrt(module.weight[0].numel())
        init.uniform_(module.weight, -bound, bound)
        init.uniform_(module.bias, -bound, bound)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        grey = pixel_values.mean(1, keepdim=True)
        if self.config.kind == "cnn":
            inner = F.max_pool2d(F.relu(self.first(grey)), 2)
            inner = F.max_pool2d(F.relu(self.second(inner)), 2)
        else:
            rows = grey.flatten(1)
            inner = F.relu(self.hidden(rows) if self.config.kind == "mlp" else F.linear(rows, self.drawn, self.shift))
        logits = self.head(inner.flatten(1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
