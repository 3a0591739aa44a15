"""Launch choices: block sizes and warps as plain functions of shape and dtype. Importable without Triton.

There is no autotuning at run time: ``bench/tune.py`` searches, and what it finds is written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

WARP = 32
LOAD_BYTES = 16  # the widest access of a thread

# Kernel parameters may take 4 KiB, and a layer up to six pointers.
MOST_LAYERS = 64


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 1."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """What one program does: ``rows`` x ``columns`` elements by ``warps`` warps, ``vector`` neighbours a thread."""

    rows: int
    columns: int
    warps: int
    vector: int


def element_wise(itemsize: int, columns: int | None = None) -> Tile:
    """For kernels that read a weight once: 16 elements a thread, in loads of 16 bytes.

    ``itemsize``: the largest of what is read and written at the weights' places. ``columns``: the longest row of a
    layer with a step size for each row; None for one step size a layer, where the rows of a tile follow each other.
    """
    warps, vector = 4, LOAD_BYTES // itemsize
    threads = warps * WARP
    width = threads * vector
    if columns is not None:
        width = min(width, max(next_power_of_2(columns), vector))
    return Tile(16 * threads // width, width, warps, vector)


def sums_at_once(sums: int) -> int:
    """How many programs' sums the last program loads at a time, each of ``sums`` numbers."""
    return max(1024 // sums, 1)


@dataclass(frozen=True)
class Product:
    """A tile of a product: ``rows`` of each half of x, ``outs`` of the weight's other index, ``depth`` at a time."""

    rows: int
    outs: int
    depth: int
    warps: int
    stages: int


def dual_product(rows: int, itemsize: int, on_cores: bool) -> Product:
    """For a product with the weight. ``on_cores``: fp32 without tensor cores, where small tiles keep registers free."""
    if on_cores:
        return Product(16, 64, 32, 4, 3)
    return Product(min(max(next_power_of_2(rows), 16), 64), 64, 32 if itemsize == 4 else 64, 4, 3)


def most_registers(capability: int) -> int | None:
    """For products with the weight: all that a thread can have on Blackwell, where the assembler would rather spill."""
    return 255 if capability >= 100 else None


def splits(tiles: int, depths: int, multiprocessors: int) -> int:
    """Among how many programs the depth of a tile is divided: until there are two a multiprocessor, for weights stream
    through few rows at the speed of the programs that are under way; each with 4 steps or more."""
    count = 1
    while 2 * count * tiles <= 4 * multiprocessors and 2 * count * 4 <= depths:
        count *= 2
    return count


def dual_weight_gradient(itemsize: int) -> Product:
    """For the weight's gradient: ``outs`` x ``depth`` of it, summed over ``rows`` at a time."""
    return Product(32 if itemsize == 4 else 64, 64, 64, 4, 3)


def channels_at_once(channels: int, taps: int, depth: int) -> int:
    """How many channels go into a block of ``depth`` products, so that whole blocks hold the fewest that are none."""

    def padded(at_once: int) -> int:
        return -(-channels // at_once) * -(-taps // (depth // at_once))

    return min((2**i for i in reversed(range(depth.bit_length()))), key=padded)


def convolution(columns: int, channels: int, taps: int, on_cores: bool) -> dict[str, int]:
    """Block sizes and warps for ``columns`` columns and ``channels`` x ``taps`` products each.

    ``on_cores``: fp32 without tensor cores. The most that compiled for sm_80, 90 and 100 without spilling.
    """
    across = min(max(next_power_of_2(columns), 16), 64)
    depth = 16
    return {
        "BM": 64 if across > 16 else 128,
        "BN": across,
        "BK": depth,
        "CHANNELS": channels_at_once(channels, taps, depth),
        "num_warps": 8 if on_cores else 4,
        "num_stages": 2,
    }


def convolution_gradient(
    positions: int, outputs: int, depth: int, itemsize: int, multiprocessors: int
) -> tuple[dict[str, int], int]:
    """Block sizes and warps for a weight gradient [outputs, depth], and among how many programs its sums are divided.

    As many programs as run at once; but each with four blocks of positions or more, and no more than 512 KiB of parts
    for the last one to add up.
    """
    most = 32 if itemsize == 4 else 64  # fp32 factors take twice the registers
    down, across = (min(max(next_power_of_2(size), 16), n) for size, n in ((outputs, 64), (depth, most)))
    count = -(-outputs // down) * -(-depth // across)
    splits = min(2 * multiprocessors // count, -(-positions // (4 * 32)), 2**17 // (down * across))
    at_once = 2**13 // (down * across)
    choice = {"BO": down, "BK": across, "BR": 32, "AT_ONCE": at_once, "num_warps": 8, "num_stages": 2}
    return choice, max(splits, 1)


def capability(device: torch.device) -> int:
    """80, 90, 100, ...; interpreted kernels do what the oldest can."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def fp32_products(convolution: bool = False) -> str:
    """How PyTorch is set to multiply fp32 matrices, or convolve: "ieee", or "tf32" on tensor cores."""
    backends: Any = torch.backends
    setting = backends.cudnn.conv if convolution else backends.cuda.matmul
    return "tf32" if setting.fp32_precision == "tf32" else "ieee"


# For choosing between ways, a Hopper GPU in round numbers: bytes/s, operations/s of tensor cores by the bytes of a
# value and of the cores in fp32, elements/s through one instruction, seconds to start a kernel in a captured graph.
BANDWIDTH = 3e12
TENSOR_CORES = {2: 6e14, 4: 3e14}
CORES = 4e13
LANES = 2.5e13
LAUNCH = 2e-6
OWN_PRODUCTS = 0.5  # of a rate that a library's products reach, what kernels that quantize as they go do
QUANTIZER = 20  # instructions a weight


def fuses_linear(rows: int, outs: int, ins: int, dtype: torch.dtype, capability: int, backward: bool = False) -> bool:
    """Whether one launch is faster than making the student's weight and two products.

    A model of traffic and arithmetic, not a measurement: one launch reads an fp32 weight and its mask once (5 bytes a
    weight), but quantizes it anew for every 64 rows and multiplies at half the library's rate; the other way reads 5
    and writes both weights in ``dtype``, reads w again for the teacher's, and reads both for the products. Few rows are
    bound by the weights and fuse; from about a thousand on arithmetic decides. Rows that are not of whole 16-byte loads
    spill registers, GPUs before Ampere have no bf16, and on Blackwell Triton 3.6 multiplies fp32 in tf32 even where
    ieee is asked for: not there. The weight's gradient is a tile a program, each of which goes through all rows: many
    rows need many tiles.
    """
    on_cores = dtype == torch.float32 and fp32_products() == "ieee"
    weights, itemsize = outs * ins, dtype.itemsize
    if (
        capability < 80
        or (on_cores and capability >= 100)
        or outs * itemsize % LOAD_BYTES
        or ins * itemsize % LOAD_BYTES
    ):
        return False
    if backward and rows > 512 and -(-outs // 64) * -(-ins // 64) < 64:
        return False
    rate = CORES if on_cores else TENSOR_CORES[itemsize]
    products = 4 * rows * weights / rate
    tiles = -(-rows // dual_product(rows, itemsize, on_cores).rows)
    one_launch = max(5 * weights / BANDWIDTH, products / OWN_PRODUCTS, tiles * QUANTIZER * weights / LANES)
    cast = 0 if itemsize == 4 else 4 + itemsize
    separate = 3 * LAUNCH + (5 + 3 * itemsize + cast) * weights / BANDWIDTH + products
    return one_launch < separate


OWN_CONVOLUTION = 0.25  # of the rate of matrix products, what kernels reach that gather their images as they go
LIBRARY_CONVOLUTION = 0.6  # and what a library's convolution does


def fuses_conv2d(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    image: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
    capability: int,
) -> bool:
    """Whether one launch is faster than making the student's weight and two convolutions.

    ``x [2B, C_in, H, W]``, ``weight [C_out, C_in, kh, kw]``, ``image``: (H, W) of the result. A model like that of
    :func:`fuses_linear`: arithmetic at a lower rate against more launches, and the copies into channels_last and back
    that a library makes for tensor cores where images are not so already. Small networks are bound by launches and
    copies and fuse; many channels are bound by arithmetic.
    """
    on_cores = dtype == torch.float32 and fp32_products(convolution=True) == "ieee"
    if groups != 1 or capability < 80 or (on_cores and capability >= 100):
        return False
    outs, channels, *kernel = weight
    rows, depth, itemsize = x[0] // 2 * image[0] * image[1], channels * kernel[0] * kernel[1], dtype.itemsize
    rate = CORES if on_cores else TENSOR_CORES[itemsize]
    if max(rows, x[0] // 2 * x[2] * x[3]) >= 2**30:  # positions are counted in 32 bits
        return False
    products = 4 * rows * outs * depth / rate
    moved = itemsize * (x[0] * channels * x[2] * x[3] + 2 * rows * outs) / BANDWIDTH
    one_launch = LAUNCH + max(moved, products / OWN_CONVOLUTION, rows / 64 * QUANTIZER * outs * depth / LANES)
    copies = 0 if channels_last or on_cores else 1
    separate = (3 + 6 * copies) * LAUNCH + (1 + 2 * copies) * moved + products / LIBRARY_CONVOLUTION
    return one_launch < separate
