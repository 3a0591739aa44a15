// The only file, with tensors.h, that knows torch: checks what the operations get and calls the kernels.
//
// Built on torch's stable ABI, so that one library serves torch 2.11 and later. Schemas are defined in
// pqk_fast/dispatch.py; what is registered here stands in for the plain PyTorch implementation on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "batch_norm.h"
#include "dual_forward.h"
#include "fake_quant.h"
#include "int4.h"
#include "parallel.h"
#include "relu_pool.h"
#include "network.h"
#include "sparse_infer.h"
#include "tensors.h"

// Found by pqk_fast/native.py in the bytes of the file, before it is loaded.
#define PQK_TEXT_(x) #x
#define PQK_TEXT(x) PQK_TEXT_(x)
extern "C" __attribute__((visibility("default"), used)) const char pqk_fast_build[] =
    "pqk_fast build: sources=" PQK_TEXT(PQK_SOURCES) " torch=" PQK_TEXT(PQK_TORCH) " compiler=" __VERSION__ "\n";

extern "C" __attribute__((visibility("default"))) const char* pqk_fast_isa() { return pqk::name_of(pqk::isa()); }

namespace pqk {

void run_parallel(int64_t n, int64_t grain, RangeBody body, const void* context) {
  if (n <= grain) return body(context, 0, n);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

namespace {

void check_lists(size_t weights, size_t masks, size_t steps, size_t bits) {
  STD_TORCH_CHECK(weights == masks && weights == steps && weights == bits,
                  "weights, masks, steps and bits must have one entry for each layer, got ", weights, ", ", masks,
                  ", ", steps, " and ", bits);
}

std::vector<Tensor> fake_quant_all(std::vector<Tensor> weights, std::vector<Tensor> masks, std::vector<Tensor> steps,
                                   std::vector<int64_t> bits, ScalarType dtype) {
  const size_t count = weights.size();
  check_lists(count, masks.size(), steps.size(), bits.size());
  std::vector<Operand> operands;
  std::vector<Result> results;
  std::vector<FakeQuantLayer> layers;
  operands.reserve(count), results.reserve(count), layers.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Operand& o = operands.emplace_back(weights[i], masks[i], steps[i], bits[i]);
    const Result& r = results.emplace_back(weights[i], o, dtype);
    layers.push_back({o.weight.const_data_ptr(), o.type(), bytes(o.mask),
                      static_cast<const float*>(o.step.const_data_ptr()), o.rows, o.columns, static_cast<int>(bits[i]),
                      r.written.mutable_data_ptr(), type_of(r.written, "dtype")});
  }
  fake_quant(layers.data(), static_cast<int64_t>(count));
  std::vector<Tensor> out;
  out.reserve(count);
  for (Result& result : results) out.push_back(result.finished());
  return out;
}

Tensor fake_quant_one(const Tensor& weight, const Tensor& mask, const Tensor& step, int64_t bits, ScalarType dtype) {
  return fake_quant_all({weight}, {mask}, {step}, {bits}, dtype)[0];
}

// Gradients that are not wanted come back as an empty list.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> fake_quant_all_backward(
    std::vector<Tensor> grads, std::vector<Tensor> weights, std::vector<Tensor> masks, std::vector<Tensor> steps,
    std::vector<int64_t> bits, bool clipped, bool mask_gradients, bool need_weight, bool need_step) {
  const size_t count = weights.size();
  check_lists(count, masks.size(), steps.size(), bits.size());
  STD_TORCH_CHECK(grads.size() == count, "expected ", count, " gradients, got ", grads.size());
  std::vector<Operand> operands;
  std::vector<Tensor> upstream;
  std::vector<Result> results;
  std::vector<Tensor> grad_weights, grad_steps;
  std::vector<FakeQuantGradLayer> layers;
  operands.reserve(count), upstream.reserve(count), results.reserve(count), layers.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Operand& o = operands.emplace_back(weights[i], masks[i], steps[i], bits[i]);
    const Tensor& grad = upstream.emplace_back(o.upstream(grads[i]));
    FakeQuantGradLayer layer = {grad.const_data_ptr(), type_of(grad, "grad"), o.weight.const_data_ptr(), o.type(),
                                bytes(o.mask), static_cast<const float*>(o.step.const_data_ptr()), o.rows, o.columns,
                                static_cast<int>(bits[i]), nullptr, nullptr};
    if (need_weight) {
      const Result& r = results.emplace_back(weights[i], o, weights[i].scalar_type());
      layer.grad_weight = r.written.mutable_data_ptr();
    }
    if (need_step) {
      grad_steps.push_back(empty_like(o.step, ScalarType::Float));
      layer.grad_step = static_cast<float*>(grad_steps.back().mutable_data_ptr());
    }
    layers.push_back(layer);
  }
  fake_quant_backward(layers.data(), static_cast<int64_t>(count), clipped, mask_gradients);
  for (Result& result : results) grad_weights.push_back(result.finished());
  return {grad_weights, grad_steps};
}

