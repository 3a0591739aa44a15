// Masked fake-quantization and its gradients on raw memory; pqk_fast/reference.py is the definition.
//
// Every layer is a matrix [rows, columns] of contiguous values: one row for one step size a tensor, C rows for one a
// channel. All arithmetic is in fp32, in the reference's order, so that results equal it bit for bit; low-precision
// inputs are widened exactly and results rounded once.
#pragma once
#include <cstdint>

#include "simd.h"

namespace pqk {

struct FakeQuantLayer {
  const void* weight;
  Type weight_type;
  const uint8_t* mask;  // 0 or 1
  const float* step;    // [rows]
  int64_t rows, columns;
  int bits;
  void* out;
  Type out_type;
};

// out = S round(clip(M w / S, -Q, Q)), Eqs 2-4, for all layers in one parallel pass.
void fake_quant(const FakeQuantLayer* layers, int64_t count);

struct FakeQuantGradLayer {
  const void* grad;
  Type grad_type;
  const void* weight;
  Type weight_type;
  const uint8_t* mask;
  const float* step;
  int64_t rows, columns;
  int bits;
  void* grad_weight;  // of the weight's type; null: not wanted
  float* grad_step;   // [rows]; null: not wanted
};

// Straight-through gradients of the weight and the gradient of the step size. The latter's terms are exactly the
// reference's; they are summed in fp64, in blocks of fixed size, so that the number of threads changes no bit. The
// result errs by less than 2^-21 of the sum of |g| (|round(v)| + |v|): the fp32 roundings of v, of the slope, of its
// product with g and of the result.
void fake_quant_backward(const FakeQuantGradLayer* layers, int64_t count, bool clipped, bool mask_gradients);

}  // namespace pqk
