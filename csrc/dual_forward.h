// The weight gradient of phase 2 in one pass over raw memory; pqk_fast/reference.py is the definition.
#pragma once
#include <cstdint>

#include "simd.h"

namespace pqk {

// dw = M g_S + (1 - M) g_T (Eqs 11 and 12): the student's gradient where a weight is kept (and, if `clipped`, not
// clipped: |w / S| <= Q), the full net's where it is pruned. A matrix [rows, columns], one step a row.
struct SplitGradient {
  const void* grad_student;
  const void* grad_teacher;
  Type student_type, teacher_type;
  const uint8_t* mask;
  const void* weight;  // read only if clipped
  Type weight_type;
  const float* step;  // [rows], read only if clipped
  int64_t rows, columns;
  int bits;
  bool clipped;
  void* grad_weight;  // of the weight's type
};

void split_gradient(const SplitGradient& layer);

}  // namespace pqk
