// The loop of dual_forward.cpp, once for each instruction set.

namespace {

inline void select(const float* __restrict student, const float* __restrict teacher, const uint8_t* __restrict mask,
                   float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float s = student[i], t = teacher[i];
    out[i] = mask[i] ? s : t;
  }
}

inline void zero_clipped(const float* __restrict grad, const float* __restrict weight, float* __restrict out, int64_t n,
                         float step, float q) {
  const float inverse = 1.0f / step;
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i], w = weight[i];
    out[i] = __builtin_fabsf(w * inverse) <= q ? g : 0.0f;
  }
}

}  // namespace

void split_gradient_block(const SplitGradientBlock& b) {
  alignas(64) float students[PIECE], teachers[PIECE], weights[PIECE], results[PIECE];
  for (int64_t i = 0; i < b.count; i += PIECE) {
    const int64_t n = b.count - i < PIECE ? b.count - i : PIECE;
    prefetch(b.student, i, size_of(b.student_type));
    prefetch(b.teacher, i, size_of(b.teacher_type));
    prefetch(b.mask, i, 1);
    if (b.clipped) prefetch(b.weight, i, size_of(b.weight_type));
    const float* student = as_f32(at(b.student, i, b.student_type), b.student_type, students, n);
    const float* teacher = as_f32(at(b.teacher, i, b.teacher_type), b.teacher_type, teachers, n);
    if (b.clipped) {
      const float* weight = as_f32(at(b.weight, i, b.weight_type), b.weight_type, weights, n);
      zero_clipped(student, weight, students, n, b.step, b.q);
      student = students;
    }
    void* out = at(b.out, i, b.weight_type);
    const bool direct = b.weight_type == Type::f32;
    select(student, teacher, b.mask + i, direct ? static_cast<float*>(out) : results, n);
    if (!direct) narrow(results, out, b.weight_type, n);
  }
}
