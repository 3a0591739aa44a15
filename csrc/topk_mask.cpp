// Selection by a radix search over the keys. Large inputs are narrowed down first: a sample gives two keys that bracket
// the threshold, one pass collects the few keys between them, and the search reads only those. The same pass leaves one
// bit a weight, whether it is above the bracket: bits and collected keys make the mask, and no weight is read twice.
#include "topk_mask.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "parallel.h"

namespace pqk {
namespace {

constexpr int LANES = 16;                    // keys that are handled together
constexpr int32_t ABSENT = -1;               // below every key
constexpr int32_t INFINITE = 0x7f800000;     // the keys of infinity and NaN start here
constexpr int SHIFT[RADIX_LEVELS] = {20, 10, 0};
constexpr int SUBTABLES = 4;
constexpr int MAX_GROUP = 16;
constexpr int64_t CHUNK = 8192;              // positions that are tallied together
constexpr int64_t PARALLEL_FROM = 262144;    // keys that are worth a thread: 35 us, about what waking it costs
constexpr int64_t SAMPLE_FROM = 16384;       // fewer keys are searched whole
constexpr int64_t MAX_BLOCKS = 1024;

// How many keys are > high, >= high, >= low, and strictly between; whether any is infinite or NaN.
struct Tally {
  int64_t above_high, from_high, from_low, between;
  bool infinite;
};

}  // namespace
}  // namespace pqk

// The sums that a kernel keeps stay in registers only if the loops and their bodies are inlined into it.
#define PQK_ALWAYS_INLINE __attribute__((always_inline))
#define PQK_KERNELS "topk_mask_kernels.h"
#include "for_each_isa.h"
#undef PQK_ALWAYS_INLINE

