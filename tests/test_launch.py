"""Launch choices are plain functions of shape and dtype."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pqk_fast.triton_kernels import launch

ROOT = Path(__file__).parent.parent
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(params=["ieee", "tf32"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(launch, "fp32_products", lambda convolution=False: request.param)
    return request.param


def test_fp32_products_follow_torch() -> None:
    """By its old and its new settings; in a process of its own, for torch refuses to read some after others."""
    program = """
import torch
from pqk_fast.triton_kernels.launch import fp32_products as now
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
seen = [(now(), now(True))]
torch.set_float32_matmul_precision("high"); seen.append(now())
matmul.allow_tf32 = False; seen.append(now())
cudnn.allow_tf32 = False; seen.append(now(True))
matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32"; seen.append((now(), now(True)))
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[('ieee', 'tf32'), 'tf32', 'ieee', 'ieee', ('tf32', 'tf32')]\n", done.stderr


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("columns", [None, 1, 9, 27, 144, 512, 4096, 10**6])
def test_element_wise_tiles(itemsize: int, columns: int | None) -> None:
    tile = launch.element_wise(itemsize, columns)
    threads = tile.warps * launch.WARP
    assert tile.rows * tile.columns == 16 * threads
    assert tile.vector * itemsize == launch.LOAD_BYTES
    assert tile.columns >= tile.vector
    assert tile.columns.bit_count() == tile.rows.bit_count() == 1
    if columns is not None:
        assert tile.columns <= max(2 * columns, tile.vector)


@pytest.mark.parametrize("on_cores", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 65, 10_000])
def test_product_tiles_suit_tensor_cores_and_registers(rows: int, itemsize: int, on_cores: bool) -> None:
    tile = launch.dual_product(rows, itemsize, on_cores)
    assert 16 <= tile.rows <= 64
    assert tile.rows >= min(rows, 64) or on_cores
    assert tile.outs == 64, "what a warp group of Hopper multiplies at least"
    accumulators = 2 * tile.rows * tile.outs / (tile.warps * launch.WARP)
    assert accumulators <= 64


@pytest.mark.parametrize(
    ("tiles", "depths", "expected"), [(64, 64, 8), (1, 1, 1), (1, 64, 16), (1000, 64, 1), (64, 7, 1)]
)
def test_splits_fill_the_gpu_and_leave_each_some_work(tiles: int, depths: int, expected: int) -> None:
    assert launch.splits(tiles, depths, 132) == expected


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("outputs", "depth"), [(1, 9), (45, 405), (19, 171), (64, 576), (256, 2304)])
def test_convolution_tiles(outputs: int, depth: int, itemsize: int) -> None:
    for on_cores in (False, True):
        tile = launch.convolution(outputs, depth // 9, 9, on_cores)
        assert 16 <= tile["BN"] <= 64
        assert tile["CHANNELS"] <= tile["BK"]
        assert 2 * tile["BM"] * tile["BN"] <= 64 * tile["num_warps"] * launch.WARP
    tile, splits = launch.convolution_gradient(20_800, outputs, depth, itemsize, 132)
    programs = splits * -(-outputs // tile["BO"]) * -(-depth // tile["BK"])
    assert 1 <= programs <= max(2 * 132, -(-outputs // 64) * -(-depth // 32))
    assert splits * tile["BO"] * tile["BK"] * 4 <= 512 * 1024


def test_few_rows_fuse_and_many_do_not() -> None:
    """Bound by reading the weights, then by arithmetic; on Blackwell Triton's fp32 is not IEEE's."""
    fuses = [launch.fuses_linear(rows, 4096, 4096, BF16, 90) for rows in (1, 16, 64, 256, 2048, 16384)]
    assert fuses == [True, True, True, True, False, False]
    assert launch.fuses_linear(16, 4096, 4096, FP32, 90)
    assert not launch.fuses_linear(1024, 4096, 4096, FP32, 90)


def test_small_layers_fuse(precision: str) -> None:
    assert launch.fuses_linear(64, 12, 48, FP32, 90)
    assert launch.fuses_linear(64, 12, 48, FP32, 100) == (precision == "tf32")
    assert not launch.fuses_linear(64, 12, 48, FP32, 75)


def test_rows_of_no_whole_loads_do_not_fuse() -> None:
    assert not launch.fuses_linear(64, 12, 45, FP32, 90)
    assert not launch.fuses_linear(64, 12, 48, BF16, 90)


def test_the_gradient_of_a_small_weight_over_many_rows_does_not_fuse() -> None:
    """It would be the work of a few programs."""
    assert launch.fuses_linear(4096, 64, 64, BF16, 90)
    assert not launch.fuses_linear(4096, 64, 64, BF16, 90, backward=True)
    assert launch.fuses_linear(256, 64, 64, BF16, 90, backward=True)


CONVOLUTIONS = {
    "res8": ((128, 45, 25, 13), (45, 45, 3, 3), (25, 13)),
    "res8, first layer": ((128, 1, 101, 40), (45, 1, 3, 3), (101, 40)),
    "ResNet-50": ((128, 256, 14, 14), (256, 256, 3, 3), (14, 14)),
}


@pytest.mark.parametrize(
    ("layer", "dtype", "expected"),
    [("res8", BF16, True), ("res8, first layer", BF16, True), ("ResNet-50", BF16, False), ("ResNet-50", FP32, False)],
)
def test_convolutions_of_small_networks_fuse(layer: str, dtype: torch.dtype, expected: bool) -> None:
    shapes = CONVOLUTIONS[layer]
    assert launch.fuses_conv2d(*shapes, 1, dtype, False, 90) == expected
    assert not launch.fuses_conv2d(*shapes, 3, dtype, False, 90), "groups"


def test_more_positions_than_the_kernel_counts_do_not_fuse() -> None:
    shapes = ((1, 1, 3, 3), (2**14, 2**15))
    assert launch.fuses_conv2d((2, 1, 2**14, 2**15), *shapes, 1, BF16, False, 90)
    assert not launch.fuses_conv2d((4, 1, 2**14, 2**15), *shapes, 1, BF16, False, 90)


def test_what_a_gpu_can_do_is_asked_of_its_driver() -> None:
    assert launch.capability(torch.device("cpu")) == 80
