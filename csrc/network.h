// A whole network for inference on raw memory, as a list of steps that deploy/executor.py writes: no call for each
// layer, and where a step needs only one plane of what the step before it makes, that plane never leaves the cache.
//
// Rows of a value are `pitch` apart. What a convolution reads has zeros between its rows, before its first and after
// its last one, as many as the kernel reaches over the borders: then every weight is one multiply-add over a whole
// plane (sparse_infer.h), and the sums lie in rows of the same pitch.
#pragma once
#include <cstdint>

namespace pqk {

enum class Place : int64_t { input, output, block, plane };  // of a network's values; `plane`: each thread's own
enum class Kind : int64_t { deal, conv, affine, relu, add, pool, mean, rearrange };

// Plane c of a value begins at first + c * stride of its place. Fields are 64 bits: the list is a tensor of int64.
struct Value {
  Place place;
  int64_t first, stride, rows, columns, pitch;

  int64_t run() const { return (rows - 1) * pitch + columns; }  // from the first to the last one of a plane
};

struct Step {
  Kind kind;
  int64_t planes;       // of the result
  int64_t joined;       // 1: plane by plane with the step before it
  int64_t lead, gap;    // zeros to write before the first row and between rows (after each too)
  Value in[2], out;
  int64_t numbers;      // where its scale and shift [planes] begin
  int64_t settings[9];  // by kind, see the structs below
};

struct ConvSettings {
  int64_t positions, pitch;  // of the sums
  int64_t first, taps;       // where its first[planes + 1] and its taps' offsets begin among `places`
  int64_t values;            // where its taps' values begin among `numbers`
  int64_t relu;
};

// The padded input dealt out to stride_height x stride_width planes, its phases, which follow each other in `out`.
struct DealSettings {
  int64_t stride_height, stride_width, padding_height, padding_width;
};

struct PoolSettings {
  int64_t kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
  int64_t largest, count_padding;
};

// Columns of a row that windows may reach into, with what is outside to the left and to the right; and the memory that
// pooling takes, for the rows of the result before and after columns are combined.
inline int64_t pool_row(const PoolSettings& pool, int64_t columns, int64_t out_columns) {
  const int64_t last = (out_columns - 1) * pool.stride_width + pool.kernel_width;
  const int64_t padded = columns + 2 * pool.padding_width;
  return last > padded ? last : padded;
}
inline int64_t pool_scratch(const PoolSettings& pool, const Value& in, const Value& out) {
  return 2 * out.rows * pool_row(pool, in.columns, out.columns);
}

// Value (i, j, k, l) of `sizes` is the input's at offset + i strides[0] + ...; both without gaps.
struct RearrangeSettings {
  int64_t sizes[4], strides[4], offset;
};

struct Program {
  const Step* steps;
  int64_t count;
  const int32_t* places;
  int64_t places_size;
  const float* numbers;
  int64_t numbers_size;
  int64_t input, output;  // floats of one sample
  int64_t block, plane;   // floats of memory: for all threads, and for each

  int64_t size(Place place) const;
};

// What is wrong with a program, or null: whether every access stays within memory. (Values may overlap, which a program
// that executor.py wrote does only in place: then results are nonsense, but nothing else happens.)
const char* problem(const Program& program);

// out [batch, output] of x [batch, input]. Memory is kept between calls, for each thread.
void run_network(const Program& program, const float* x, int64_t batch, float* out);

}  // namespace pqk
