// The loops of fake_quant.cpp, once for each instruction set. They work in pieces, so that the conversion of low
// precision, the terms of a sum and streamed stores can go through small buffers.

namespace {

// Adding and subtracting 1.5 * 2^23 rounds |v| < 2^22 to the nearest integer, ties to even, and never gives -0.
inline float round_to_even(float v) { return (v + 0x1.8p23f) - 0x1.8p23f; }

// NaN fails both comparisons and stays.
inline float clip(float v, float q) {
  v = v < -q ? -q : v;
  return v > q ? q : v;
}

// M w / S: select, never multiply, so that a pruned NaN or infinity does not count.
inline float scaled(float weight, uint8_t mask, float inverse) { return (mask ? weight : 0.0f) * inverse; }

inline void quantize_dequantize(const float* __restrict weight, const uint8_t* __restrict mask, float* __restrict out,
                                int64_t n, float step, float q) {
  const float inverse = 1.0f / step;
  for (int64_t i = 0; i < n; ++i) {
    const float w = weight[i];  // read in any case: a load under a condition is not vectorised
    out[i] = round_to_even(clip(scaled(w, mask[i], inverse), q)) * step;
  }
}

inline void pass_through(const float* __restrict grad, const float* __restrict weight, const uint8_t* __restrict mask,
                         float* __restrict grad_weight, int64_t n, float step, float q, bool clipped, bool masked) {
  const float inverse = 1.0f / step;
  const int any_value = !clipped, any_mask = !masked;
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i], w = weight[i];
    const int inside = (__builtin_fabsf(scaled(w, mask[i], inverse)) <= q) | any_value;
    grad_weight[i] = (inside & ((mask[i] != 0) | any_mask)) ? g : 0.0f;
  }
}

inline void step_terms(const float* __restrict grad, const float* __restrict weight, const uint8_t* __restrict mask,
                       float* __restrict terms, int64_t n, float step, float q) {
  const float inverse = 1.0f / step;
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i], w = weight[i];
    const float v = clip(scaled(w, mask[i], inverse), q);
    terms[i] = g * (round_to_even(v) - (__builtin_fabsf(v) < q ? v : 0.0f));
  }
}

// The sum of many times PIECE terms, in fp64 from the first addition.
struct Sum {
  double lanes[16] = {};

  void add(const float* terms) {
    for (int64_t i = 0; i < PIECE; i += 16)
      for (int lane = 0; lane < 16; ++lane) lanes[lane] += terms[i + lane];
  }

  double total() const {
    double all = 0;
    for (double lane : lanes) all += lane;
    return all;
  }
};

}  // namespace

void fake_quant_block(const FakeQuantBlock& b) {
  alignas(64) float weights[PIECE], results[PIECE];
  for (int64_t i = 0; i < b.count; i += PIECE) {
    const int64_t n = b.count - i < PIECE ? b.count - i : PIECE;
    prefetch(b.weight, i, size_of(b.weight_type));
    prefetch(b.mask, i, 1);
    const float* weight = as_f32(at(b.weight, i, b.weight_type), b.weight_type, weights, n);
    void* out = at(b.out, i, b.out_type);
    const bool direct = b.out_type == Type::f32 && !b.stream;
    quantize_dequantize(weight, b.mask + i, direct ? static_cast<float*>(out) : results, n, b.step, b.q);
    if (b.stream)
      stream(results, static_cast<float*>(out), n);
    else if (!direct)
      narrow(results, out, b.out_type, n);
  }
}

double fake_quant_grad_block(const FakeQuantGradBlock& b) {
  alignas(64) float weights[PIECE], grads[PIECE], results[PIECE];
  Sum sum;
  for (int64_t i = 0; i < b.count; i += PIECE) {
    const int64_t n = b.count - i < PIECE ? b.count - i : PIECE;
    prefetch(b.grad, i, size_of(b.grad_type));
    prefetch(b.weight, i, size_of(b.weight_type));
    prefetch(b.mask, i, 1);
    const float* weight = as_f32(at(b.weight, i, b.weight_type), b.weight_type, weights, n);
    const float* grad = as_f32(at(b.grad, i, b.grad_type), b.grad_type, grads, n);
    if (b.grad_weight) {
      void* out = at(b.grad_weight, i, b.weight_type);
      const bool direct = b.weight_type == Type::f32;
      float* to = direct ? static_cast<float*>(out) : results;
      pass_through(grad, weight, b.mask + i, to, n, b.step, b.q, b.clipped, b.mask_gradients);
      if (!direct) narrow(results, out, b.weight_type, n);
    }
    if (b.want_step) {
      step_terms(grad, weight, b.mask + i, results, n, b.step, b.q);
      for (int64_t j = n; j < PIECE; ++j) results[j] = 0;
      sum.add(results);
    }
  }
  return sum.total();
}