namespace pqk {
namespace {

void atomic_add(int64_t* to, int64_t n) { __atomic_fetch_add(to, n, __ATOMIC_RELAXED); }

constexpr int64_t room_for(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// The tensors as one sequence of `total` values at `span` positions: each tensor starts at a multiple of LANES, so that
// bits and vectors never straddle two. Cut into at most MAX_BLOCKS blocks of equal size.
struct Ranking {
  const Ranked* tensors;
  int64_t total = 0, span = 0, block, blocks;

  Ranking(const Ranked* tensors, int64_t count) : tensors(tensors) {
    for (int64_t i = 0; i < count; ++i) total += tensors[i].count, span += room_for(tensors[i].count);
    block = std::max(room_for(span / MAX_BLOCKS + 1), CHUNK);
    blocks = parts(block);
  }

  int64_t parts(int64_t size) const { return (span + size - 1) / size; }

  // Calls body(first, end) on ranges that cover all parts.
  template <class Body>
  void parallel(int64_t size, const Body& body) const {
    const int64_t n = parts(size), grain = std::max<int64_t>(PARALLEL_FROM / size, 1);
    n <= grain ? body(0, n) : parallel_for(n, grain, body);
  }
};

// Visits ascending ranges of the sequence, each as its pieces of the single tensors.
struct Walk {
  const Ranking& ranking;
  const Ranked* tensor = ranking.tensors;
  int64_t start = 0;  // position of the tensor's first value

  // Calls body(piece, its position) for begin..end, multiples of LANES; `begin` may not go back before the tensor.
  template <class Body>
  void visit(int64_t begin, int64_t end, const Body& body) {
    end = std::min(end, ranking.span);
    while (begin < end) {
      for (; begin >= start + room_for(tensor->count); ++tensor) start += room_for(tensor->count);
      const int64_t offset = begin - start, n = std::min(end - begin, tensor->count - offset);
      const char* weight = static_cast<const char*>(tensor->weight) + offset * size_of(tensor->type);
      body(Ranked{weight, tensor->type, n, tensor->mask ? tensor->mask + offset : nullptr}, begin);
      begin += room_for(n);
    }
  }
};

void add_histogram(const Ranking& ranking, int64_t begin, int64_t end, int level, int32_t prefix, int64_t* histogram) {
  const int64_t count = bins(level), stride = count + 1;
  uint32_t tables[SUBTABLES * (bins(0) + 1)];
  std::fill_n(tables, SUBTABLES * stride, 0);
  Walk{ranking}.visit(begin, end, [&](const Ranked& piece, int64_t) {
    PQK_DISPATCH(histogram, piece, level, prefix, tables);
  });
  for (int64_t bin = 0; bin < count; ++bin) {
    int64_t sum = 0;
    for (int table = 0; table < SUBTABLES; ++table) sum += tables[table * stride + bin];
    if (sum != 0) atomic_add(&histogram[bin], sum);
  }
}

void histogram_of(const Ranking& ranking, int level, int32_t prefix, int64_t* histogram) {
  std::fill_n(histogram, bins(level), 0);
  constexpr int64_t no_overflow = int64_t{1} << 31;  // of a 32 bit counter
  ranking.parallel(ranking.block, [&](int64_t first, int64_t last) {
    const int64_t end = last * ranking.block;
    for (int64_t begin = first * ranking.block; begin < end; begin += no_overflow)
      add_histogram(ranking, begin, std::min(end, begin + no_overflow), level, prefix, histogram);
  });
}

// The collected keys of a chunk: where they start in Bracket::keys, and how many ties of the threshold among them stay.
struct Found {
  int64_t first, count, ties_kept;
};

// What one pass leaves for the mask, for each chunk, each key between low and high, and each LANES positions.
struct Bracket {
  std::unique_ptr<char[]> memory;
  bool encloses = false;  // the threshold is among the keys, and nothing is missing
  int64_t capacity;       // for keys
  Found* chunks;
  int32_t* keys;     // those of a chunk together and in order, the chunks in no fixed order
  uint16_t* places;  // of the keys within their chunks
  uint16_t* bits;    // key >= high

  bool allocate(int64_t n, int64_t most) {
    memory.reset(new (std::nothrow) char[n * (sizeof(Found) + CHUNK / 8) + most * 6]);
    capacity = most;
    chunks = reinterpret_cast<Found*>(memory.get());
    keys = reinterpret_cast<int32_t*>(chunks + n);
    places = reinterpret_cast<uint16_t*>(keys + most);
    bits = places + most;
    return memory != nullptr;
  }
};

// Tallies all keys, and collects those between low and high as far as they fit. `ENDS`: see the kernel.
template <bool ENDS>
Tally tally_all(const Ranking& ranking, int32_t low, int32_t high, Bracket* bracket = nullptr) {
  Tally all{};
  ranking.parallel(CHUNK, [&](int64_t first, int64_t last) {
    int32_t keys[CHUNK + LANES], places[CHUNK + LANES];
    uint16_t unused[CHUNK / LANES];
    Tally part{};
    Walk walk{ranking};
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * CHUNK;
      uint16_t* const bits = bracket ? bracket->bits + begin / LANES : unused;
      part.between = 0;
      walk.visit(begin, begin + CHUNK, [&](const Ranked& piece, int64_t position) {
        const auto place = static_cast<int32_t>(position - begin);
        PQK_DISPATCH(tally<ENDS>, piece, low, high, place, keys, places, bits + place / LANES, &part);
      });
      if (!bracket) continue;
      const int64_t n = part.between, at = __atomic_fetch_add(&all.between, n, __ATOMIC_RELAXED);
      bracket->chunks[chunk] = {at, n, n};
      if (at + n > bracket->capacity) continue;
      std::copy_n(keys, n, bracket->keys + at);
      std::copy_n(places, n, bracket->places + at);
    }
    atomic_add(&all.above_high, part.above_high);
    atomic_add(&all.from_high, part.from_high);
    atomic_add(&all.from_low, part.from_low);
    if (part.infinite) __atomic_store_n(&all.infinite, true, __ATOMIC_RELAXED);
  });
  return all;
}

int64_t first_not_finite(const Ranked* tensors, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (tally_all<false>(Ranking(&tensors[i], 1), INFINITE, INFINITE).infinite) return i;
  return -1;
}

// The key of some rank, and how many keys equal to it are among the ranks up to that one, and in all. key < 0: there
// are keys that are not finite.
struct Threshold {
  int32_t key;
  int64_t kept, ties;
};

// The keys are known to lie in low..high: digits that these share need no histogram.
Threshold radix_search(const Ranking& ranking, int64_t rank, int32_t low = 0, int32_t high = INT32_MAX) {
  int64_t histogram[bins(0)], bin = 0;
  int level = 0;
  while (level < RADIX_LEVELS - 1 && low >> SHIFT[level] == high >> SHIFT[level]) ++level;
  int64_t prefix = level == 0 ? 0 : low >> SHIFT[level - 1];
  for (; level < RADIX_LEVELS; ++level) {
    histogram_of(ranking, level, static_cast<int32_t>(prefix), histogram);
    bin = find_bin(histogram, level, &rank);
    if (bin < 0) return {-1, 0, 0};
    prefix = prefix << RADIX_BITS[level] | bin;
  }
  return {static_cast<int32_t>(prefix), rank, histogram[bin]};
}

Threshold radix_search(const int32_t* keys, int64_t count, int64_t rank, int32_t low = 0, int32_t high = INT32_MAX) {
  const Ranked tensor{keys, Type::f32, count, nullptr};  // a key is the float |w|
  return radix_search(Ranking(&tensor, 1), rank, low, high);
}

// Copies runs of 16 values, one at a varying place of each of `runs` equal parts: even where neighbours are alike or
// the values repeat, their ranks are close to those of all. Returns how many: a tensor's last run may be shorter.
int64_t draw_sample(const Ranking& ranking, int64_t runs, int32_t* sample) {
  const int64_t part = ranking.span / runs;
  int64_t size = 0;
  Walk walk{ranking};
  for (int64_t i = 0; i < runs; ++i) {
    const uint64_t fraction = static_cast<uint32_t>(i * 0x9e3779b9u);  // golden ratio: spread evenly over 2^32
    const int64_t begin = (i * part + static_cast<int64_t>(fraction * part >> 32)) / LANES * LANES;
    walk.visit(begin, begin + LANES, [&](const Ranked& piece, int64_t) {
      PQK_DISPATCH(copy_keys, piece, sample + size);
      size += piece.count;
    });
  }
  return size;
}

Threshold search(const Ranking& ranking, int64_t rank, Bracket* bracket) {
  if (ranking.total < SAMPLE_FROM) return radix_search(ranking, rank);

  // The rank in the sample errs by at most sqrt(size) / 2 (one standard deviation) if the values are independent.
  const int64_t runs = static_cast<int64_t>(std::sqrt(static_cast<double>(ranking.span)));
  const std::unique_ptr<int32_t[]> sample(new (std::nothrow) int32_t[runs * LANES]);
  if (!sample) return radix_search(ranking, rank);
  const int64_t size = draw_sample(ranking, runs, sample.get());
  const double deviations = 2 * std::sqrt(static_cast<double>(size));
  const int64_t capacity = static_cast<int64_t>(4 * deviations / size * ranking.total);
  if (!bracket->allocate(ranking.parts(CHUNK), capacity)) return radix_search(ranking, rank);

  const double expected = static_cast<double>(rank) / ranking.total * size;
  const int64_t rank_high = static_cast<int64_t>(expected - deviations);
  const int64_t rank_low = static_cast<int64_t>(expected + deviations);
  const Threshold high = rank_high < 1 ? Threshold{INFINITE, 0, 0} : radix_search(sample.get(), size, rank_high);
  const Threshold low = rank_low > size ? Threshold{ABSENT, 0, 0} : radix_search(sample.get(), size, rank_low);
  if (high.key < 0) return {-1, 0, 0};

  // An end of the bracket is hardly the threshold too, unless its ties reach far towards the expected rank.
  const bool shared = std::max(low.kept, high.ties - high.kept) > deviations / 4;
  const Tally tally = shared ? tally_all<true>(ranking, low.key, high.key, bracket)
                             : tally_all<false>(ranking, low.key, high.key, bracket);
  if (tally.infinite) return {-1, 0, 0};
  const int64_t above_low = tally.from_high + tally.between;
  if (rank > tally.above_high && rank <= tally.from_high)
    return {high.key, rank - tally.above_high, tally.from_high - tally.above_high};
  if (rank > above_low && rank <= tally.from_low) return {low.key, rank - above_low, tally.from_low - above_low};
  if (rank > tally.from_high && rank <= above_low && tally.between <= capacity) {
    bracket->encloses = !shared;
    return radix_search(bracket->keys, tally.between, rank - tally.from_high, low.key, high.key);
  }
  return radix_search(ranking, rank);  // the sample was not like the rest
}

// mask = key > threshold, and the first `kept` keys equal to it, where the bracket encloses the threshold.
void write_mask(const Ranking& ranking, const Threshold& threshold, const Bracket& bracket) {
  if (threshold.kept < threshold.ties) {
    int64_t left = threshold.kept;
    for (int64_t chunk = 0; chunk < ranking.parts(CHUNK); ++chunk) {
      Found& found = bracket.chunks[chunk];
      const int32_t* const keys = bracket.keys + found.first;
      found.ties_kept = std::min<int64_t>(left, std::count(keys, keys + found.count, threshold.key));
      left -= found.ties_kept;
    }
  }
  ranking.parallel(CHUNK, [&](int64_t first, int64_t last) {
    Walk walk{ranking};
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * CHUNK;
      uint16_t* const bits = bracket.bits + begin / LANES;
      Found found = bracket.chunks[chunk];
      for (int64_t i = found.first; i < found.first + found.count; ++i) {
        const int32_t key = bracket.keys[i], place = bracket.places[i];
        int stays = key > threshold.key;  // not to be predicted: without a branch
        if (key == threshold.key) stays = found.ties_kept-- > 0;
        bits[place / LANES] |= static_cast<uint16_t>(stays << place % LANES);
      }
      walk.visit(begin, begin + CHUNK, [&](const Ranked& piece, int64_t position) {
        PQK_DISPATCH(expand_bits, bits + (position - begin) / LANES, piece.mask, piece.count);
      });
    }
  });
}

// The same from the weights. Negative `ties`: not known.
void write_mask(const Ranking& ranking, const Threshold& threshold) {
  const bool keep_all_ties = threshold.kept == threshold.ties;
  int64_t ties[MAX_BLOCKS];
  const auto mask_block = [&](Walk& walk, int64_t block, int32_t above) {
    int64_t equal = 0;
    walk.visit(block * ranking.block, (block + 1) * ranking.block, [&](const Ranked& piece, int64_t) {
      equal += PQK_DISPATCH(mask_above, piece, above);
    });
    return equal;
  };
  ranking.parallel(ranking.block, [&](int64_t first, int64_t last) {
    Walk walk{ranking};
    for (int64_t b = first; b < last; ++b) ties[b] = mask_block(walk, b, threshold.key - keep_all_ties);
  });
  if (keep_all_ties || threshold.kept == 0) return;

  // The blocks before `cut` keep all of their ties, `cut` itself only its first ones.
  int64_t cut = 0, left = threshold.kept;
  for (; cut < ranking.blocks && ties[cut] <= left; ++cut) left -= ties[cut];
  ranking.parallel(ranking.block, [&](int64_t first, int64_t last) {
    Walk walk{ranking};
    for (int64_t b = first; b < std::min(last, cut); ++b)
      if (ties[b] != 0) mask_block(walk, b, threshold.key - 1);
  });
  Walk walk{ranking};
  if (left > 0)
    walk.visit(cut * ranking.block, (cut + 1) * ranking.block, [&](const Ranked& piece, int64_t) {
      left -= PQK_DISPATCH(mask_ties, piece, threshold.key, left);
    });
}

// Ranks 16 groups at a time, one in each lane. Within one type the bits without the sign order as the magnitudes do.
template <class Bits>
void mask_groups(const Bits* weight, uint8_t* mask, int64_t groups, int64_t inner, int keep, int group) {
  constexpr Bits without_sign = static_cast<Bits>(~Bits{0}) >> 1;
  const int64_t grain = PARALLEL_FROM / 8 / (LANES * group);  // ranking takes ten times as long as comparing
  parallel_for((groups + LANES - 1) / LANES, grain, [=](int64_t begin, int64_t end) {
    int32_t keys[MAX_GROUP * LANES] = {};
    uint8_t kept[MAX_GROUP * LANES];
    for (int64_t first = begin * LANES; first < std::min(end * LANES, groups); first += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(groups - first, LANES));
      int64_t members[LANES];  // the position of each group's first member
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t row = inner == 1 ? first + lane : (first + lane) / inner;
        members[lane] = first + lane + row * (group - 1) * inner;
        for (int i = 0; i < group; ++i) keys[i * LANES + lane] = weight[members[lane] + i * inner] & without_sign;
      }
      PQK_DISPATCH(rank_groups, keys, keep, group, kept);
      for (int lane = 0; lane < lanes; ++lane)
        for (int i = 0; i < group; ++i) mask[members[lane] + i * inner] = kept[i * LANES + lane];
    }
  });
}

}  // namespace

