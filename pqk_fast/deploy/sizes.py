"""What a packed student takes, byte by byte, and what other forms would take: tables and a picture."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pqk_fast.deploy.encodings import encode, entropy_bound
from pqk_fast.deploy.reader import ENCODINGS, Packed
from pqk_fast.pages import Page, Table
from pqk_fast.plots import make_figure, png


def layers_table(packed: Packed) -> Table:
    """A row a layer: shape, bits, nonzero weights, encoding, payload and its bound in bytes, step size."""
    table = Table("Layers", ("layer", "shape", "bits", "weights", "nonzero", "encoding", "bytes", "bound", "step size"))
    for name, layer in packed.layers.items():
        low, high = float(layer.step.min()), float(layer.step.max())
        table.rows.append(
            [
                name,
                "x".join(map(str, layer.q.shape)),
                str(layer.bits),
                f"{layer.q.size:,}",
                f"{np.count_nonzero(layer.q):,}",
                layer.encoding,
                f"{layer.payload:,}",
                f"{entropy_bound(layer.q.reshape(-1)):,.0f}",
                f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}",
            ]
        )
    weights, kept = (sum(f(layer) for layer in packed.layers.values()) for f in (_size, _kept))
    bound = sum(entropy_bound(layer.q.reshape(-1)) for layer in packed.layers.values())
    table.rows.append(["all", "", "", f"{weights:,}", f"{kept:,}", "", f"{payload(packed):,}", f"{bound:,.0f}", ""])
    return table


def parts_table(packed: Packed) -> Table:
    """Where the file's bytes are."""
    steps = sum(4 * layer.step.size for layer in packed.layers.values())
    tensors = sum(4 * tensor.size for tensor in packed.tensors.values())
    table = Table("The file", ("part", "bytes"))
    for name, size in {
        "weights (payload)": payload(packed),
        "step sizes, fp32": steps,
        "BatchNorm, biases and others, fp32": tensors,
        "header and index": packed.header,
        "file": packed.size,
    }.items():
        table.rows.append([name, f"{size:,}"])
    return table


def formats(packed: Packed) -> dict[str, float]:
    """Bytes that the layers' weights would take in other forms, without step sizes; the file's own first.

    "the paper's count" is the values of nonzero weights at k bits, with nothing that says where they are. Other
    libraries' formats are counted by their definitions: GGUF's Q4_0 (llama.cpp: 32 weights in 18 bytes), bitsandbytes'
    NF4 (64 weights and an fp32 scale), compressed-tensors' sparse-bitmask (bf16 values, a bit a weight, a 64-bit offset
    a row). The first two would round the weights to another grid.
    """
    layers = list(packed.layers.values())
    fp32 = b"".join(layer.weight().tobytes() for layer in layers)
    int8 = b"".join(layer.q.tobytes() for layer in layers)
    dense4 = sum((layer.q.size + 1) // 2 for layer in layers)
    sizes: dict[str, float] = {
        "this file's payload": payload(packed),
        "bound of independent weights": sum(entropy_bound(layer.q.reshape(-1)) for layer in layers),
        "the paper's count": sum(np.count_nonzero(layer.q) * layer.bits for layer in layers) / 8,
    }
    for encoding in ENCODINGS:
        made = sum(len(encode(layer.q.reshape(-1), layer.bits, encoding)) for layer in layers)
        sizes[{"dense": "dense, k bits", "bitmask": "bitmask and k-bit values"}.get(encoding, encoding)] = made
    if all(layer.bits <= 4 for layer in layers):
        sizes["dense int4"] = dense4
    return {
        **sizes,
        "GGUF Q4_0": sum(18 * -(-layer.q.size // 32) for layer in layers),
        "bitsandbytes NF4": sum((layer.q.size + 1) // 2 + 4 * -(-layer.q.size // 64) for layer in layers),
        "compressed-tensors bitmask, bf16": sum(_bitmask_bf16(layer.q) for layer in layers),
        "dense int8": len(int8),
        "dense int8, zlib": len(zlib.compress(int8, 9)),
        "dense int8, xz": len(lzma.compress(int8, preset=9)),
        "rows of values and 32-bit columns (CSR), fp32": sum(_csr(layer.q) for layer in layers),
        "fp32": len(fp32),
        "fp32, zlib": len(zlib.compress(fp32, 9)),
    }


def formats_table(packed: Packed) -> Table:
    """:func:`formats`, each as a multiple of this file's payload."""
    table = Table("Weights alone, in other forms", ("form", "bytes", "of this file's"))
    own = max(payload(packed), 1)
    for name, size in formats(packed).items():
        table.rows.append([name, f"{size:,.0f}", f"{size / own:.2f}"])
    return table


def page_of(packed: Packed, name: str) -> Page:
    """All tables and, where matplotlib is installed, pictures."""
    page = Page(f"`{name}`: {packed.size:,} bytes")
    if packed.metadata:
        page.items([f"{key}: {_shown(value)}" for key, value in packed.metadata.items()])
    for table in (parts_table(packed), layers_table(packed), formats_table(packed)):
        page.table(table)
    try:
        page.picture("values", _histograms(packed), "Nonzero values of each layer, in steps.")
    except ImportError as error:
        page.text(f"No picture: {error}.")
    return page


def payload(packed: Packed) -> int:
    return sum(layer.payload for layer in packed.layers.values())


def summary(packed: Packed) -> Mapping[str, Any]:
    """The figures as plain JSON."""
    return {
        "bytes": packed.size,
        "payload": payload(packed),
        "header": packed.header,
        "formats": formats(packed),
        "layers": {
            name: {
                "shape": list(layer.q.shape),
                "bits": layer.bits,
                "nonzero": _kept(layer),
                "encoding": layer.encoding,
                "bytes": layer.payload,
                "bound": entropy_bound(layer.q.reshape(-1)),
                "step_size": layer.step.tolist(),
            }
            for name, layer in packed.layers.items()
        },
    }


def _size(layer: Any) -> int:
    return int(layer.q.size)


def _kept(layer: Any) -> int:
    return int(np.count_nonzero(layer.q))


def _csr(q: Any) -> int:
    rows = q.shape[0] if q.ndim else 1
    return 8 * int(np.count_nonzero(q)) + 4 * (rows + 1)


def _bitmask_bf16(q: Any) -> int:
    rows, columns = (q.shape[0], q[0].size) if q.ndim else (1, 1)
    return 2 * int(np.count_nonzero(q)) + rows * (-(-columns // 8) + 8)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _histograms(packed: Packed) -> bytes:
    columns = min(4, len(packed.layers))
    rows = -(-len(packed.layers) // columns)
    figure = make_figure(2.7 * columns, 2.1 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for plot in axes[len(packed.layers) :]:
        plot.set_visible(False)
    for plot, (name, layer) in zip(axes, packed.layers.items(), strict=False):
        most = 2 ** (layer.bits - 1) - 1
        values = layer.q[layer.q != 0]
        plot.bar(*np.unique(values, return_counts=True), width=1.0, color="#0072B2")
        plot.set_xlim(-most - 1, most + 1)
        plot.set_title(f"{name}: {values.size:,} of {layer.q.size:,}", fontsize=9)
        plot.tick_params(labelsize=8)
        plot.spines[["top", "right"]].set_visible(False)
    return png(figure)
