"""Student's and teacher's convolution of phase 2 in one launch: an implicit matrix product whose weight is quantized in
registers. Its gradients are in :mod:`dual_conv2d_backward`.

Rows of the product are the positions ``m = (b, oh, ow)`` in one half of the batch, columns the output channels ``n``;
it sums over ``k``, a channel and a tap of the kernel. A program makes a tile of both halves, for which it reads the
weight and the mask once. A block of k is CHANNELS channels of BK / CHANNELS taps, which are powers of two: places are
found without divisions, and few channels waste few lanes. Tiles are [BM, .] for NCHW and transposed for channels_last:
the compiler puts the lanes of a warp along dimension 0, and there neighbours are neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqk_fast.reference import levels
from pqk_fast.triton_kernels import launch, operands
from pqk_fast.triton_kernels.tile_math import is_bad_step, quantized, reciprocal

NOWHERE = tl.constexpr(-(2**29))  # a row that is outside of every image, whatever tap is added
MOST_OFFSETS = 2**31  # of 32 bits
CUDNN = torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]

# What a step size for each output channel of the weight goes along: the product's columns, or what it sums over.
ONE_STEP, ALONG_N, ALONG_K = (tl.constexpr(i) for i in range(3))


@triton.jit
def along(v, AXIS: tl.constexpr):
    """A vector as a tile's column (AXIS 0, [N, 1]) or row (AXIS 1, [1, N])."""
    return tl.expand_dims(v, 1 - AXIS)