int64_t find_bin(const int64_t* histogram, int level, int64_t* left) {
  int64_t bin = bins(level) - 1;
  if (level == 0)
    for (; bin >= INFINITE >> SHIFT[0]; --bin)
      if (histogram[bin] != 0) return -1;
  for (; bin > 0 && histogram[bin] < *left; --bin) *left -= histogram[bin];
  return bin;
}

void magnitude_histogram(const Ranked* tensors, int64_t count, int level, uint32_t prefix, int64_t* histogram) {
  histogram_of(Ranking(tensors, count), level, static_cast<int32_t>(prefix), histogram);
}

void count_ties(const Ranked* tensors, int64_t count, uint32_t threshold, int64_t* ties) {
  const auto key = static_cast<int32_t>(threshold);
  for (int64_t i = 0; i < count; ++i) {
    const Tally tally = tally_all<true>(Ranking(&tensors[i], 1), key, key);
    ties[i] = tally.from_high - tally.above_high;
  }
}

void mask_at_threshold(const Ranked* tensors, int64_t count, uint32_t threshold, const int64_t* ties_kept) {
  for (int64_t i = 0; i < count; ++i)
    write_mask(Ranking(&tensors[i], 1), {static_cast<int32_t>(threshold), std::max<int64_t>(ties_kept[i], 0), -1});
}

