// What kernels share: loads, stores and conversions. Included by for_each_isa.h into one namespace an instruction set:
// no include guard, no includes.
//
// bf16 and fp16 go through integer arithmetic: the same bits on every CPU, no instruction that one of them lacks.

template <class V>
inline V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store_as(void* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bf16_to_f32(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

// Round to nearest, ties to even; NaN becomes 0x7fc0, as in torch.
inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float f16_to_f32(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  // Exponent 0 (zero, denormals): the mantissa as an integer times 2^-24, exactly. Exponent 31: infinity, NaN.
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
  const uint32_t normal = (rest << 13) + ((127u - 15u) << 23);
  const uint32_t special = (rest << 13) | 0x7f800000u;
  const uint32_t large = rest >= 0x7c00u ? special : normal;
  return float_of((rest < 0x0400u ? small : large) | sign);
}

// Round to nearest, ties to even; too large becomes infinity, NaN stays a quiet NaN.
inline uint16_t f32_to_f16(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  // Below 2^-14 the result is denormal: adding .5 puts its last bit (2^-24) where the float's last bit is.
  const uint32_t small = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (rest - ((127u - 15u) << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const uint32_t special = rest > 0x7f800000u ? 0x7e00u | ((rest >> 13) & 0x1ffu) : 0x7c00u;
  const uint32_t finite = rest < 0x38800000u ? small : normal;
  return static_cast<uint16_t>((rest >= 0x47800000u ? special : finite) | sign);
}

inline void widen(const void* from, Type type, float* __restrict to, int64_t n) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  if (type == Type::bf16)
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_f32(half[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = f16_to_f32(half[i]);
}

inline void narrow(const float* __restrict from, void* to, Type type, int64_t n) {
  uint16_t* half = static_cast<uint16_t*>(to);
  if (type == Type::bf16)
    for (int64_t i = 0; i < n; ++i) half[i] = f32_to_bf16(from[i]);
  else
    for (int64_t i = 0; i < n; ++i) half[i] = f32_to_f16(from[i]);
}

// The values as fp32: themselves, or widened into `room`.
inline const float* as_f32(const void* from, Type type, float* room, int64_t n) {
  if (type == Type::f32) return static_cast<const float*>(from);
  widen(from, type, room, n);
  return room;
}

// Writes past the caches where the target can, so that no line is read before it is overwritten. `to` is 64-byte
// aligned, n a multiple of 16.
inline void stream(const float* from, float* to, int64_t n) {
#if PQK_ISA == 512
  for (int64_t i = 0; i < n; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
  _mm_sfence();  // such stores may otherwise be seen after later ones
#elif PQK_ISA == 2
  for (int64_t i = 0; i < n; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
  _mm_sfence();
#else
  std::memcpy(to, from, n * sizeof(float));
#endif
}

// Element-wise kernels work in pieces of as many values, which stay in the first-level cache.
constexpr int64_t PIECE = 512;

// Asks for the piece that comes two later, from its first value to its last. A loop that stops to sum or to convert
// leaves the memory idle otherwise: 16 M weights, forward and backward, took 15 ms instead of 8.
inline void prefetch(const void* values, int64_t first, int64_t bytes_each) {
  const char* from = static_cast<const char*>(values) + (first + 2 * PIECE) * bytes_each;
  for (int64_t i = 0; i < PIECE * bytes_each; i += 64) __builtin_prefetch(from + i);
}
