// ReLU, then average pooling without overlap or padding, of channels_last activations on raw memory.
//
// x is [batch, height, width, channels], contiguous fp32; what is pooled [batch, height / kernel_height, width /
// kernel_width, channels]. Rows and columns that fill no window are left out. No output may overlap an input. The bits
// are those of torch's own two operations, and neither instruction set nor number of threads changes them.
#pragma once
#include <cstdint>

namespace pqk {

struct PoolShape {
  int64_t batch, height, width, channels;
  int64_t kernel_height, kernel_width;  // both in 1 .. height and 1 .. width

  int64_t pooled_height() const { return height / kernel_height; }
  int64_t pooled_width() const { return width / kernel_width; }
};

// out = mean over each window of max(x, 0); NaN stays NaN.
void relu_avg_pool(const float* x, const PoolShape& shape, float* out);

// grad_x = grad / size of a window where x is positive or NaN, else 0.
void relu_avg_pool_backward(const float* grad, const float* x, const PoolShape& shape, float* grad_x);

}  // namespace pqk