int64_t topk_mask(const Ranked* tensors, int64_t count, int64_t keep) {
  const Ranking ranking(tensors, count);
  if (keep == 0 || keep == ranking.total) {
    const int64_t bad = first_not_finite(tensors, count);
    for (int64_t i = 0; i < count && bad < 0; ++i)
      if (tensors[i].count != 0) std::memset(tensors[i].mask, keep != 0, tensors[i].count);
    return bad;
  }
  Bracket bracket;
  const Threshold threshold = search(ranking, keep, &bracket);
  if (threshold.key < 0) return first_not_finite(tensors, count);
  bracket.encloses ? write_mask(ranking, threshold, bracket) : write_mask(ranking, threshold);
  return -1;
}

bool group_mask(const void* weight, Type type, uint8_t* mask, int64_t outer, int64_t inputs, int64_t inner, int keep,
                int group) {
  const Ranked tensor{weight, type, outer * inputs * inner, mask};
  if (first_not_finite(&tensor, 1) >= 0) return false;
  const int64_t groups = tensor.count / group;
  if (type == Type::f32)
    mask_groups(static_cast<const uint32_t*>(weight), mask, groups, inner, keep, group);
  else
    mask_groups(static_cast<const uint16_t*>(weight), mask, groups, inner, keep, group);
  return true;
}

}  // namespace pqk
