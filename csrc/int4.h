// Packing of small integers and of mask bits. The layout is also that of the deployment file:
//
//   Value i takes bits i*k .. i*k+k-1 of a bit stream, for every width k = 1..8. Bit b of the stream is bit b % 8 of
//   byte b / 8 (bit 0 = least significant). Integers (k = 2..8) are two's complement of k bits, -2^(k-1) .. 2^(k-1)-1;
//   a mask (k = 1) has one bit a value. Zero bits pad the last byte: n values take ceil(n*k / 8) bytes.
//
// So k = 4 puts the even value into the low nibble, and k = 8 is the bytes themselves.
#pragma once
#include <cstdint>

namespace pqk {

// The bytes that `count` values of `bits` bits take; -1 if count < 0, bits is not 1..8 or count * bits overflows.
int64_t packed_size(int64_t count, int bits);

// Packs `count` values in `bits` = 2..8 bits each. False if bits is anything else or a value is out of range; the bytes
// of `packed` are then unspecified.
bool pack_ints(const int8_t* values, int64_t count, int bits, uint8_t* packed);

// The inverse, sign-extended; the padding is ignored. False, and nothing written, if bits is not 2..8.
bool unpack_ints(const uint8_t* packed, int64_t count, int bits, int8_t* values);

// Bit i is 1 where mask[i] is not 0.
void pack_mask(const uint8_t* mask, int64_t count, uint8_t* packed);

// The inverse: bytes 0 and 1.
void unpack_mask(const uint8_t* packed, int64_t count, uint8_t* mask);

}  // namespace pqk