@triton.jit
def divided(n, multiplier, shift):
    """``n // d`` for int32 ``n >= 0`` by the numbers of :func:`reciprocal_of`: a tenth of a division's instructions."""
    return (tl.umulhi(2 * n.to(tl.uint32), multiplier.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def _product(rows, columns, total, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr):
    """``total + rows @ columns``; for channels_last, whose tiles are transposed, ``total + columns @ rows``."""
    left = columns if CHANNELS_LAST else rows
    right = rows if CHANNELS_LAST else columns
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["positions", "area_multiplier", "area_shift", "width_multiplier", "width_shift"])
def _convolve(
    x,  # [2 halves, K, height_in, width_in] by its strides
    weight,  # [N, K, KERNEL] by its strides, as is mask
    mask,
    step,
    bias,  # [N]
    out,  # [2 halves, N, area], dense
    flags,
    positions,
    area_multiplier,
    area_shift,
    width_multiplier,
    width_shift,
    area,
    width,
    height_in,
    width_in,
    channels,
    columns,
    strides,
    weight_strides,
    teacher_x,  # how far the teacher's half is
    teacher_out,
    largest,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    APART: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    STEPS: tl.constexpr,
    BIAS: tl.constexpr,
    SHARED: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Tap (r, s) of position (oh, ow) reads row ``oh STRIDE - PADDING + r DILATION``, and likewise the column.

    Rows of the input are APART: 1, but for the gradient of a strided convolution, between whose rows there are zeros.
    """
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    TAPS_AT_ONCE: tl.constexpr = BK // CHANNELS
    M: tl.constexpr = 1 if CHANNELS_LAST else 0  # the dimension of positions in tiles of the output
    N: tl.constexpr = 1 - M
    DTYPE: tl.constexpr = x.dtype.element_ty
    tiles_across = tl.cdiv(columns, BN)
    m = tl.program_id(0) // tiles_across * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles_across * BN + tl.arange(0, BN)
    b = divided(m, area_multiplier, area_shift)
    row = divided(m - b * area, width_multiplier, width_shift)
    top = row * STRIDE[0] - PADDING[0]
    left = (m - b * area - row * width) * STRIDE[1] - PADDING[1]
    b = b.to(INDEX)
    corner = b * strides[0]
    if APART[0] * APART[1] == 1:
        corner += top.to(INDEX) * strides[2] + left.to(INDEX) * strides[3]
    corner = along(corner, M)
    top = along(tl.where(m < positions, top, NOWHERE), M)
    left = along(left, M)

    if STEPS == ALONG_N:
        s = tl.load(step + n, mask=n < columns, other=1.0)
        bad = tl.max(is_bad_step(s).to(tl.int32))
        s = along(s, N)
    else:
        s = tl.load(step)
        bad = is_bad_step(s).to(tl.int32)
    if bad > 0:
        tl.store(flags, 1)
    inverse = reciprocal(s)

    SHAPE: tl.constexpr = (BN, BM) if CHANNELS_LAST else (BM, BN)
    student, teacher = tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE, tl.float32)
    first_channel = 0
    first_tap = 0
    for _ in range(tl.cdiv(channels, CHANNELS) * tl.cdiv(TAPS, TAPS_AT_ONCE)):
        k = tl.arange(0, BK)
        if TAPS_AT_ONCE == 1:  # the same tap for all of k, which the compiler would not see otherwise
            c, tap = first_channel + k, first_tap + tl.zeros_like(k)
        else:
            c, tap = first_channel + k % CHANNELS, first_tap + k // CHANNELS
        exists = c < channels
        if TAPS % TAPS_AT_ONCE != 0:
            exists = exists & (tap < TAPS)
        r, t = tap // KERNEL[1], tap % KERNEL[1]
        down, right = r * DILATION[0], t * DILATION[1]
        # as unsigned numbers, those before the first row or column are large
        y = (top + along(down, N)).to(tl.uint32)
        z = (left + along(right, N)).to(tl.uint32)
        inside = (y < height_in * APART[0]) & (z < width_in * APART[1]) & along(exists, N)
        if APART[0] * APART[1] == 1:
            place = c.to(INDEX) * strides[1] + down.to(INDEX) * strides[2] + right.to(INDEX) * strides[3]
            place = corner + along(place, N)
        else:
            inside = inside & (y % APART[0] == 0) & (z % APART[1] == 0)
            place = (y // APART[0]).to(INDEX) * strides[2] + (z // APART[1]).to(INDEX) * strides[3]
            place += corner + along(c.to(INDEX) * strides[1], N)
        x_student = tl.load(x + place, mask=inside, other=0.0)  # [BM, BK]
        x_teacher = tl.load(x + teacher_x + place, mask=inside, other=0.0)

        place = along(c * weight_strides[1] + r * weight_strides[2] + t * weight_strides[3], M)
        place += along(n * weight_strides[0], N)
        inside = along(exists, M) & along(n < columns, N)
        w = tl.load(weight + place, mask=inside, other=0.0)  # [BK, BN]
        kept = tl.load(mask + place, mask=inside, other=0)
        if STEPS == ALONG_K:
            s_k = along(tl.load(step + c, mask=exists, other=1.0), M)
            wbar = quantized(w, kept, reciprocal(s_k), largest) * s_k
            q = wbar
        else:
            q = quantized(w, kept, inverse, largest)  # integers, exact in every dtype; S comes after the sum
            wbar = q * s
        full = tl.where(kept, wbar, w.to(tl.float32)) if SHARED else w
        student = _product(x_student, q.to(DTYPE), student, CHANNELS_LAST, PRECISION)
        teacher = _product(x_teacher, full.to(DTYPE), teacher, CHANNELS_LAST, PRECISION)

        first_channel += CHANNELS
        done = first_channel >= channels
        first_channel = tl.where(done, 0, first_channel)
        first_tap = tl.where(done, first_tap + TAPS_AT_ONCE, first_tap)

    if STEPS != ALONG_K:
        student *= s
    if BIAS:
        shift = along(tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32), N)
        student += shift
        teacher += shift
    if CHANNELS_LAST:
        place = along(m.to(INDEX) * columns, M) + along(n, N)
    else:
        place = along(m + b * (columns - 1) * area, M) + along(n.to(INDEX) * area, N)
    inside = along(m < positions, M) & along(n < columns, N)
    tl.store(out + place, student.to(DTYPE), mask=inside)  # [BM, BN]
    tl.store(out + teacher_out + place, teacher.to(DTYPE), mask=inside)


def reciprocal_of(d: int) -> tuple[int, int]:
    """What :func:`divided` multiplies by and then shifts by to divide by ``d``: exact below 2^31."""
    shift = (d - 1).bit_length()
    return -(-(2 ** (31 + shift)) // d), shift


def is_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether the output of a convolution is, as torch's on a GPU are: if one of the two is."""
    return bool(torch._C._conv_determine_backend_memory_format(x, weight, CUDNN) == torch.channels_last)


def index_type(*tensors: Tensor) -> tl.dtype:
    """For offsets into the tensors: 32 bits where they suffice, which saves registers."""
    spans = (sum((n - 1) * apart for n, apart in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    return tl.int32 if max(spans) < MOST_OFFSETS else tl.int64


def convolve(
    x: Tensor,
    out: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    apart: Sequence[int],
    transposed: bool,
    shared: bool,
    choice: dict[str, int] | None,
) -> Tensor:
    """Launch the kernel that writes ``out [2B, N, ...]``, which is dense in one of the two layouts, and give it.

    ``x [2B, K, ...]``; ``weight`` is ``[N, K, ...]``, or ``[K, N, ...]`` if ``transposed``. ``choice`` replaces
    launch.convolution.
    """
    if out.numel() == 0:
        return out
    weight, step = operands.dense(weight), operands.flat_steps(step)
    channels, columns = x.shape[1], out.shape[1]
    height, width = out.shape[2:]
    positions = x.shape[0] // 2 * height * width
    kernel = tuple(weight.shape[2:])
    over_n, over_k, *over_taps = weight.stride()
    if transposed:
        over_n, over_k = over_k, over_n
    precision = launch.fp32_products(convolution=True)
    on_cores = x.dtype == torch.float32 and precision == "ieee"
    choice = choice or launch.convolution(columns, channels, kernel[0] * kernel[1], on_cores)
    steps = (ALONG_K if transposed else ALONG_N) if step.numel() > 1 else ONE_STEP
    with operands.on(x):
        _convolve[(triton.cdiv(positions, choice["BM"]) * triton.cdiv(columns, choice["BN"]),)](
            x,
            weight,
            operands.relaid(mask, weight),
            step,
            step if bias is None else bias.contiguous(),
            out,
            operands.error_flags(x.device),
            positions,
            *reciprocal_of(height * width),
            *reciprocal_of(width),
            height * width,
            width,
            *x.shape[2:],
            channels,
            columns,
            x.stride(),
            (over_n, over_k, *over_taps),
            x.shape[0] // 2 * x.stride(0),
            x.shape[0] // 2 * out.stride(0),
            float(levels(bits)),
            KERNEL=kernel,
            STRIDE=tuple(stride),
            PADDING=tuple(padding),
            DILATION=tuple(dilation),
            APART=tuple(apart),
            CHANNELS_LAST=not out.is_contiguous(),
            STEPS=steps,
            BIAS=bias is not None,
            SHARED=shared,
            INDEX=index_type(x, out),
            PRECISION=precision,
            enable_fp_fusion=False,
            **choice,
        )
    return out


def empty_images(shape: Sequence[int], like: Tensor, weight: Tensor) -> Tensor:
    """Memory for images in the dtype of ``like``, in the layout that torch's convolution of it would give."""
    layout = torch.channels_last if is_channels_last(like, weight) else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=layout)


def dual_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shared: bool,
    choice: dict[str, int] | None = None,
) -> Tensor:
    """Student's convolution of the first half of ``x [2B, C, H, W]``, the teacher's of the second; ``groups`` is 1.

    ``weight [O, C, kh, kw]``; strides of both are any. Products are made in x's dtype, in which the result
    ``[2B, O, OH, OW]`` is too, and summed in fp32. The student multiplies by integers, and its sums by S.
    """
    image = operands.convolved_size(x, weight, stride, padding, dilation)
    if groups != 1 or min(image) < 1:
        raise ValueError(
            f"expected groups 1, got {groups}, and a kernel {tuple(weight.shape[2:])} with dilation {tuple(dilation)} "
            f"that fits into the image {tuple(x.shape[2:])} with padding {tuple(padding)}; use torch's convolution"
        )
    out = empty_images((x.shape[0], weight.shape[0], *image), x, weight)
    layer = (weight, mask, step, bits, bias)
    return convolve(x, out, *layer, stride, padding, dilation, (1, 1), False, shared, choice)
