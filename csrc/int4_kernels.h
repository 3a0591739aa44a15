// Packing and unpacking of one thread's values: see int4.h for the layout. Included by int4.cpp through for_each_isa.h.
//
// A block is as many values as one register has bytes. Packing puts neighbouring values of 8 bits together, then the
// results in 16 bits, then those in 32, so that each 64-bit lane has its 8 values in its low `bits` bytes; the lanes
// are then stored one after the other, each over the unused bytes of the one before. Unpacking goes the other way.
// (Vectors wider than a register go through memory in GCC 12, and narrowing by more than half is slow.)

namespace {

constexpr int64_t BLOCK = PQK_ISA == 512 ? 64 : PQK_ISA == 2 ? 32 : 16;

typedef uint8_t Bytes __attribute__((vector_size(BLOCK)));
typedef uint16_t Pairs __attribute__((vector_size(BLOCK)));
typedef uint64_t Lanes __attribute__((vector_size(BLOCK)));
typedef uint8_t HalfBytes __attribute__((vector_size(BLOCK / 2)));

// The low `bits` bits of every `width`.
constexpr uint64_t low_bits(int width, int bits) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += width) mask |= (~uint64_t{0} >> (64 - bits)) << at;
  return mask;
}

// Fields of `width` bits, of which the low `used` hold something: puts each odd one beside the even one below it.
template <int width, int used>
inline Lanes join(Lanes v) {
  constexpr uint64_t even = low_bits(2 * width, used);
  return (v & even) | ((v >> (width - used)) & (even << used));
}

template <int width, int used>
inline Lanes split(Lanes v) {
  constexpr uint64_t even = low_bits(2 * width, used);
  return (v & even) | ((v << (width - used)) & (even << width));
}

template <int bits>
inline void store_lanes(uint8_t* packed, Lanes v) {
  for (int i = 0; i < BLOCK / 8; ++i) store_as<uint64_t>(packed + i * bits, v[i]);
}

#if PQK_ISA == 512

// Where each lane begins in a load of all of them: the 16-bit words that hold it, and the bits to drop before it.
template <int bits>
struct Begin {
  uint16_t word[32];
  uint64_t shift[8];
  constexpr Begin() : word{}, shift{} {
    for (int i = 0; i < 32; ++i) word[i] = i / 4 * bits / 2 + i % 4;
    for (int i = 0; i < 8; ++i) shift[i] = i * bits % 2 * 8;
  }
};

// (Not the loop below, of which GCC makes masked loads: from memory those take 3 times as long.)
template <int bits>
inline Lanes load_lanes(const uint8_t* packed) {
  static constexpr Begin<bits> begin;
  const __m512i words = _mm512_permutexvar_epi16(load_as<__m512i>(begin.word), load_as<__m512i>(packed));
  return (Lanes)words >> load_as<Lanes>(begin.shift);
}

#else

template <int bits>
inline Lanes load_lanes(const uint8_t* packed) {
  Lanes v{};
  for (int i = 0; i < BLOCK / 8; ++i) v[i] = load_as<uint64_t>(packed + i * bits);
  return v;
}

#endif

template <int bits>
inline void pack_block(Bytes values, uint8_t* packed) {
  const Lanes pairs = join<8, bits>((Lanes)values);
  if constexpr (bits == 8)
    store_as(packed, values);
  else if constexpr (bits == 4)
    store_as(packed, __builtin_convertvector((Pairs)pairs, HalfBytes));
  else
    store_lanes<bits>(packed, join<32, 4 * bits>(join<16, 2 * bits>(pairs)));
}

template <>
inline void pack_block<1>(Bytes mask, uint8_t* packed) {
#if PQK_ISA == 512
  store_as<uint64_t>(packed, _mm512_test_epi8_mask((__m512i)mask, (__m512i)mask));
#elif PQK_ISA == 2
  store_as<uint32_t>(packed, _mm256_movemask_epi8((__m256i)(mask != 0)));
#elif defined(PQK_X86)
  store_as<uint16_t>(packed, _mm_movemask_epi8((__m128i)(mask != 0)));
#else
  const Lanes pairs = join<8, 1>((Lanes)(mask != 0));
  store_lanes<1>(packed, join<32, 4>(join<16, 2>(pairs)));
#endif
}

template <int bits>
inline Bytes unpack_block(const uint8_t* packed) {
  if constexpr (bits == 8) return load_as<Bytes>(packed);
  Lanes pairs;
  if constexpr (bits == 4)
    pairs = (Lanes)__builtin_convertvector(load_as<HalfBytes>(packed), Pairs);
  else
    pairs = split<16, 2 * bits>(split<32, 4 * bits>(load_lanes<bits>(packed)));
  const Bytes values = (Bytes)split<8, bits>(pairs);
  constexpr uint8_t sign = 1 << (bits - 1);
  return (values ^ sign) - sign;
}