std::tuple<Tensor, Tensor> fake_quant_one_backward(const Tensor& grad, const Tensor& weight, const Tensor& mask,
                                                   const Tensor& step, int64_t bits, bool clipped, bool mask_gradients,
                                                   bool need_weight, bool need_step) {
  const auto [grad_weights, grad_steps] = fake_quant_all_backward(
      {grad}, {weight}, {mask}, {step}, {bits}, clipped, mask_gradients, need_weight, need_step);
  return {need_weight ? grad_weights[0] : torch::stable::new_empty(weight, {0}),
          need_step ? grad_steps[0] : torch::stable::new_empty(step, {0}, ScalarType::Float)};
}

Tensor dual_weight_backward(const Tensor& grad_student, const Tensor& grad_teacher, const Tensor& weight,
                            const Tensor& mask, const Tensor& step, int64_t bits, bool clipped) {
  const Operand o(weight, mask, step, bits);
  const Tensor student = o.upstream(grad_student), teacher = o.upstream(grad_teacher);
  Result r(weight, o, weight.scalar_type());
  split_gradient({student.const_data_ptr(), teacher.const_data_ptr(), type_of(student, "grad"),
                  type_of(teacher, "grad"), bytes(o.mask), o.weight.const_data_ptr(), o.type(),
                  static_cast<const float*>(o.step.const_data_ptr()), o.rows, o.columns, static_cast<int>(bits),
                  clipped, r.written.mutable_data_ptr()});
  return r.finished();
}

Tensor select_largest(std::vector<Tensor> masks, std::vector<Tensor> weights, const Tensor& keep) {
  Ranking ranking(weights, &masks);
  const int64_t wanted = std::clamp<int64_t>(value_of(keep, "keep"), 0, ranking.total);
  const int64_t bad = topk_mask(ranking.tensors.data(), ranking.count(), wanted);
  if (bad < 0) ranking.finish();
  return as_tensor(bad, keep);
}

Tensor select_in_groups(const Tensor& mask, const Tensor& weight, int64_t keep, int64_t group) {
  STD_TORCH_CHECK(0 < keep && keep < group && group <= 16, "expected 0 < keep < group <= 16, got ", keep, " of ", group);
  STD_TORCH_CHECK(weight.dim() >= 2 && weight.size(1) % group == 0, "inputs must be a multiple of ", group);
  const std::vector<Tensor> masks = {mask};
  Ranking ranking({weight}, &masks);
  const Ranked& only = ranking.tensors[0];
  const int64_t outer = weight.size(0), inputs = weight.size(1);
  const int64_t inner = outer > 0 && inputs > 0 ? only.count / (outer * inputs) : 0;
  const bool finite = group_mask(only.weight, only.type, only.mask, outer, inputs, inner, keep, group);
  if (finite) ranking.finish();
  return as_tensor(finite ? -1 : 0, mask);
}

Tensor histogram_of(std::vector<Tensor> weights, int64_t level, const Tensor& prefix) {
  STD_TORCH_CHECK(level >= 0 && level < RADIX_LEVELS, "level must be in 0..2, got ", level);
  const Ranking ranking(weights);
  const Tensor counts = torch::stable::new_empty(prefix, {bins(level)}, ScalarType::Long);
  magnitude_histogram(ranking.tensors.data(), ranking.count(), level, key_of(prefix, "prefix"),
                      static_cast<int64_t*>(counts.mutable_data_ptr()));
  return counts;
}

Tensor ties_of(std::vector<Tensor> weights, const Tensor& threshold) {
  const Ranking ranking(weights);
  const Tensor counts = torch::stable::new_empty(threshold, {ranking.count()}, ScalarType::Long);
  count_ties(ranking.tensors.data(), ranking.count(), key_of(threshold, "threshold"),
             static_cast<int64_t*>(counts.mutable_data_ptr()));
  return counts;
}

