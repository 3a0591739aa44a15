// The loops of sparse_infer.cpp, once for each instruction set.

namespace {

#if PQK_ISA == 512
typedef float Lanes __attribute__((vector_size(64)));
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return reinterpret_cast<Lanes>(_mm512_fmadd_ps(a, b, c)); }
constexpr int REGISTERS = 24;  // for sums, of 32
#elif PQK_ISA == 2
typedef float Lanes __attribute__((vector_size(32)));
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return reinterpret_cast<Lanes>(_mm256_fmadd_ps(a, b, c)); }
constexpr int REGISTERS = 12;  // of 16
#else
typedef float Lanes __attribute__((vector_size(16)));
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
constexpr int REGISTERS = 12;
#endif
constexpr int64_t WIDTH = sizeof(Lanes) / sizeof(float);

// What becomes of a sum.
struct Finish {
  float scale, shift;
  bool relu;

  Lanes operator()(Lanes sum) const {
    const Lanes made = multiply_add(sum, Lanes{} + scale, Lanes{} + shift);
    return relu ? (made <= 0.0f ? Lanes{} : made) : made;  // NaN stays NaN
  }
};

// COUNT vectors of sums over the taps.
template <int COUNT>
inline void sum_taps(const float* from, const int32_t* offset, const float* value, int64_t taps, Finish finish, float* to) {
  Lanes sums[COUNT]{};
  for (int64_t t = 0; t < taps; ++t) {
    const Lanes weight = Lanes{} + value[t];
    const float* run = from + offset[t];
#pragma GCC unroll 24
    for (int i = 0; i < COUNT; ++i) sums[i] = multiply_add(weight, load_as<Lanes>(run + i * WIDTH), sums[i]);
  }
#pragma GCC unroll 24
  for (int i = 0; i < COUNT; ++i) store_as(to + i * WIDTH, finish(sums[i]));
}

// The smallest COUNT that reaches over `length` values.
template <int COUNT>
inline void sum_rest(int64_t length, const float* from, const int32_t* offset, const float* value, int64_t taps,
                     Finish finish, float* to) {
  if constexpr (COUNT < REGISTERS) {
    if (length > COUNT * WIDTH) return sum_rest<COUNT + 1>(length, from, offset, value, taps, finish, to);
  }
  sum_taps<COUNT>(from, offset, value, taps, finish, to);
}

}  // namespace

// How far sparse_plane reads and writes past the last position.
int64_t sparse_margin() { return REGISTERS * WIDTH; }

// sums[p] = scale * (sum over the taps of value * padded[offset + p]) + shift, with `relu` not below 0, for p < length.
void sparse_plane(const float* padded, const int32_t* offset, const float* value, int64_t taps, int64_t length,
                  float scale, float shift, bool relu, float* sums) {
  constexpr int64_t tile = REGISTERS * WIDTH;
  const Finish finish{scale, shift, relu};
  int64_t p = 0;
  for (; p + tile <= length; p += tile) sum_taps<REGISTERS>(padded + p, offset, value, taps, finish, sums + p);
  if (p < length) sum_rest<1>(length - p, padded + p, offset, value, taps, finish, sums + p);
}
