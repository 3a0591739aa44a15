// Sparse convolution for inference on raw memory: every weight that is not zero is one multiply-add over all positions
// of its output's plane, with the sums in registers.
//
// The input is copied once into padded planes, so that a tap, a weight's place in them, needs no borders: the input of
// the position p of an output is at offset + p, in rows as long as the padded input's. With a stride, the padded input
// is dealt out to stride_height x stride_width planes (its phases), each of which is then read without one.
#pragma once
#include <cstdint>

namespace pqk {

struct SparseShape {
  int64_t batch, channels, height, width;  // of the input
  int64_t outputs;                         // channels of the output
  int64_t kernel_height, kernel_width;     // as far as it reaches: dilation * (size - 1) + 1
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;

  int64_t out_height() const { return (height + 2 * padding_height - kernel_height) / stride_height + 1; }
  int64_t out_width() const { return (width + 2 * padding_width - kernel_width) / stride_width + 1; }
  int64_t phases() const { return stride_height * stride_width; }
  int64_t phase_rows() const { return (height + 2 * padding_height + stride_height - 1) / stride_height; }
  int64_t pitch() const { return (width + 2 * padding_width + stride_width - 1) / stride_width; }
  int64_t phase_size() const { return phase_rows() * pitch(); }
  int64_t padded_size() const { return channels * phases() * phase_size(); }         // of one image
  int64_t positions() const { return (out_height() - 1) * pitch() + out_width(); }   // the last one, and those before
};

struct Taps {
  const int32_t* first;   // [outputs + 1]: where each output's begin
  const int32_t* offset;  // [taps]: in 0 .. padded_size - positions
  const float* value;     // [taps]
};

// out [batch, outputs, out_height, out_width] = the convolution of x [batch, channels, height, width], plus bias (or
// null), and with `relu` not below 0. Memory is taken for one padded image a thread.
void sparse_conv2d(const float* x, const SparseShape& shape, const Taps& taps, const float* bias, bool relu, float* out);

// sums[p] = scale * (sum over the taps of one output of value * padded[offset + p]) + shift, with `relu` not below 0, for
// p < length. Up to sum_margin() values past those are read and written too.
void sum_plane(const float* padded, const Taps& taps, int64_t output, int64_t length, float scale, float shift,
               bool relu, float* sums);
int64_t sum_margin();

}  // namespace pqk