void select_above(std::vector<Tensor> masks, std::vector<Tensor> weights, const Tensor& threshold,
                  const Tensor& ties_kept) {
  Ranking ranking(weights, &masks);
  STD_TORCH_CHECK(ties_kept.is_cpu() && ties_kept.scalar_type() == ScalarType::Long &&
                      ties_kept.numel() == ranking.count(),
                  "ties_kept must be int64 with one count for each weight");
  const Tensor kept = torch::stable::contiguous(ties_kept);
  mask_at_threshold(ranking.tensors.data(), ranking.count(), key_of(threshold, "threshold"),
                    static_cast<const int64_t*>(kept.const_data_ptr()));
  ranking.finish();
}

float* written(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> normalize(const Tensor& x, std::optional<Tensor> weight,
                                                     std::optional<Tensor> bias, double eps) {
  const float* values = of_activations(x, "x");
  const int64_t channels = x.size(1);
  const float* scale = of_channels(weight, channels, "weight");
  const float* shift = of_channels(bias, channels, "bias");
  const Tensor out = empty_like(x, ScalarType::Float), mean = torch::stable::new_empty(x, {channels});
  const Tensor variance = torch::stable::new_empty(x, {channels}), rstd = torch::stable::new_empty(x, {channels});
  batch_norm(values, x.numel() / channels, channels, scale, shift, static_cast<float>(eps), written(out), written(mean),
             written(variance), written(rstd));
  return {out, mean, variance, rstd};
}

std::tuple<Tensor, Tensor, Tensor> normalize_backward(const Tensor& grad_, const Tensor& x,
                                                      std::optional<Tensor> weight, const Tensor& mean,
                                                      const Tensor& rstd) {
  const float* values = of_activations(x, "x");
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(grad_.is_cpu() && same_shape(grad_, x), "grad must be of x's shape");
  const Tensor grad = relaid(grad_, x);
  const float* upstream = of_activations(grad, "grad");
  const Tensor grad_x = empty_like(x, ScalarType::Float), grad_weight = torch::stable::new_empty(x, {channels});
  const Tensor grad_bias = torch::stable::new_empty(x, {channels});
  batch_norm_backward(upstream, values, x.numel() / channels, channels, of_channels(weight, channels, "weight"),
                      of_channels(mean, channels, "mean"), of_channels(rstd, channels, "rstd"), written(grad_x),
                      written(grad_weight), written(grad_bias));
  return {grad_x, grad_weight, grad_bias};
}

PoolShape pool_shape(const Tensor& x, int64_t kernel_height, int64_t kernel_width) {
  STD_TORCH_CHECK(x.dim() == 4 && 0 < kernel_height && kernel_height <= x.size(2) && 0 < kernel_width &&
                      kernel_width <= x.size(3),
                  "expected a 4-d x that a window of ", kernel_height, " by ", kernel_width, " fits into");
  return {x.size(0), x.size(2), x.size(3), x.size(1), kernel_height, kernel_width};
}

Tensor relu_pool(const Tensor& x, int64_t kernel_height, int64_t kernel_width) {
  const float* values = of_activations(x, "x");
  const PoolShape shape = pool_shape(x, kernel_height, kernel_width);
  const Tensor out = empty_channels_last({shape.batch, shape.channels, shape.pooled_height(), shape.pooled_width()});
  relu_avg_pool(values, shape, written(out));
  return out;
}

Tensor relu_pool_backward(const Tensor& grad_, const Tensor& x, int64_t kernel_height, int64_t kernel_width) {
  const float* values = of_activations(x, "x");
  const PoolShape shape = pool_shape(x, kernel_height, kernel_width);
  const std::array<int64_t, 4> pooled{shape.batch, shape.channels, shape.pooled_height(), shape.pooled_width()};
  STD_TORCH_CHECK(grad_.is_cpu() && grad_.scalar_type() == ScalarType::Float && grad_.dim() == 4 &&
                      std::equal(pooled.begin(), pooled.end(), grad_.sizes().begin()),
                  "grad must be fp32, on the CPU and of the result's shape");
  Tensor grad = grad_;
  if (!is_channels_last(grad)) torch::stable::copy_(grad = empty_channels_last(pooled), grad_);
  const Tensor grad_x = empty_like(x, ScalarType::Float);
  relu_avg_pool_backward(of_activations(grad, "grad"), values, shape, written(grad_x));
  return grad_x;
}

// Nothing is read before all places are known to lie within the padded planes.
Taps checked_taps(const Tensor& first, const Tensor& offset, const Tensor& value, const SparseShape& shape) {
  const int64_t taps = value.numel();
  STD_TORCH_CHECK(first.is_cpu() && offset.is_cpu() && value.is_cpu() && first.is_contiguous() &&
                      offset.is_contiguous() && value.is_contiguous() && first.scalar_type() == ScalarType::Int &&
                      offset.scalar_type() == ScalarType::Int && value.scalar_type() == ScalarType::Float &&
                      first.numel() == shape.outputs + 1 && offset.numel() == taps,
                  "first and offset must be int32, value fp32, contiguous and on the CPU, with one entry for each tap");
  const Taps made{static_cast<const int32_t*>(first.const_data_ptr()),
                  static_cast<const int32_t*>(offset.const_data_ptr()), static_cast<const float*>(value.const_data_ptr())};
  bool rising = made.first[0] == 0 && made.first[shape.outputs] == taps, within = true;
  for (int64_t o = 0; o < shape.outputs; ++o) rising &= made.first[o] <= made.first[o + 1];
  const int64_t last = shape.padded_size() - shape.positions();
  for (int64_t t = 0; t < taps; ++t) within &= made.offset[t] >= 0 && made.offset[t] <= last;
  STD_TORCH_CHECK(rising && within, "the taps do not lie within the padded input: they are of another size");
  return made;
}

Tensor sparse_conv(const Tensor& x_, const Tensor& first, const Tensor& offset, const Tensor& value,
                   std::optional<Tensor> bias, std::vector<int64_t> geometry, bool relu) {
  STD_TORCH_CHECK(x_.is_cpu() && x_.scalar_type() == ScalarType::Float && x_.dim() == 4,
                  "x must be fp32 [B, C, H, W] on the CPU");
  STD_TORCH_CHECK(geometry.size() == 6 && first.numel() > 0 && std::min({geometry[0], geometry[1], geometry[2], geometry[3]}) > 0 &&
                      std::min(geometry[4], geometry[5]) >= 0,
                  "geometry must be the kernel's reach, stride and padding, two each");
  const Tensor x = torch::stable::contiguous(x_);
  const SparseShape shape{x.size(0),   x.size(1),   x.size(2),   x.size(3),   first.numel() - 1, geometry[0],
                          geometry[1], geometry[2], geometry[3], geometry[4], geometry[5]};
  STD_TORCH_CHECK(shape.height + 2 * shape.padding_height >= shape.kernel_height &&
                      shape.width + 2 * shape.padding_width >= shape.kernel_width,
                  "the kernel is larger than the padded input");
  const Taps taps = checked_taps(first, offset, value, shape);
  const Tensor out = torch::stable::new_empty(x, {shape.batch, shape.outputs, shape.out_height(), shape.out_width()});
  sparse_conv2d(static_cast<const float*>(x.const_data_ptr()), shape, taps, of_channels(bias, shape.outputs, "bias"), relu,
                written(out));
  return out;
}

// The whole program is looked at before anything runs; that takes as long as reading it once.
Tensor run_program(const Tensor& x_, const Tensor& steps, const Tensor& places, const Tensor& numbers,
                   std::vector<int64_t> sizes) {
  constexpr int64_t fields = sizeof(Step) / sizeof(int64_t);
  STD_TORCH_CHECK(x_.is_cpu() && x_.scalar_type() == ScalarType::Float, "x must be fp32 on the CPU");
  STD_TORCH_CHECK(steps.is_cpu() && places.is_cpu() && numbers.is_cpu() && steps.is_contiguous() &&
                      places.is_contiguous() && numbers.is_contiguous() && steps.scalar_type() == ScalarType::Long &&
                      places.scalar_type() == ScalarType::Int && numbers.scalar_type() == ScalarType::Float &&
                      steps.numel() % fields == 0 && sizes.size() == 4,
                  "expected a program as pqk_fast.deploy.executor writes it: int64, int32 and fp32");
  const Program program{static_cast<const Step*>(steps.const_data_ptr()), steps.numel() / fields,
                        static_cast<const int32_t*>(places.const_data_ptr()), places.numel(),
                        static_cast<const float*>(numbers.const_data_ptr()), numbers.numel(),
                        sizes[0], sizes[1], sizes[2], sizes[3]};
  const char* wrong = problem(program);
  STD_TORCH_CHECK(!wrong, "this program cannot be run: ", wrong);
  const Tensor x = torch::stable::contiguous(x_);
  STD_TORCH_CHECK(program.input > 0 && x.numel() % program.input == 0, "expected ", program.input,
                  " values a sample, got ", x.numel());
  const int64_t batch = x.numel() / program.input;
  const Tensor out = torch::stable::new_empty(x, {batch, program.output});
  run_network(program, static_cast<const float*>(x.const_data_ptr()), batch, written(out));
  return out;
}

Tensor bytes_like(const Tensor& values, int64_t size, ScalarType dtype) {
  return torch::stable::new_empty(values, {size}, dtype);
}

Tensor pack(const Tensor& q_, int64_t bits) {
  STD_TORCH_CHECK(q_.is_cpu() && q_.scalar_type() == ScalarType::Char, "q must be int8 on the CPU");
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits must be in 2..8, got ", bits);
  const Tensor q = torch::stable::contiguous(q_);
  const Tensor packed = bytes_like(q, packed_size(q.numel(), bits), ScalarType::Byte);
  const bool fits = pack_ints(static_cast<const int8_t*>(q.const_data_ptr()), q.numel(), bits,
                              static_cast<uint8_t*>(packed.mutable_data_ptr()));
  STD_TORCH_CHECK(fits, "expected values of ", bits, " bits");
  return packed;
}

// Sizes are the caller's word; nothing is read before they are known to agree with the memory that is there.
Tensor checked_bytes(const Tensor& packed, int64_t numel, int64_t bits) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 1,
                  "packed must be flat uint8 on the CPU");
  STD_TORCH_CHECK(numel >= 0 && packed.numel() == packed_size(numel, bits), numel, " values of ", bits,
                  " bits do not take ", packed.numel(), " bytes");
  return torch::stable::contiguous(packed);
}

