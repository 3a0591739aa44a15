#include "fake_quant.h"

#include "blocks.h"

namespace pqk {

// What one call of the vector code works on: part of one row.
struct FakeQuantBlock {
  const void* weight;
  const uint8_t* mask;
  void* out;
  int64_t count;
  float step, q;
  Type weight_type, out_type;
  bool stream;
};

struct FakeQuantGradBlock {
  const void* grad;
  const void* weight;
  const uint8_t* mask;
  void* grad_weight;
  int64_t count;
  float step, q;
  Type grad_type, weight_type;
  bool want_step, clipped, mask_gradients;
};

}  // namespace pqk

#define PQK_KERNELS "fake_quant_kernels.h"
#include "for_each_isa.h"

namespace pqk {

// Bytes of output that no cache would hold until it is used: these are written past the caches.
static constexpr int64_t STREAMED = 24 << 20;

void fake_quant(const FakeQuantLayer* layers, int64_t count) {
  for_each_block(layers, count, [&](const Block& part) {
    const FakeQuantLayer& layer = layers[part.layer];
    FakeQuantBlock block;
    block.weight = at(layer.weight, part.first, layer.weight_type);
    block.mask = layer.mask + part.first;
    block.out = at(layer.out, part.first, layer.out_type);
    block.count = part.count;
    block.step = layer.step[part.row];
    block.q = levels(layer.bits);
    block.weight_type = layer.weight_type;
    block.out_type = layer.out_type;
    const bool large = layer.out_type == Type::f32 && layer.rows * layer.columns * 4 >= STREAMED;
    block.stream = large && part.count % 16 == 0 && reinterpret_cast<uintptr_t>(block.out) % 64 == 0;
    PQK_DISPATCH(fake_quant_block, block);
  });
}

void fake_quant_backward(const FakeQuantGradLayer* layers, int64_t count, bool clipped, bool mask_gradients) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) blocks += layers[i].rows * blocks_in_a_row(layers[i].columns);
  std::vector<double> sums(blocks);
  for_each_block(layers, count, [&](const Block& part) {
    const FakeQuantGradLayer& layer = layers[part.layer];
    FakeQuantGradBlock block;
    block.grad = at(layer.grad, part.first, layer.grad_type);
    block.weight = at(layer.weight, part.first, layer.weight_type);
    block.mask = layer.mask + part.first;
    block.grad_weight = layer.grad_weight ? at(layer.grad_weight, part.first, layer.weight_type) : nullptr;
    block.count = part.count;
    block.step = layer.step[part.row];
    block.q = levels(layer.bits);
    block.grad_type = layer.grad_type;
    block.weight_type = layer.weight_type;
    block.want_step = layer.grad_step != nullptr;
    block.clipped = clipped;
    block.mask_gradients = mask_gradients;
    sums[part.index] = PQK_DISPATCH(fake_quant_grad_block, block);
  });
  const double* sum = sums.data();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t each = blocks_in_a_row(layers[i].columns);
    for (int64_t row = 0; row < layers[i].rows; ++row) {
      double total = 0;
      for (int64_t block = 0; block < each; ++block) total += *sum++;
      if (layers[i].grad_step) layers[i].grad_step[row] = static_cast<float>(total);
    }
  }
}

}  // namespace pqk