template <>
inline Bytes unpack_block<1>(const uint8_t* packed) {
#if PQK_ISA == 512
  return (Bytes)_mm512_maskz_set1_epi8(load_as<uint64_t>(packed), 1);
#elif PQK_ISA == 2
  constexpr uint64_t first = 0x0101010101010101;
  const __m256i byte = _mm256_setr_epi64x(0, first, 2 * first, 3 * first);  // of 4 in each half
  const Bytes copies = (Bytes)_mm256_shuffle_epi8(_mm256_set1_epi32(load_as<int32_t>(packed)), byte);
  return (Bytes)((copies & (Bytes)_mm256_set1_epi64x(0x8040201008040201)) != 0) & 1;
#else
  return (Bytes)split<8, 1>(split<16, 2>(split<32, 4>(load_lanes<1>(packed))));
#endif
}

// Stores reach up to 7 bytes beyond a block, and so do loads but those of AVX-512, which take 64 bytes. That is within
// the array if this many values follow the block; the rest go through a buffer.
constexpr int64_t MARGIN = PQK_ISA == 512 ? 192 : 64;

template <int bits>
inline bool pack_blocks(const uint8_t* values, int64_t blocks, uint8_t* packed) {
  constexpr uint8_t half = 1 << (bits - 1), outside = static_cast<uint8_t>(0xff00 >> (8 - bits));
  Bytes seen{};  // the bits of value + half, which is below 2^bits if the value is in range
  for (int64_t i = 0; i < blocks; ++i) {
    const Bytes v = load_as<Bytes>(values + i * BLOCK);
    if constexpr (bits != 1) seen |= v + half;
    pack_block<bits>(v, packed + i * (BLOCK / 8 * bits));
  }
  const Lanes any = (Lanes)(seen & outside);
  uint64_t found = 0;
  for (int i = 0; i < BLOCK / 8; ++i) found |= any[i];
  return found == 0;
}

template <int bits>
inline void unpack_blocks(const uint8_t* packed, int64_t blocks, uint8_t* values) {
  for (int64_t i = 0; i < blocks; ++i)
    store_as(values + i * BLOCK, unpack_block<bits>(packed + i * (BLOCK / 8 * bits)));
}

template <int bits>
bool pack(const uint8_t* values, int64_t count, uint8_t* packed) {
  const int64_t blocks = count < MARGIN ? 0 : (count - MARGIN) / BLOCK, rest = count - blocks * BLOCK;
  uint8_t last_values[MARGIN + BLOCK] = {}, last_packed[MARGIN + BLOCK];
  std::memcpy(last_values, values + blocks * BLOCK, rest);
  const bool in_range = pack_blocks<bits>(values, blocks, packed);
  const bool last_in_range = pack_blocks<bits>(last_values, MARGIN / BLOCK + 1, last_packed);
  std::memcpy(packed + blocks * (BLOCK / 8 * bits), last_packed, (rest * bits + 7) / 8);
  return in_range && last_in_range;
}

template <int bits>
void unpack(const uint8_t* packed, int64_t count, uint8_t* values) {
  const int64_t blocks = count < MARGIN ? 0 : (count - MARGIN) / BLOCK, rest = count - blocks * BLOCK;
  uint8_t last_values[MARGIN + BLOCK], last_packed[MARGIN + BLOCK] = {};
  std::memcpy(last_packed, packed + blocks * (BLOCK / 8 * bits), (rest * bits + 7) / 8);
  unpack_blocks<bits>(packed, blocks, values);
  unpack_blocks<bits>(last_packed, MARGIN / BLOCK + 1, last_values);
  std::memcpy(values + blocks * BLOCK, last_values, rest);
}

}  // namespace

bool pack_range(const uint8_t* values, int64_t count, int bits, uint8_t* packed) {
  switch (bits) {
    case 1: return pack<1>(values, count, packed);
    case 2: return pack<2>(values, count, packed);
    case 3: return pack<3>(values, count, packed);
    case 4: return pack<4>(values, count, packed);
    case 5: return pack<5>(values, count, packed);
    case 6: return pack<6>(values, count, packed);
    case 7: return pack<7>(values, count, packed);
    default: return pack<8>(values, count, packed);
  }
}

void unpack_range(const uint8_t* packed, int64_t count, int bits, uint8_t* values) {
  switch (bits) {
    case 1: return unpack<1>(packed, count, values);
    case 2: return unpack<2>(packed, count, values);
    case 3: return unpack<3>(packed, count, values);
    case 4: return unpack<4>(packed, count, values);
    case 5: return unpack<5>(packed, count, values);
    case 6: return unpack<6>(packed, count, values);
    case 7: return unpack<7>(packed, count, values);
    default: return unpack<8>(packed, count, values);
  }
}
