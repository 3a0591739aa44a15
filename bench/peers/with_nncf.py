"""NNCF: ``nncf.prune`` and ``nncf.quantize`` with weights of 4 bits.

4 bits are given for the NPU alone. ``nncf.quantize`` puts 8-bit quantizers on activations, too; those are taken out,
since no other candidate has any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import nncf
import nncf.torch
import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.parameters import PruneMode
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.pruning.magnitude.algo import update_pruning_ratio
from nncf.torch.function_hook.wrapper import get_hook_storage
from nncf.torch.quantization.layers import PTQuantizerSpec, SymmetricQuantizer
from peer import BITS, Peer, Quantizer
from torch import Tensor, nn

MODE = PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL


def is_of_weight(hook_name: str) -> bool:
    """Whether a hook stands before the second input of an operation, which is the weight."""
    place, _, port = decode_hook_name(hook_name)
    return place == "pre_hooks" and port == 1


class Nncf(Peer):
    package = "nncf"
    does: ClassVar[dict[str, str]] = {
        "quantizer": "per tensor, learned scale, no mask; its C++ operation",
        "masks": "nncf.prune, global magnitude (of weights over their layer's norm)",
        "file": "its checkpoint, state_dict and nncf.torch.get_config (nncf.strip converts 8 bits alone)",
    }

    def quantizer(self, weight: Tensor, mask: Tensor) -> tuple[Quantizer, list[Tensor]]:
        spec = PTQuantizerSpec(BITS, QuantizationScheme.SYMMETRIC, True, True, False, (1,), False)
        quantizer = SymmetricQuantizer(spec)
        with torch.no_grad():
            quantizer.scale.fill_(weight.abs().max())
        return quantizer, [quantizer.scale]

    def add_masks(self, model: nn.Module, x: Tensor) -> nn.Module:
        return nncf.prune(model, MODE, ratio=0.0, examples_inputs=x)

    def set_sparsity(self, model: nn.Module, sparsity: float) -> None:
        """What its schedulers call."""
        update_pruning_ratio(model, MODE, sparsity)

    def _quantize(self, model: nn.Module, x: Tensor) -> nn.Module:
        training = model.training
        weights = QuantizationParameters(num_bits=BITS, mode=QuantizationScheme.SYMMETRIC, per_channel=False)
        quantized: Any = nncf.quantize(
            model.eval(),
            nncf.Dataset([x]),
            subset_size=1,
            target_device=nncf.TargetDevice.NPU,
            advanced_parameters=AdvancedQuantizationParameters(
                disable_bias_correction=True, weights_quantization_params=weights
            ),
        )
        hooks = get_hook_storage(quantized)
        for name, hook in list(hooks.named_hooks()):
            if isinstance(hook, SymmetricQuantizer) and not is_of_weight(name):
                hooks.delete_hook(name)
        return quantized.train(training)

    def learned(self, model: nn.Module) -> list[nn.Parameter]:
        return [module.scale for module in model.modules() if isinstance(module, SymmetricQuantizer)]

    def export(self, model: nn.Module, x: Tensor, folder: Path) -> Path:
        checkpoint = {"nncf_config": nncf.torch.get_config(model), "state_dict": model.state_dict()}
        torch.save(checkpoint, folder / "checkpoint.pt")
        return folder / "checkpoint.pt"
