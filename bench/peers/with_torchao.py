"""torchao: QAT with range learning (``IntxFakeQuantizeConfig(range_learning=True)``).

Its QAT knows linear layers and embeddings alone: convolutions get the same fake-quantizer by hand, on their weight as a
matrix [out, in * kh * kw], and its conversion leaves them in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from peer import Quantizer, Requantized, saved_state
from torch import Tensor, nn
from torch.nn.utils import prune
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers
from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

CONFIG = IntxFakeQuantizeConfig(torch.int4, PerAxis(0), is_symmetric=True, is_dynamic=False, range_learning=True)


class FakeQuantizedConv2d(nn.Conv2d):
    """As torchao's FakeQuantizedLinear does it."""

    weight_fake_quantizer: IntxFakeQuantizer

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_fake_quantizer(self.weight.flatten(1)).view_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


class Torchao(Requantized):
    package = "torchao"
    does: ClassVar[dict[str, str]] = {
        "quantizer": "per output channel (one for the whole tensor where it is timed alone), learned scale, no mask",
        "masks": "none of its own: torch.nn.utils.prune's, made anew by kthvalue",
        "file": "QATConfig(step='convert') and torch.save of the state_dict; convolutions stay fp32",
    }

    def quantizer(self, weight: Tensor, mask: Tensor) -> tuple[Quantizer, list[Tensor]]:
        quantizer = IntxFakeQuantizer(CONFIG)
        quantizer._initialized = True  # as initialize_fake_quantizers does
        quantizer(weight.detach().reshape(1, -1))
        assert isinstance(quantizer.scale, nn.Parameter)
        return lambda weight: quantizer(weight.reshape(1, -1)).view_as(weight), [quantizer.scale]

    def _quantize(self, model: nn.Module, x: Tensor) -> nn.Module:
        for module in model.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = FakeQuantizedConv2d
                module.weight_fake_quantizer = IntxFakeQuantizer(CONFIG)
        quantize_(model, QATConfig(weight_config=CONFIG, step="prepare"))
        training = model.training
        initialize_fake_quantizers(model.eval(), (x,))
        return model.train(training)

    def learned(self, model: nn.Module) -> list[nn.Parameter]:
        return [module.scale for module in model.modules() if isinstance(module, IntxFakeQuantizer)]

    def export(self, model: nn.Module, x: Tensor, folder: Path) -> Path:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                prune.remove(module, "weight")
            if isinstance(module, FakeQuantizedConv2d):
                weight = module.weight_fake_quantizer(module.weight.flatten(1)).view_as(module.weight)
                module.weight = nn.Parameter(weight.detach())
                del module.weight_fake_quantizer
                module.__class__ = nn.Conv2d
        quantize_(model, QATConfig(IntxWeightOnlyConfig(torch.int4, PerAxis(0)), step="convert"))
        return saved_state(model, folder)
