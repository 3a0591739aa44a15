// The loops of relu_pool.cpp, once for each instruction set.

namespace {

typedef float Lanes4 __attribute__((vector_size(16)));
typedef float Lanes8 __attribute__((vector_size(32)));
typedef float Lanes16 __attribute__((vector_size(64)));

// Calls run with the widest vector that the target has and the channels fill.
template <class Run>
inline void by_lanes(int64_t channels, const Run& run) {
#if PQK_ISA == 512
  if (channels >= 16) return run(Lanes16{});
#endif
#if PQK_ISA > 0
  if (channels >= 8) return run(Lanes8{});
#endif
  if (channels >= 4) return run(Lanes4{});
  run(0.0f);
}

// The channels in groups as wide as V, of which the last one ends with them: some may be done twice.
template <class V, class Run>
inline void for_each_group(int64_t channels, const Run& run) {
  constexpr int64_t width = sizeof(V) / sizeof(float);
  for (int64_t c = 0; c < channels - width; c += width) run(c);
  run(channels - width);
}

// Asks for the i-th window's share of the next row of windows, in the order of memory. That of the windows, a few lines
// of an image by turns, leaves the memory idle otherwise: 20 MB took 2.0 ms instead of 0.9.
template <int WRITTEN>
inline void prefetch_next(const float* row, const PoolShape& shape, int64_t i) {
  const int64_t share = shape.kernel_height * shape.kernel_width * shape.channels;
  const float* from = row + shape.kernel_height * shape.width * shape.channels + i * share;
  for (int64_t k = 0; k < share; k += 16) __builtin_prefetch(from + k, WRITTEN);
}

// The sum begins with 0 and takes one line after the other, as torch's does.
template <class V>
inline void pool_window(const float* x, const PoolShape& shape, float* out) {
  const V zero{}, size = zero + static_cast<float>(shape.kernel_height * shape.kernel_width);
  for_each_group<V>(shape.channels, [&](int64_t c) {
    V sum{};
    for (int64_t i = 0; i < shape.kernel_height; ++i)
      for (int64_t j = 0; j < shape.kernel_width; ++j) {
        const V value = load_as<V>(x + (i * shape.width + j) * shape.channels + c);
        sum += value <= zero ? zero : value;
      }
    const V mean = sum / size;
    store_as(out + c, mean);
  });
}

template <class V>
inline void spread_window(const float* grad, const float* x, const PoolShape& shape, float* grad_x) {
  const V zero{}, size = zero + static_cast<float>(shape.kernel_height * shape.kernel_width);
  for_each_group<V>(shape.channels, [&](int64_t c) {
    const V share = load_as<V>(grad + c) / size + zero;  // torch adds it to 0: never -0
    for (int64_t i = 0; i < shape.kernel_height; ++i)
      for (int64_t j = 0; j < shape.kernel_width; ++j) {
        const int64_t at = (i * shape.width + j) * shape.channels + c;
        const V passed = load_as<V>(x + at) <= zero ? zero : share;
        store_as(grad_x + at, passed);
      }
  });
}

template <class V>
inline void pool_row(const float* x, const PoolShape& shape, float* out) {
  for (int64_t i = 0; i < shape.pooled_width(); ++i) {
    prefetch_next<0>(x, shape, i);
    pool_window<V>(x + i * shape.kernel_width * shape.channels, shape, out + i * shape.channels);
  }
}

template <class V>
inline void spread_row(const float* grad, const float* x, const PoolShape& shape, float* grad_x) {
  for (int64_t i = 0; i < shape.pooled_width(); ++i) {
    prefetch_next<0>(x, shape, i);
    prefetch_next<1>(grad_x, shape, i);
    const int64_t first = i * shape.kernel_width * shape.channels;
    spread_window<V>(grad + i * shape.channels, x + first, shape, grad_x + first);
  }
}

}  // namespace

// One row of windows.
void relu_avg_pool_row(const float* x, const PoolShape& shape, float* out) {
  by_lanes(shape.channels, [&](auto lanes) { pool_row<decltype(lanes)>(x, shape, out); });
}

// Likewise, with the columns that are left out.
void relu_avg_pool_backward_row(const float* grad, const float* x, const PoolShape& shape, float* grad_x) {
  by_lanes(shape.channels, [&](auto lanes) { spread_row<decltype(lanes)>(grad, x, shape, grad_x); });
  const int64_t used = shape.pooled_width() * shape.kernel_width, rest = (shape.width - used) * shape.channels;
  for (int64_t i = 0; i < shape.kernel_height; ++i)
    std::memset(grad_x + (i * shape.width + used) * shape.channels, 0, rest * sizeof(float));
}
