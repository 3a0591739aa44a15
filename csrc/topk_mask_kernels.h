// Vector code of topk_mask.cpp, compiled once for each instruction set. It works on 16 keys at a time, held in vectors
// as wide as a register: GCC turns comparisons of wider ones into scalar code and keeps wider sums in memory.
namespace {

#if PQK_ISA == 512
constexpr int WIDTH = 16;
#elif PQK_ISA == 2
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = LANES / WIDTH;

// Keys have 31 bits: signed comparisons order them, the only ones that SSE2 and AVX2 have.
typedef int32_t Keys __attribute__((vector_size(4 * WIDTH)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
struct Keys16 {
  Keys part[PARTS];
};

inline Keys fill_key(int32_t key) { return key - Keys{}; }

// Calls body(i, lanes, keys) for each i in 0, 16, 32...: keys i..i+lanes-1, then ABSENT. `from` holds floats.
template <class Body>
PQK_ALWAYS_INLINE inline void each_float(const char* from, int64_t start, int64_t count, const Body& body) {
  Keys16 keys;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    for (int p = 0; p < PARTS; ++p) keys.part[p] = load_as<Keys>(from + 4 * (i + p * WIDTH)) & 0x7fffffff;
    body(start + i, LANES, keys);
  }
  if (i == count) return;
  const int lanes = static_cast<int>(count - i);
  int32_t last[LANES];
  std::memcpy(last, from + 4 * i, 4 * lanes);
  for (int lane = 0; lane < LANES; ++lane) last[lane] = lane < lanes ? last[lane] & 0x7fffffff : ABSENT;
  for (int p = 0; p < PARTS; ++p) keys.part[p] = load_as<Keys>(last + p * WIDTH);
  body(start + i, lanes, keys);
}

// The same for any type: 16-bit values are widened first, some at a time.
template <class Body>
PQK_ALWAYS_INLINE inline void each_vector(const Ranked& piece, const Body& body) {
  const char* from = static_cast<const char*>(piece.weight);
  if (piece.type == Type::f32) return each_float(from, 0, piece.count, body);
  constexpr int64_t STAGE = 1024;
  float wide[STAGE];
  for (int64_t start = 0; start < piece.count; start += STAGE) {
    const int64_t count = std::min(piece.count - start, STAGE);
    widen(from + 2 * start, piece.type, wide, count);
    each_float(reinterpret_cast<const char*>(wide), start, count, body);
  }
}

// The signs of 16 lanes, in the signs of 16 bytes.
#if PQK_ISA != 512
inline i8x16 sign_bytes(const Keys16& v) {
#ifdef PQK_X86
  __m128i quarter[4];
  std::memcpy(quarter, v.part, sizeof v);
  const __m128i low = _mm_packs_epi32(quarter[0], quarter[1]), high = _mm_packs_epi32(quarter[2], quarter[3]);
  return (i8x16)_mm_packs_epi16(low, high);
#else
  i8x16 signs;
  for (int lane = 0; lane < LANES; ++lane) signs[lane] = static_cast<int8_t>(v.part[lane / WIDTH][lane % WIDTH] >> 31);
  return signs;
#endif
}
#endif

// The signs of 16 lanes as bits.
inline uint32_t sign_bits(const Keys16& v) {
#if PQK_ISA == 512
  return _mm512_movepi32_mask((__m512i)v.part[0]);
#elif defined(PQK_X86)
  return _mm_movemask_epi8((__m128i)sign_bytes(v));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < LANES; ++lane) bits |= (v.part[lane / WIDTH][lane % WIDTH] < 0 ? 1u : 0u) << lane;
  return bits;
#endif
}

// 16 mask bytes: 1 in negative lanes.
inline i8x16 negative_bytes(const Keys16& v) {
#if PQK_ISA == 512
  return (i8x16)_mm_maskz_set1_epi8(sign_bits(v), 1);
#else
  return (sign_bytes(v) < 0) & 1;
#endif
}

inline int64_t sum(Keys v) {
  int64_t total = 0;
  for (int lane = 0; lane < WIDTH; ++lane) total += v[lane];
  return total;
}

#if PQK_ISA == 2
// For each set of 8 lanes the numbers of its lanes, one a byte.
struct LaneLists {
  uint64_t of[256] = {};
  constexpr LaneLists() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, n = 0; lane < 8; ++lane)
        if (set >> lane & 1) of[set] |= static_cast<uint64_t>(lane) << (8 * n++);
  }
};
constexpr LaneLists LANE_LISTS;
#endif

