"""BatchNorm folded into the convolution before it."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
import torch.fx
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> list[str]:
    """Fold each BatchNorm that alone reads a convolution's result into that convolution's weight and bias.

    For inference: what is folded stands for the statistics of training. Works in place on plain layers; an
    ``nn.Identity`` takes the BatchNorm's place, whose names are given. Kept is a BatchNorm that comes after anything
    else (a ReLU, a sum), and any whose layers or weights are used twice. A model that ``torch.fx`` cannot trace is left
    as it is, with a warning that says why.
    """
    try:
        graph = torch.fx.symbolic_trace(model).graph
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"BatchNorm is kept: torch.fx cannot trace this model ({reason})", stacklevel=2)
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    uses = Counter(id(model.get_submodule(str(node.target))) for node in calls)
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    folded = []
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv, norm = (model.get_submodule(str(n.target)) for n in (before, node))
        if PAIRS.get(type(conv)) is not type(norm) or uses[id(conv)] > 1 or uses[id(norm)] > 1:
            continue
        assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        if norm.running_mean is None or norm.running_var is None:
            continue
        if any(owners[id(parameter)] > 1 for parameter in conv.parameters()):
            continue
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias.detach(), conv.weight.requires_grad)
        parent, _, name = str(node.target).rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
        folded.append(str(node.target))
    return folded
