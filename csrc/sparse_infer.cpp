#include "sparse_infer.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "blocks.h"

#define PQK_KERNELS "sparse_infer_kernels.h"
#include "for_each_isa.h"

namespace pqk {

// One image into its padded planes, whose borders are zero already.
static void pad_planes(const float* x, const SparseShape& shape, float* padded) {
  const int64_t size = shape.phase_size(), pitch = shape.pitch();
  for (int64_t c = 0; c < shape.channels; ++c)
    for (int64_t y = 0; y < shape.height; ++y, x += shape.width) {
      const int64_t row = y + shape.padding_height, phase = row % shape.stride_height * shape.stride_width;
      float* to = padded + (c * shape.phases() + phase) * size + row / shape.stride_height * pitch;
      if (shape.stride_width == 1) {
        std::memcpy(to + shape.padding_width, x, shape.width * sizeof(float));
        continue;
      }
      for (int64_t i = 0; i < shape.width; ++i) {
        const int64_t column = i + shape.padding_width;
        to[column % shape.stride_width * size + column / shape.stride_width] = x[i];
      }
    }
}

// The sums of one output, in rows of the padded pitch, to a plane without them.
static void finish_plane(const float* sums, const SparseShape& shape, float* out) {
  const int64_t width = shape.out_width(), pitch = shape.pitch();
  for (int64_t y = 0; y < shape.out_height(); ++y, sums += pitch, out += width)
    std::memcpy(out, sums, width * sizeof(float));
}

int64_t sum_margin() { return PQK_DISPATCH(sparse_margin, ); }

void sum_plane(const float* padded, const Taps& taps, int64_t output, int64_t length, float scale, float shift,
               bool relu, float* sums) {
  const int64_t first = taps.first[output], count = taps.first[output + 1] - first;
  PQK_DISPATCH(sparse_plane, padded, taps.offset + first, taps.value + first, count, length, scale,
               shift, relu, sums);
}

void sparse_conv2d(const float* x, const SparseShape& shape, const Taps& taps, const float* bias, bool relu,
                   float* out) {
  const int64_t length = shape.positions(), plane = shape.out_height() * shape.out_width();
  const int64_t margin = sum_margin();
  std::vector<float> padded(shape.padded_size() + margin);
  const int64_t work = taps.first[shape.outputs] / std::max<int64_t>(1, shape.outputs) * length;
  const int64_t grain = std::max<int64_t>(1, 4 * SERIAL / std::max<int64_t>(1, work));
  for (int64_t image = 0; image < shape.batch; ++image) {
    pad_planes(x + image * shape.channels * shape.height * shape.width, shape, padded.data());
    parallel_for(shape.outputs, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(length + margin);
      for (int64_t o = begin; o < end; ++o) {
        sum_plane(padded.data(), taps, o, length, 1.0f, bias ? bias[o] : 0.0f, relu, sums.data());
        finish_plane(sums.data(), shape, out + (image * shape.outputs + o) * plane);
      }
    });
  }
}

}  // namespace pqk