// Appends the keys whose lanes of `chosen` are negative; writes up to 15 values more than it appends. Without a branch
// where the instruction set allows it: every fourth vector or so holds a chosen key, and none can tell which.
PQK_ALWAYS_INLINE inline int32_t* append(int32_t* to, const Keys16& keys, const Keys16& chosen) {
#if PQK_ISA == 512
  const uint32_t set = sign_bits(chosen);
  store_as(to, _mm512_maskz_compress_epi32(set, (__m512i)keys.part[0]));
  return to + __builtin_popcount(set);
#elif PQK_ISA == 2
  for (int p = 0; p < PARTS; ++p) {
    const int set = _mm256_movemask_ps((__m256)chosen.part[p]);
    const __m256i list = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(LANE_LISTS.of[set])));
    store_as(to, _mm256_permutevar8x32_epi32((__m256i)keys.part[p], list));
    to += __builtin_popcount(set);
  }
  return to;
#else
  uint32_t set = sign_bits(chosen);
  if (set == 0) return to;
  int32_t lanes[LANES];
  store_as(lanes, keys);
  for (; set != 0; set &= set - 1) *to++ = lanes[__builtin_ctz(set)];
  return to;
#endif
}

// Counts into SUBTABLES tables of bins + 1 counters: equal keys come in runs, and an increment of the counter that was
// just stored waits for that store. The last counter takes the keys with another prefix.
void histogram(const Ranked& piece, int level, int32_t prefix, uint32_t* tables) {
  const int32_t shift = SHIFT[level], above = shift + RADIX_BITS[level], last = static_cast<int32_t>(bins(level));
  each_vector(piece, [=](int64_t, int, const Keys16& keys) PQK_ALWAYS_INLINE {
    Keys16 counted, digits;
    for (int p = 0; p < PARTS; ++p) {
      counted.part[p] = (keys.part[p] >> above) == prefix;
      digits.part[p] = counted.part[p] ? (keys.part[p] >> shift) & (last - 1) : fill_key(last);
    }
    if (level > 0 && sign_bits(counted) == 0) return;
    int32_t bin[LANES];
    store_as(bin, digits);
    for (int lane = 0; lane < LANES; ++lane) ++tables[bin[lane] + (lane % SUBTABLES) * (last + 1)];
  });
}

// Adds the keys of a piece to `sums`, low <= high. Appends those strictly between the two to between[CHUNK + LANES],
// which holds sums->between. With ENDS it looks also for keys that equal low or high. Without, it counts as if there
// were none, and tells where keys are: those appended by `places`, counted from `place`; those >= high by a bit each.
template <bool ENDS>
void tally(const Ranked& piece, int32_t low, int32_t high, int32_t place, int32_t* between, int32_t* places,
           uint16_t* bits, Tally* sums) {
  Keys above_high = {}, from_high = {}, from_low = {}, largest = {};
  Keys16 at = {};
  for (int lane = 0; lane < LANES; ++lane) at.part[lane / WIDTH][lane % WIDTH] = place + lane;
  int32_t* end = between + sums->between;
  each_vector(piece, [&](int64_t i, int, const Keys16& keys) PQK_ALWAYS_INLINE {
    Keys16 outside, inside;  // negative where key >= high; where low < key < high
    for (int p = 0; p < PARTS; ++p) {
      const Keys key = keys.part[p];
      outside.part[p] = (high - 1) - key;
      from_high -= outside.part[p] >> 31;
      inside.part[p] = (low - key) & ~outside.part[p];
      largest = key > largest ? key : largest;
      if (ENDS) above_high -= key > high;
      if (ENDS) from_low -= key >= low;
    }
    if (!ENDS) bits[i / LANES] = static_cast<uint16_t>(sign_bits(outside));
    if (!ENDS) append(places + (end - between), at, inside);
    end = append(end, keys, inside);
    for (int p = 0; p < PARTS; ++p) at.part[p] += LANES;
  });
  const int64_t n = end - between - sums->between, high_on = sum(from_high);
  sums->above_high += ENDS ? sum(above_high) : high_on;
  sums->from_high += high_on;
  sums->from_low += ENDS ? sum(from_low) : high_on + n;
  sums->between += n;
  sums->infinite |= sum(largest >= INFINITE) != 0;
}