Tensor unpack(const Tensor& packed_, int64_t numel, int64_t bits) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits must be in 2..8, got ", bits);
  const Tensor packed = checked_bytes(packed_, numel, bits);
  const Tensor values = bytes_like(packed, numel, ScalarType::Char);
  unpack_ints(bytes(packed), numel, bits, static_cast<int8_t*>(values.mutable_data_ptr()));
  return values;
}

Tensor pack_bits(const Tensor& mask_) {
  STD_TORCH_CHECK(mask_.is_cpu() && mask_.scalar_type() == ScalarType::Bool, "mask must be bool on the CPU");
  const Tensor mask = torch::stable::contiguous(mask_);
  const Tensor packed = bytes_like(mask, packed_size(mask.numel(), 1), ScalarType::Byte);
  pack_mask(bytes(mask), mask.numel(), static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor unpack_bits(const Tensor& packed_, int64_t numel) {
  const Tensor packed = checked_bytes(packed_, numel, 1);
  const Tensor mask = bytes_like(packed, numel, ScalarType::Bool);
  unpack_mask(bytes(packed), numel, static_cast<uint8_t*>(mask.mutable_data_ptr()));
  return mask;
}

}  // namespace
}  // namespace pqk

STABLE_TORCH_LIBRARY_IMPL(pqk_fast, CPU, m) {
  m.impl("fake_quant", TORCH_BOX(&pqk::fake_quant_one));
  m.impl("fake_quant_backward", TORCH_BOX(&pqk::fake_quant_one_backward));
  m.impl("fake_quant_all", TORCH_BOX(&pqk::fake_quant_all));
  m.impl("fake_quant_all_backward", TORCH_BOX(&pqk::fake_quant_all_backward));
  m.impl("dual_weight_backward", TORCH_BOX(&pqk::dual_weight_backward));
  m.impl("topk_mask_", TORCH_BOX(&pqk::select_largest));
  m.impl("group_mask_", TORCH_BOX(&pqk::select_in_groups));
  m.impl("magnitude_histogram", TORCH_BOX(&pqk::histogram_of));
  m.impl("tie_counts", TORCH_BOX(&pqk::ties_of));
  m.impl("mask_at_threshold_", TORCH_BOX(&pqk::select_above));
  m.impl("batch_norm", TORCH_BOX(&pqk::normalize));
  m.impl("batch_norm_backward", TORCH_BOX(&pqk::normalize_backward));
  m.impl("relu_avg_pool2d", TORCH_BOX(&pqk::relu_pool));
  m.impl("relu_avg_pool2d_backward", TORCH_BOX(&pqk::relu_pool_backward));
  m.impl("sparse_conv2d", TORCH_BOX(&pqk::sparse_conv));
  m.impl("run_network", TORCH_BOX(&pqk::run_program));
  m.impl("pack_ints", TORCH_BOX(&pqk::pack));
  m.impl("unpack_ints", TORCH_BOX(&pqk::unpack));
  m.impl("pack_bits", TORCH_BOX(&pqk::pack_bits));
  m.impl("unpack_bits", TORCH_BOX(&pqk::unpack_bits));
}
