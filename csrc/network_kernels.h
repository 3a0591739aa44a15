// The loops of network.cpp over one plane, once for each instruction set.

// to may be x or y.
void plane_affine(const float* x, int64_t n, float scale, float shift, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] * scale + shift;
}

void plane_relu(const float* x, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] <= 0.0f ? 0.0f : x[i];  // NaN stays NaN
}

void plane_add(const float* x, const float* y, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] + y[i];
}

float plane_sum(const float* x, int64_t rows, int64_t columns, int64_t pitch) {
  constexpr int64_t LANES = 16;  // sums that do not wait for each other
  float sums[LANES]{};
  for (int64_t y = 0; y < rows; ++y, x += pitch) {
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES)
      for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += x[i + lane];
    for (int64_t lane = 0; i < columns; ++lane, ++i) sums[lane] += x[i];
  }
  float sum = 0.0f;
  for (const float part : sums) sum += part;
  return sum;
}

namespace {

struct Sum {
  float operator()(float a, float b) const { return a + b; }
};
struct Largest {
  float operator()(float a, float b) const { return b > a || b != b ? b : a; }  // NaN stays NaN
};

// to[i] = x[i] and what comes `apart` after it, `count` values in all.
template <class Combine>
inline void combine(const float* x, int64_t apart, int64_t count, int64_t n, float* to) {
  const Combine both{};
  int64_t i = 0;
  if (count == 2)
    for (; i < n; ++i) to[i] = both(x[i], x[i + apart]);
  else if (count == 3)
    for (; i < n; ++i) to[i] = both(both(x[i], x[i + apart]), x[i + 2 * apart]);
  else if (count == 4)
    for (; i < n; ++i) to[i] = both(both(both(x[i], x[i + apart]), x[i + 2 * apart]), x[i + 3 * apart]);
  else {
    std::memmove(to, x, n * sizeof(float));
    for (int64_t k = 1; k < count; ++k)
      for (i = 0; i < n; ++i) to[i] = both(to[i], x[i + k * apart]);
  }
}

// Rows of every window first, then columns of all rows as if they were one.
template <class Combine>
inline void pool_windows(const float* x, int64_t rows, int64_t columns, int64_t pitch, const PoolSettings& s,
                         int64_t out_rows, int64_t padded, float outside, float* lines, float* made) {
  for (int64_t oy = 0; oy < out_rows; ++oy) {
    const int64_t above = oy * s.stride_height - s.padding_height;
    const int64_t top = std::max<int64_t>(above, 0), bottom = std::min(above + s.kernel_height, rows);
    float* line = lines + oy * padded;
    std::fill(line, line + s.padding_width, outside);
    combine<Combine>(x + top * pitch, pitch, bottom - top, columns, line + s.padding_width);
    std::fill(line + s.padding_width + columns, line + padded, outside);
  }
  combine<Combine>(lines, 1, s.kernel_width, out_rows * padded - s.kernel_width + 1, made);
}

}  // namespace

// `scratch` has room for pool_scratch() values.
void plane_pool(const float* x, int64_t rows, int64_t columns, int64_t pitch, const PoolSettings& s, float* scratch,
                int64_t out_rows, int64_t out_columns, int64_t out_pitch, float* out) {
  const int64_t padded = pool_row(s, columns, out_columns);
  const float* made = scratch + out_rows * padded;
  if (s.largest)
    pool_windows<Largest>(x, rows, columns, pitch, s, out_rows, padded, -std::numeric_limits<float>::infinity(), scratch,
                          scratch + out_rows * padded);
  else
    pool_windows<Sum>(x, rows, columns, pitch, s, out_rows, padded, 0.0f, scratch, scratch + out_rows * padded);
  int64_t last_count = 1;
  float factor = 1.0f;
  for (int64_t oy = 0; oy < out_rows; ++oy, out += out_pitch, made += padded) {
    const int64_t above = oy * s.stride_height - s.padding_height, below = above + s.kernel_height;
    const int64_t high = s.count_padding ? std::min(below, rows + s.padding_height) - above
                                         : std::min(below, rows) - std::max<int64_t>(above, 0);
    for (int64_t ox = 0; ox < out_columns; ++ox) {
      const int64_t left = ox * s.stride_width - s.padding_width, right = left + s.kernel_width;
      const int64_t wide = s.count_padding ? std::min(right, columns + s.padding_width) - left
                                           : std::min(right, columns) - std::max<int64_t>(left, 0);
      const int64_t count = s.largest ? 1 : high * wide;
      if (count != last_count) factor = 1.0f / static_cast<float>(last_count = count);
      out[ox] = made[ox * s.stride_width] * factor;
    }
  }
}
