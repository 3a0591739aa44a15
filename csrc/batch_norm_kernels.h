// The loops of batch_norm.cpp, once for each instruction set.

namespace {

// Adds the moments of T tiles about `pivot` to those of each place in a tile. The constant inner loops are unrolled: T
// tiles share the loads of the pivot and of the sums.
template <int T>
inline void add_moments(const float* __restrict x, int64_t tile, const float* __restrict pivot, float* __restrict first,
                        float* __restrict second, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float a = x[i] - pivot[i], b = a * a;
#pragma GCC unroll 8
    for (int t = 1; t < T; ++t) {
      const float d = x[i + t * tile] - pivot[i];
      a += d;
      b += d * d;
    }
    first[i] += a;
    second[i] += b;
  }
}

// The same for the gradient and for its product with x - mean.
template <int T>
inline void add_products(const float* __restrict grad, const float* __restrict x, int64_t tile,
                         const float* __restrict mean, float* __restrict first, float* __restrict second, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float a = grad[i], b = grad[i] * (x[i] - mean[i]);
#pragma GCC unroll 8
    for (int t = 1; t < T; ++t) {
      const float g = grad[i + t * tile];
      a += g;
      b += g * (x[i + t * tile] - mean[i]);
    }
    first[i] += a;
    second[i] += b;
  }
}

inline void add(float* __restrict to, const float* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// Leaves the sum of `rows` rows, a power of two, in the first one.
inline void fold(float* values, int64_t rows, int64_t channels) {
  while (rows > 1) {
    rows /= 2;
    add(values, values + rows * channels, rows * channels);
  }
}

// The mean of a run's first rows, four tiles if it has as many, for each place in a tile. The squares about it are at
// most RUN / 4 + 1 times those about the mean of the run, however odd the first rows are, and hardly more in common.
inline void find_pivot(const float* __restrict x, int64_t rows, const BatchNormTile& tile, float* __restrict pivot) {
  const int64_t n = tile.values;
  int64_t kept = tile.rows, used = 4 * tile.rows;
  if (rows >= used) {
    for (int64_t i = 0; i < n; ++i) pivot[i] = (x[i] + x[i + n]) + (x[i + 2 * n] + x[i + 3 * n]);
  } else {
    while (kept > rows) kept /= 2;
    used = kept;
    std::memcpy(pivot, x, kept * tile.channels * sizeof(float));
  }
  fold(pivot, kept, tile.channels);
  const float inverse = 1.0f / static_cast<float>(used);
  for (int64_t c = 0; c < tile.channels; ++c) pivot[c] *= inverse;
  repeat(pivot, tile);
}

inline void normalize(const float* __restrict x, const float* __restrict mean, const float* __restrict scale,
                      const float* __restrict shift, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean[i]) * scale[i] + shift[i];
}

inline void grad_of_x(const float* __restrict grad, const float* __restrict x, const float* __restrict mean,
                      const float* __restrict mean_grad, const float* __restrict slope, const float* __restrict scale,
                      float* __restrict grad_x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad_x[i] = (grad[i] - mean_grad[i] - (x[i] - mean[i]) * slope[i]) * scale[i];
}

// Calls several(first value) for every TILES whole tiles of n values, then one(first value, count) for the others.
template <class Several, class One>
inline void for_each_tile(int64_t n, int64_t tile, const Several& several, const One& one) {
  int64_t i = 0;
  for (; n - i >= TILES * tile; i += TILES * tile) several(i);
  for (; i < n; i += tile) one(i, n - i < tile ? n - i : tile);
}

}  // namespace

// Adds sum(x - origin) and sum((x - origin)^2) to sums[c] and sums[channels + c]. `room` is for three tiles.
void batch_norm_moments(const BatchNormTile& tile, const float* x, int64_t rows, const float* origin, float* room,
                        double* sums) {
  float *pivot = room, *first = room + tile.stride, *second = first + tile.stride;
  const int64_t run = RUN * tile.rows;
  for (int64_t row = 0; row < rows; row += run) {
    const int64_t count = rows - row < run ? rows - row : run;
    const float* from = x + row * tile.channels;
    find_pivot(from, count, tile, pivot);
    std::memset(first, 0, 2 * tile.stride * sizeof(float));
    for_each_tile(
        count * tile.channels, tile.values,
        [&](int64_t i) { add_moments<TILES>(from + i, tile.values, pivot, first, second, tile.values); },
        [&](int64_t i, int64_t n) { add_moments<1>(from + i, 0, pivot, first, second, n); });
    fold(first, tile.rows, tile.channels);
    fold(second, tile.rows, tile.channels);
    const double each = static_cast<double>(count);
    for (int64_t c = 0; c < tile.channels; ++c) {
      const double moved = static_cast<double>(pivot[c]) - origin[c];
      sums[c] += first[c] + each * moved;
      sums[tile.channels + c] += second[c] + moved * (2.0 * first[c] + each * moved);
    }
  }
}

// Adds sum(g) and sum(g (x - mean)). `room` is for two tiles; `mean` is repeated over one.
void batch_norm_products(const BatchNormTile& tile, const float* grad, const float* x, int64_t rows, const float* mean,
                         float* room, double* sums) {
  float *first = room, *second = room + tile.stride;
  const int64_t run = RUN * tile.rows;
  for (int64_t row = 0; row < rows; row += run) {
    const int64_t count = rows - row < run ? rows - row : run;
    const float *g = grad + row * tile.channels, *from = x + row * tile.channels;
    std::memset(first, 0, 2 * tile.stride * sizeof(float));
    for_each_tile(
        count * tile.channels, tile.values,
        [&](int64_t i) { add_products<TILES>(g + i, from + i, tile.values, mean, first, second, tile.values); },
        [&](int64_t i, int64_t n) { add_products<1>(g + i, from + i, 0, mean, first, second, n); });
    fold(first, tile.rows, tile.channels);
    fold(second, tile.rows, tile.channels);
    for (int64_t c = 0; c < tile.channels; ++c) {
      sums[c] += first[c];
      sums[tile.channels + c] += second[c];
    }
  }
}

// out = (x - mean) * scale + shift for `count` values from the first of a tile on. `tables` holds one tile of each.
void batch_norm_normalize(const BatchNormTile& tile, const float* tables, const float* x, float* out, int64_t count) {
  const float *mean = tables, *scale = mean + tile.stride, *shift = scale + tile.stride;
  for (int64_t i = 0; i < count; i += tile.values)
    normalize(x + i, mean, scale, shift, out + i, count - i < tile.values ? count - i : tile.values);
}

// grad_x = (g - mean_grad - (x - mean) * slope) * scale, likewise.
void batch_norm_grad_of_x(const BatchNormTile& tile, const float* tables, const float* grad, const float* x,
                          float* grad_x, int64_t count) {
  const float *mean = tables, *mean_grad = mean + tile.stride, *slope = mean_grad + tile.stride;
  const float* scale = slope + tile.stride;
  for (int64_t i = 0; i < count; i += tile.values)
    grad_of_x(grad + i, x + i, mean, mean_grad, slope, scale, grad_x + i,
              count - i < tile.values ? count - i : tile.values);
}
