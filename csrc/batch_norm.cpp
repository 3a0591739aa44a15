#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "blocks.h"

namespace pqk {

// Rows are contiguous, so a few of them are one long array, in which a channel returns every `channels` places. The
// loops run over such tiles, with tables that repeat what belongs to a channel: no channel count leaves lanes empty.
struct BatchNormTile {
  int64_t channels;
  int64_t rows;    // a power of two
  int64_t values;  // rows * channels
  int64_t stride;  // of tables: values rounded up to whole cache lines
};

static constexpr int64_t TILES = 4;  // tiles whose sums are taken together
static constexpr int64_t RUN = 32;   // tiles that are summed in fp32

// table[0 .. channels) for every row of a tile.
static inline void repeat(float* table, const BatchNormTile& tile) {
  for (int64_t n = tile.channels; n < tile.values; n *= 2) std::memcpy(table + n, table, n * sizeof(float));
}

}  // namespace pqk

#define PQK_KERNELS "batch_norm_kernels.h"
#include "for_each_isa.h"

namespace pqk {

// Long enough for the loops, and if possible whole cache lines, so that all tiles are aligned as the first one is.
static BatchNormTile tile_of(int64_t channels) {
  int64_t rows = 1;
  while (rows * channels < 256 || (rows * channels % 16 != 0 && rows * channels < 512)) rows *= 2;
  const int64_t values = rows * channels;
  return {channels, rows, values, (values + 15) / 16 * 16};
}

// Aligned tables of a tile each.
class Tables {
 public:
  Tables(const BatchNormTile& tile, int64_t count) : tile_(tile), lines_(count * tile.stride / 16) {}
  float* data() { return reinterpret_cast<float*>(lines_.data()); }
  float* operator[](int64_t i) { return data() + i * tile_.stride; }
  void repeat_all() {
    for (int64_t i = 0; i * tile_.stride < static_cast<int64_t>(lines_.size()) * 16; ++i) repeat((*this)[i], tile_);
  }

 private:
  struct alignas(64) Line {
    float values[16];
  };
  BatchNormTile tile_;
  std::vector<Line> lines_;
};

// Two sums for each channel: add(first row, rows, room, sums) is called for blocks of rows that depend on the shape
// alone, and their sums are added in order.
template <class Add>
static std::vector<double> sum_rows(const BatchNormTile& tile, int64_t rows, const Add& add) {
  constexpr int64_t BLOCKS = 64;
  const int64_t share = (rows + BLOCKS - 1) / BLOCKS, whole = (share + tile.rows - 1) / tile.rows * tile.rows;
  const int64_t each = std::max(whole, RUN * tile.rows), blocks = (rows + each - 1) / each;
  std::vector<double> sums(std::max<int64_t>(1, blocks) * 2 * tile.channels);
  parallel_for(blocks, std::max<int64_t>(1, SERIAL / (each * tile.channels)), [&](int64_t begin, int64_t end) {
    Tables room(tile, 3);
    for (int64_t i = begin; i < end; ++i)
      add(i * each, std::min(each, rows - i * each), room.data(), sums.data() + i * 2 * tile.channels);
  });
  for (int64_t i = 1; i < blocks; ++i)
    for (int64_t c = 0; c < 2 * tile.channels; ++c) sums[c] += sums[i * 2 * tile.channels + c];
  return sums;
}

// Calls run(first value, count) for ranges of whole tiles.
template <class Run>
static void for_each_range(const BatchNormTile& tile, int64_t rows, const Run& run) {
  const int64_t values = rows * tile.channels, tiles = (values + tile.values - 1) / tile.values;
  parallel_for(tiles, std::max<int64_t>(1, SERIAL / tile.values), [&](int64_t begin, int64_t end) {
    run(begin * tile.values, std::min(end * tile.values, values) - begin * tile.values);
  });
}

void batch_norm(const float* x, int64_t rows, int64_t channels, const float* weight, const float* bias, float eps,
                float* out, float* mean, float* variance, float* rstd) {
  if (rows <= 0 || channels <= 0) return;
  const BatchNormTile tile = tile_of(channels);
  // Moments about the first row, which is off by at most sqrt(rows) standard deviations: fp64 has room for that.
  const std::vector<double> sums = sum_rows(tile, rows, [&](int64_t row, int64_t count, float* room, double* to) {
    PQK_DISPATCH(batch_norm_moments, tile, x + row * channels, count, x, room, to);
  });
  Tables tables(tile, 3);
  for (int64_t c = 0; c < channels; ++c) {
    const double from_first = sums[c] / rows, exact_mean = x[c] + from_first;
    const double spread = sums[channels + c] / rows - from_first * from_first;
    const double exact_variance = spread < 0 ? 0 : spread;  // NaN stays
    const double exact_rstd = 1 / std::sqrt(exact_variance + eps), scale = exact_rstd * (weight ? weight[c] : 1);
    mean[c] = static_cast<float>(exact_mean);
    variance[c] = static_cast<float>(exact_variance);
    rstd[c] = static_cast<float>(exact_rstd);
    tables[0][c] = mean[c];
    tables[1][c] = static_cast<float>(scale);
    // With what the rounded mean lacks: it counts where the mean is much larger than the deviation.
    tables[2][c] = static_cast<float>((bias ? bias[c] : 0) - (exact_mean - mean[c]) * scale);
  }
  tables.repeat_all();
  for_each_range(tile, rows, [&](int64_t first, int64_t count) {
    PQK_DISPATCH(batch_norm_normalize, tile, tables.data(), x + first, out + first, count);
  });
}

void batch_norm_backward(const float* grad, const float* x, int64_t rows, int64_t channels, const float* weight,
                         const float* mean, const float* rstd, float* grad_x, float* grad_weight, float* grad_bias) {
  if (channels <= 0) return;
  const BatchNormTile tile = tile_of(channels);
  Tables tables(tile, 4);
  std::copy(mean, mean + channels, tables[0]);
  repeat(tables[0], tile);
  const std::vector<double> sums = sum_rows(tile, rows, [&](int64_t row, int64_t count, float* room, double* to) {
    PQK_DISPATCH(batch_norm_products, tile, grad + row * channels, x + row * channels, count, tables[0], room, to);
  });
  for (int64_t c = 0; c < channels; ++c) {
    const double deviation = rstd[c], sum = sums[c], product = sums[channels + c] * deviation;
    if (grad_weight) grad_weight[c] = static_cast<float>(product);
    if (grad_bias) grad_bias[c] = static_cast<float>(sum);
    tables[1][c] = static_cast<float>(sum / rows);
    tables[2][c] = static_cast<float>(product * deviation / rows);
    tables[3][c] = static_cast<float>(deviation * (weight ? weight[c] : 1));
  }
  if (!grad_x || rows <= 0) return;
  tables.repeat_all();
  for_each_range(tile, rows, [&](int64_t first, int64_t count) {
    PQK_DISPATCH(batch_norm_grad_of_x, tile, tables.data(), grad + first, x + first, grad_x + first, count);
  });
}

}  // namespace pqk
