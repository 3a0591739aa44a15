#include "int4.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"
#include "simd.h"
#define PQK_KERNELS "int4_kernels.h"
#include "for_each_isa.h"

namespace pqk {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the kernels load 8 bytes of the bit stream as one word");

namespace {

// Threads share out chunks, whole bytes of the bit stream, and take at least GRAIN of them.
constexpr int64_t CHUNK = 4096, GRAIN = 64;

// Calls body(first value, its byte in the bit stream, number of values) on parts of [0, count).
template <class Body>
void for_each_part(int64_t count, int bits, const Body& body) {
  if (count == 0) return;  // there may be no memory at all
  const int64_t chunks = count / CHUNK + (count % CHUNK != 0);
  parallel_for(chunks, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * CHUNK;
    body(first, first / 8 * bits, std::min(end * CHUNK, count) - first);
  });
}

bool pack(const uint8_t* values, int64_t count, int bits, uint8_t* packed) {
  std::atomic<bool> in_range{true};
  for_each_part(count, bits, [&](int64_t first, int64_t byte, int64_t n) {
    if (!PQK_DISPATCH(pack_range, values + first, n, bits, packed + byte))
      in_range.store(false, std::memory_order_relaxed);
  });
  return in_range;
}

void unpack(const uint8_t* packed, int64_t count, int bits, uint8_t* values) {
  for_each_part(count, bits, [&](int64_t first, int64_t byte, int64_t n) {
    PQK_DISPATCH(unpack_range, packed + byte, n, bits, values + first);
  });
}

}  // namespace

int64_t packed_size(int64_t count, int bits) {
  int64_t size;
  if (count < 0 || bits < 1 || bits > 8 || __builtin_mul_overflow(count, bits, &size)) return -1;
  return size / 8 + (size % 8 != 0);
}

bool pack_ints(const int8_t* values, int64_t count, int bits, uint8_t* packed) {
  return bits >= 2 && bits <= 8 && pack(reinterpret_cast<const uint8_t*>(values), count, bits, packed);
}

bool unpack_ints(const uint8_t* packed, int64_t count, int bits, int8_t* values) {
  if (bits < 2 || bits > 8) return false;
  unpack(packed, count, bits, reinterpret_cast<uint8_t*>(values));
  return true;
}

void pack_mask(const uint8_t* mask, int64_t count, uint8_t* packed) { pack(mask, count, 1, packed); }

void unpack_mask(const uint8_t* packed, int64_t count, uint8_t* mask) { unpack(packed, count, 1, mask); }

}  // namespace pqk
