"""NVIDIA ModelOpt: ``mtq.quantize`` with integer weights of 4 bits, calibrated by least squares.

Its learned scales (LSQ) are for NVFP4 alone, its own weight sparsity for 2 of 4: neither is used. Masks have to be
there before it quantizes: put on afterwards, they switch its weight quantizers off without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from peer import BITS, Quantizer, Requantized, weighted_layers
from torch import Tensor, nn
from torch.nn.utils import prune

OFF = {"enable": False}
CONFIG = {
    "quant_cfg": {
        "*weight_quantizer": {"num_bits": BITS, "axis": None},
        "*input_quantizer": OFF,
        "*output_quantizer": OFF,
    },
    "algorithm": {"method": "mse"},
}


class ModelOpt(Requantized):
    package = "nvidia-modelopt"
    masks_first = True
    does: ClassVar[dict[str, str]] = {
        "quantizer": "per tensor, frozen scale (its LSQ is for NVFP4), no mask",
        "masks": "2 of 4 at most of its own: torch.nn.utils.prune's, made anew by kthvalue",
        "file": "mto.save",
    }

    def quantizer(self, weight: Tensor, mask: Tensor) -> tuple[Quantizer, list[Tensor]]:
        quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=BITS, axis=None))
        quantizer.amax = weight.detach().abs().max()
        return quantizer, []

    def _quantize(self, model: nn.Module, x: Tensor) -> nn.Module:
        return mtq.quantize(model, CONFIG, forward_loop=None)

    def export(self, model: nn.Module, x: Tensor, folder: Path) -> Path:
        for layer in weighted_layers(model):
            prune.remove(layer, "weight")
        mto.save(model, folder / "model.pt")
        return folder / "model.pt"
