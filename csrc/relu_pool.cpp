#include "relu_pool.h"

#include <algorithm>

#include "blocks.h"

#define PQK_KERNELS "relu_pool_kernels.h"
#include "for_each_isa.h"

namespace pqk {

// Calls run(first value of x, first pooled value, whether it is the last of an image) for every row of windows.
template <class Run>
static void for_each_row(const PoolShape& shape, const Run& run) {
  const int64_t rows = shape.pooled_height(), line = shape.width * shape.channels;
  const int64_t values = std::max<int64_t>(1, shape.kernel_height * line);
  parallel_for(shape.batch * rows, std::max<int64_t>(1, SERIAL / values), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      run((i / rows * shape.height + i % rows * shape.kernel_height) * line,
          i * shape.pooled_width() * shape.channels, i % rows == rows - 1);
  });
}

void relu_avg_pool(const float* x, const PoolShape& shape, float* out) {
  for_each_row(shape, [&](int64_t first, int64_t pooled, bool) {
    PQK_DISPATCH(relu_avg_pool_row, x + first, shape, out + pooled);
  });
}

void relu_avg_pool_backward(const float* grad, const float* x, const PoolShape& shape, float* grad_x) {
  const int64_t line = shape.width * shape.channels, used = shape.kernel_height * line;
  const int64_t rest = shape.height % shape.kernel_height * line;
  for_each_row(shape, [&](int64_t first, int64_t pooled, bool last) {
    PQK_DISPATCH(relu_avg_pool_backward_row, grad + pooled, x + first, shape, grad_x + first);
    if (last) std::fill_n(grad_x + first + used, rest, 0.0f);
  });
}

}  // namespace pqk
