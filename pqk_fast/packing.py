"""Low-bit integers and mask bits as bytes: the layout of deployed files, see :func:`pqk_fast.reference.pack_ints`."""

from __future__ import annotations

import torch
from torch import Tensor

from pqk_fast import dispatch
from pqk_fast.settings import check_bits


def _check_integers(name: str, values: Tensor, low: int, high: int) -> None:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {values.dtype}")
    if values.numel() and not low <= int(values.min()) <= int(values.max()) <= high:
        raise ValueError(f"{name} must lie in {low}..{high}, got {int(values.min())}..{int(values.max())}")


def _check_packed(packed: Tensor, numel: int, bits: int) -> None:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise TypeError(f"packed must be a flat uint8 tensor, got {packed.dtype} {tuple(packed.shape)}")
    size = (numel * bits + 7) // 8
    if numel < 0 or packed.numel() != size:
        raise ValueError(
            f"{numel} values of {bits} bits take {max(size, 0)} bytes, got {packed.numel()}: wrong count or a torn "
            "buffer"
        )


def pack_ints(q: Tensor, bits: int) -> Tensor:
    """Pack integers of any shape in ``-2^(bits-1) .. 2^(bits-1) - 1`` in flat order: uint8 ``[ceil(n bits / 8)]``.

    A little-endian stream of two's complement values (:func:`pqk_fast.reference.pack_ints`). Raises ValueError for
    values out of range and ``bits`` outside 2..8, TypeError for anything but integers.
    """
    check_bits(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if q.dtype != torch.int8:
        _check_integers("q", q, low, high)
        q = q.to(torch.int8)
    try:
        out: Tensor = dispatch.pack_ints(q, bits)
    except RuntimeError:
        _check_integers("q", q, low, high)  # says which, if that is what was wrong
        raise
    return out


def unpack_ints(packed: Tensor, numel: int, bits: int) -> Tensor:
    """The inverse of :func:`pack_ints`: int8 ``[numel]``. Raises ValueError if ``packed`` has another size."""
    check_bits(bits)
    _check_packed(packed, numel, bits)
    out: Tensor = dispatch.unpack_ints(packed, numel, bits)
    return out


def pack_int4(q: Tensor) -> Tensor:
    """:func:`pack_ints` of 4 bits: two's complement nibbles, low nibble first, uint8 ``[(n + 1) // 2]``."""
    return pack_ints(q, 4)


def unpack_int4(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_int4`: int8 ``[numel]``. Raises ValueError if ``packed`` has another size."""
    return unpack_ints(packed, numel, 4)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool mask eight bits a byte, least significant bit first: uint8 ``[(n + 7) // 8]``."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    out: Tensor = dispatch.pack_bits(mask)
    return out


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_bits`: bool ``[numel]``. Raises ValueError if ``packed`` has another size."""
    _check_packed(packed, numel, 1)
    out: Tensor = dispatch.unpack_bits(packed, numel)
    return out
