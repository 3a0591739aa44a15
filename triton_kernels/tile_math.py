"""What kernels do to tiles: the quantizer's arithmetic, bit for bit that of :mod:`pqk_fast.reference`."""

import triton
import triton.language as tl

# Adding and taking away 1.5 * 2^23 rounds |v| <= 2^22 half to even, and gives +0 for zeros of either sign. Kernels that
# use it are compiled with enable_fp_fusion=False: a multiply that is fused with the addition would change ties.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def pick(pointers, index, COUNT: tl.constexpr):
    """``pointers[index]`` of a tuple with COUNT entries: branches past eights, then selects."""
    chosen = pointers[0]
    for first in tl.static_range(0, COUNT, 8):
        if index >= first:
            for i in tl.static_range(first, first + 8):
                if i < COUNT:
                    chosen = tl.where(index >= i, pointers[i], chosen)
    return chosen


@triton.jit
def read(pointers, inside, FULL: tl.constexpr):
    """A tile; where it is not ``inside`` (unless it is FULL, which needs no test at each element) zeros."""
    return tl.load(pointers) if FULL else tl.load(pointers, mask=inside, other=0)


@triton.jit
def write(pointers, values, inside, FULL: tl.constexpr):
    """Store a tile, rounded to the type that it points to."""
    if FULL:
        tl.store(pointers, values.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def reciprocal(step):
    """``1 / S``, correctly rounded (``/`` is not)."""
    return tl.math.div_rn(1.0, step)


@triton.jit
def scaled(weight, kept, inverse):
    """``w M / S`` in fp32 before clipping: a selection and one product."""
    return tl.where(kept, weight.to(tl.float32), 0.0) * inverse


@triton.jit
def clip(v, largest):
    """Clip to ``-Q .. Q``; NaN stays NaN."""
    return tl.clamp(v, -largest, largest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rounded(v):
    """Round half to even, never to -0; ``v`` must have been clipped (the sum could be fused with a product)."""
    return (v + ROUNDING) - ROUNDING


@triton.jit
def quantized(weight, kept, inverse, largest):
    """Eq. 2: ``q = round(clip(w M / S))`` as fp32 integers. ``inverse`` = 1 / S, ``largest`` = Q; they broadcast."""
    return rounded(clip(scaled(weight, kept, inverse), largest))


@triton.jit
def is_bad_step(step):
    """True where a step size is not a positive, finite number."""
    return (step != step) | (step <= 0.0) | (step == float("inf"))
