#include "dual_forward.h"

#include "blocks.h"

namespace pqk {

// What one call of the vector code works on: part of one row.
struct SplitGradientBlock {
  const void* student;
  const void* teacher;
  const uint8_t* mask;
  const void* weight;
  void* out;
  int64_t count;
  float step, q;
  Type student_type, teacher_type, weight_type;
  bool clipped;
};

}  // namespace pqk

#define PQK_KERNELS "dual_forward_kernels.h"
#include "for_each_isa.h"

namespace pqk {

void split_gradient(const SplitGradient& layer) {
  for_each_block(&layer, 1, [&](const Block& part) {
    SplitGradientBlock block;
    block.student = at(layer.grad_student, part.first, layer.student_type);
    block.teacher = at(layer.grad_teacher, part.first, layer.teacher_type);
    block.mask = layer.mask + part.first;
    block.weight = at(layer.weight, part.first, layer.weight_type);
    block.out = at(layer.grad_weight, part.first, layer.weight_type);
    block.count = part.count;
    block.step = layer.step[part.row];
    block.q = levels(layer.bits);
    block.student_type = layer.student_type;
    block.teacher_type = layer.teacher_type;
    block.weight_type = layer.weight_type;
    block.clipped = layer.clipped;
    PQK_DISPATCH(split_gradient_block, block);
  });
}

}  // namespace pqk
