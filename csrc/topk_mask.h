// Exact selection of the weights of largest magnitude: one global threshold over many tensors, and N:M groups.
//
// A weight ranks by its key: the bits of |w| as fp32, which order as the magnitudes do; bf16 and fp16 are widened first
// and rank together with fp32. -0 ties with 0 and denormals rank by value. Among equal keys the lower flat index, in
// the order of the list, stays. The results do not depend on the number of threads or on the instruction set.
#pragma once
#include "simd.h"

namespace pqk {

// One tensor of the ranking: `count` contiguous values and their mask bytes, 0 or 1 (may be null where only counted).
struct Ranked {
  const void* weight;
  Type type;
  int64_t count;
  uint8_t* mask;
};

// Keeps exactly `keep` (0..N) of the N weights. Returns -1, or the index of the first tensor that holds NaN or
// infinity; then no mask byte has been written.
int64_t topk_mask(const Ranked* tensors, int64_t count, int64_t keep);

// Of each `group` consecutive inputs keeps the `keep` largest (0 < keep < group <= 16; ties: the lower input). `weight`
// is contiguous [outer, inputs, inner] with inputs % group == 0: a linear layer has inner 1, a convolution kh * kw.
// Returns false, and writes nothing, if a weight is NaN or infinite.
bool group_mask(const void* weight, Type type, uint8_t* mask, int64_t outer, int64_t inputs, int64_t inner, int keep,
                int group);

// The steps of topk_mask for tensors that are spread over processes, which add up the counts between the steps:
//
//     prefix = 0, left = keep
//     for level in 0..2: prefix = (prefix << BITS[level]) | find_bin(sum of the histograms, level, &left)
//     threshold = prefix; of the keys equal to it, `left` stay: count_ties tells each process its share
//
// A histogram counts one digit of the keys: 11, 10 and 10 bits from the top. The last bins of level 0 count what is not
// finite: find_bin returns -1 if they are not empty.
constexpr int RADIX_LEVELS = 3;
constexpr int RADIX_BITS[RADIX_LEVELS] = {11, 10, 10};
constexpr int64_t bins(int level) { return int64_t{1} << RADIX_BITS[level]; }

// Overwrites histogram[bins(level)] with the counts over those keys whose higher digits equal `prefix`.
void magnitude_histogram(const Ranked* tensors, int64_t count, int level, uint32_t prefix, int64_t* histogram);

// The bin that holds the key of rank *left (1 is the largest). Subtracts the larger bins' counts from *left.
int64_t find_bin(const int64_t* histogram, int level, int64_t* left);

// How many keys of each tensor equal `threshold`.
void count_ties(const Ranked* tensors, int64_t count, uint32_t threshold, int64_t* ties);

// mask = key > threshold, and in tensor i the first ties_kept[i] of the keys equal to it.
void mask_at_threshold(const Ranked* tensors, int64_t count, uint32_t threshold, const int64_t* ties_kept);

}  // namespace pqk
