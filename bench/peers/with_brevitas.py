"""Brevitas: layers with ``Int8WeightPerTensorFloatMSE`` at 4 bits: a learned scale that starts from the least error."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from brevitas.export import export_onnx_qcdq
from brevitas.nn import QuantConv2d, QuantLinear
from brevitas.quant import Int8WeightPerTensorFloatMSE
from peer import BITS, Quantizer, Requantized
from torch import Tensor, nn
from torch.nn.utils import prune

SETTINGS = {"weight_quant": Int8WeightPerTensorFloatMSE, "weight_bit_width": BITS}
SCALE = "scaling_impl.value"


def quantized(layer: nn.Module) -> nn.Module:
    """The Brevitas layer with the same settings and weights."""
    made: nn.Module
    if isinstance(layer, nn.Conv2d):
        same = {key: getattr(layer, key) for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding")}
        same |= {"dilation": layer.dilation, "groups": layer.groups, "padding_mode": layer.padding_mode}
        made = QuantConv2d(**same, bias=layer.bias is not None, **SETTINGS)
    else:
        assert isinstance(layer, nn.Linear)
        made = QuantLinear(layer.in_features, layer.out_features, bias=layer.bias is not None, **SETTINGS)
    made.load_state_dict(layer.state_dict(), strict=False)
    return made


class Brevitas(Requantized):
    package = "brevitas"
    does: ClassVar[dict[str, str]] = {
        "quantizer": "per tensor, learned scale, no mask",
        "masks": "none of its own: torch.nn.utils.prune's, made anew by kthvalue",
        "file": "export_onnx_qcdq",
    }

    def quantizer(self, weight: Tensor, mask: Tensor) -> tuple[Quantizer, list[Tensor]]:
        layer = QuantLinear(weight.shape[1], weight.shape[0], bias=False, **SETTINGS)
        layer.weight.data.copy_(weight.detach())
        layer.quant_weight()  # the scale starts from the layer's weight
        quantize = layer.weight_quant.tensor_quant
        return lambda weight: quantize(weight)[0], self.learned(layer)

    def _quantize(self, model: nn.Module, x: Tensor) -> nn.Module:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child) in (nn.Conv2d, nn.Linear):
                    setattr(parent, name, quantized(child))
        training = model.training
        with torch.no_grad():
            model.eval()(x)  # the scales start from the weights
        return model.train(training)

    def learned(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for name, parameter in model.named_parameters() if name.endswith(SCALE)]

    def export(self, model: nn.Module, x: Tensor, folder: Path) -> Path:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                prune.remove(module, "weight")
        export_onnx_qcdq(model.eval(), x, export_path=str(folder / "model.onnx"), opset_version=18)
        return folder / "model.onnx"