// mask[i] = bit i, counted through the elements of `bits`.
void expand_bits(const uint16_t* bits, uint8_t* mask, int64_t count) {
  int64_t i = 0;
#if PQK_ISA == 512
  for (; i + 64 <= count; i += 64) store_as(mask + i, _mm512_maskz_set1_epi8(load_as<uint64_t>(bits + i / LANES), 1));
#endif
  constexpr uint64_t in_every_byte = 0x0101010101010101, one_each = 0x8040201008040201;
  for (; i < count; i += LANES) {
    const uint64_t set = bits[i / LANES];
    const uint64_t eight[2] = {(set & 255) * in_every_byte & one_each, (set >> 8) * in_every_byte & one_each};
    const i8x16 bytes = (load_as<i8x16>(eight) != 0) & 1;
    std::memcpy(mask + i, &bytes, std::min<int64_t>(count - i, LANES));
  }
}

void copy_keys(const Ranked& piece, int32_t* to) {
  each_vector(piece, [=](int64_t i, int lanes, const Keys16& keys) PQK_ALWAYS_INLINE {
    std::memcpy(to + i, keys.part, sizeof(int32_t) * lanes);
  });
}

// mask = key > threshold. Returns how many keys equal it. At most 2^31 keys.
int64_t mask_above(const Ranked& piece, int32_t threshold) {
  Keys equal = {};
  each_vector(piece, [&](int64_t i, int lanes, const Keys16& keys) PQK_ALWAYS_INLINE {
    Keys16 below;
    for (int p = 0; p < PARTS; ++p) {
      below.part[p] = threshold - keys.part[p];
      equal -= keys.part[p] == threshold;
    }
    const i8x16 bytes = negative_bytes(below);
    std::memcpy(piece.mask + i, &bytes, lanes);
  });
  return sum(equal);
}

// Sets the mask bytes of the first `limit` keys that equal the threshold. Returns how many.
int64_t mask_ties(const Ranked& piece, int32_t threshold, int64_t limit) {
  int64_t kept = 0;
  each_vector(piece, [&](int64_t i, int, const Keys16& keys) PQK_ALWAYS_INLINE {
    if (kept == limit) return;
    Keys16 equal;
    for (int p = 0; p < PARTS; ++p) equal.part[p] = keys.part[p] == threshold;
    for (uint32_t bits = sign_bits(equal); bits != 0 && kept < limit; bits &= bits - 1, ++kept)
      piece.mask[i + __builtin_ctz(bits)] = 1;
  });
  return kept;
}

// 16 groups side by side, keys[member][lane]: kept[member][lane] = 1 if fewer than `keep` members rank higher.
void rank_groups(const int32_t* keys, int keep, int group, uint8_t* kept) {
  for (int a = 0; a < group; ++a) {
    Keys16 rank;
    for (int p = 0; p < PARTS; ++p) {
      const Keys key = load_as<Keys>(keys + a * LANES + p * WIDTH);
      Keys higher = fill_key(-keep);
      for (int b = 0; b < a; ++b) higher -= load_as<Keys>(keys + b * LANES + p * WIDTH) >= key;
      for (int b = a + 1; b < group; ++b) higher -= load_as<Keys>(keys + b * LANES + p * WIDTH) > key;
      rank.part[p] = higher;
    }
    store_as(kept + a * LANES, negative_bytes(rank));
  }
}

}  // namespace
