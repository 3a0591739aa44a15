// Work cut into blocks of rows: what the element-wise operations share.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace pqk {

constexpr int64_t BLOCK = 8192;      // values; also the unit of a deterministic sum
constexpr int64_t SERIAL = 1 << 16;  // values for each thread: below, a second one costs more than it saves

// Q = 2^(k-1) - 1, the largest quantized magnitude.
inline float levels(int bits) { return static_cast<float>((1 << (bits - 1)) - 1); }

// The address of the i-th value.
template <class Pointer>
Pointer* at(Pointer* base, int64_t i, Type type) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
  return static_cast<Byte*>(base) + i * size_of(type);
}

inline int64_t blocks_in_a_row(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

struct Block {
  int64_t layer, row;
  int64_t first, count;  // its values within the layer
  int64_t index;         // among all blocks, in the order of the layers
};

// Calls run(block) for every block of every layer (a matrix of `rows` and `columns`), in parallel.
template <class Layer, class Run>
void for_each_block(const Layer* layers, int64_t count, const Run& run) {
  std::vector<int64_t> first(count + 1, 0);  // index of each layer's first block
  int64_t values = 0;
  for (int64_t i = 0; i < count; ++i) {
    first[i + 1] = first[i] + layers[i].rows * blocks_in_a_row(layers[i].columns);
    values += layers[i].rows * layers[i].columns;
  }
  const int64_t blocks = first[count];
  if (blocks == 0) return;
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(blocks) * SERIAL / values));
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t index = begin; index < end; ++index) {
      while (index >= first[i + 1]) ++i;
      const int64_t columns = layers[i].columns, each = blocks_in_a_row(columns), within = index - first[i];
      const int64_t row = within / each, column = within % each * BLOCK;
      run(Block{i, row, row * columns + column, std::min(BLOCK, columns - column), index});
    }
  });
}

}  // namespace pqk
