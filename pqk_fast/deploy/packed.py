"""Packed students: one small safetensors file, see ``docs/format.md``; ``reader`` reads it with numpy alone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pqk_fast.branches import require_prepared
from pqk_fast.deploy.encodings import smallest
from pqk_fast.deploy.integers import integers_of
from pqk_fast.deploy.reader import ENCODINGS, FORMAT, VERSION, Packed, read_packed, weight_name
from pqk_fast.files import replacing
from pqk_fast.layers import PQKLayer
from pqk_fast.models import create_model
from pqk_fast.prepare import convert

COUNTERS = "num_batches_tracked"  # of BatchNorm; training's alone


def save_packed(model: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None) -> int:
    """Write the student of a prepared model; gives the file's size in bytes.

    Weights of PQK layers are kept as the integers of Eq. 2 and their step size, each layer in the encoding that takes
    the fewest bytes; all else of the plain model's state dict (BatchNorm, biases, excluded layers) in fp32. Only values
    count: a kept weight that is quantized to 0 is not told from a pruned one. ``metadata`` is plain JSON; "model" and
    "classes" let :func:`load_packed` build the network.

    Raises ValueError for an unprepared model, ``bits=32``, weights or step sizes that are not finite, or a buffer that
    fp32 cannot hold.
    """
    layers = require_prepared(model)
    integers = {name: integers_of(name, layer) for name, layer in layers.items()}
    # under every name that a shared module has
    named = model.named_modules(remove_duplicate=False)
    packed = {weight_name(name) for name, module in named if isinstance(module, PQKLayer)}
    rest = {
        name: tensor
        for name, tensor in convert(model).state_dict().items()
        if not name.endswith(COUNTERS) and name not in packed
    }
    entries, steps, payloads = [], [], []
    for name, (q, step) in integers.items():
        bits = layers[name].bits
        encoding, payload = smallest(q.reshape(-1), bits)
        entries.append([name, list(q.shape), bits, ENCODINGS.index(encoding), step.size, len(payload)])
        steps.append(step.astype("<f4").tobytes())
        payloads.append(payload.tobytes())
    tensors = [[name, list(tensor.shape)] for name, tensor in rest.items()]
    floats = [_fp32(name, tensor) for name, tensor in rest.items()]
    index = zlib.compress(json.dumps([entries, tensors, dict(metadata or {})], separators=(",", ":")).encode(), 9)
    body = index + b"".join([*steps, *floats, *payloads])
    words = np.array([len(index), zlib.crc32(body)], "<u4").tobytes()
    content = _wrapped(words + body)
    with replacing(path) as file:
        file.write(content)
    return len(content)


def load_packed(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """A plain fp32 model with the file's weights, bit for bit those of the student, in evaluation mode.

    ``model`` is a plain network of that architecture, which is filled in place; without one the network is built from
    the file's metadata.

    Raises PackedError for a file that is damaged or none, ValueError if it does not say which network it is of,
    RuntimeError (torch's) if names or shapes do not fit ``model``.
    """
    return fill(read_packed(path), model)


def fill(packed: Packed, model: nn.Module | None = None) -> nn.Module:
    """:func:`load_packed` of what was read already."""
    if model is None:
        name, classes = packed.metadata.get("model"), packed.metadata.get("classes")
        if not isinstance(name, str) or not isinstance(classes, int):
            raise ValueError("the file does not say which network it is of: give load_packed a plain model to fill")
        model = create_model(name, classes)
    state = {name: torch.from_numpy(value) for name, value in packed.state_dict().items()}
    first: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        known = first.setdefault(module, name)
        if known in packed.layers:
            state[weight_name(name)] = state[weight_name(known)]
    counters = {name: value for name, value in model.state_dict().items() if name.endswith(COUNTERS)}
    model.load_state_dict({**counters, **state})
    return model.eval()


def _fp32(name: str, tensor: Tensor) -> bytes:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity: training had diverged, export an earlier checkpoint")
    as_fp32 = tensor.detach().cpu().to(torch.float32)
    if not torch.equal(as_fp32.to(tensor.dtype), tensor.detach().cpu()):
        raise ValueError(f"{name} ({tensor.dtype}) holds values that fp32 cannot: exclude it from the state dict")
    return as_fp32.numpy().astype("<f4").tobytes()


def _wrapped(data: bytes) -> bytes:
    """As a safetensors file with one tensor, whose header is padded to a multiple of 8 bytes."""
    header = {
        "__metadata__": {"format": FORMAT, "version": VERSION},
        "data": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data
