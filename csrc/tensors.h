// What library.cpp knows of tensors: checks, layouts, and their memory as the kernels take it.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "simd.h"
#include "topk_mask.h"

namespace pqk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Type type_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Type::f32;
  if (type == ScalarType::BFloat16) return Type::bf16;
  STD_TORCH_CHECK(type == ScalarType::Half, name, " must be fp32, bf16 or fp16, got ", toString(type));
  return Type::f16;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

// Strides of dimensions of size 1 say nothing.
bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

// [N, C, ...] with the channels last in memory: dense, and the slices along dimension 0 still follow each other.
bool is_channels_last(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  if (dims < 4 || tensor.numel() == 0) return false;
  int64_t expected = 1;
  const auto holds = [&](int64_t i) {
    const bool fits = tensor.size(i) == 1 || tensor.stride(i) == expected;
    expected *= tensor.size(i);
    return fits;
  };
  bool result = holds(1);
  for (int64_t i = dims - 1; i > 1; --i) result = result && holds(i);
  return result && holds(0);
}

// fp32 on the CPU, [N, C, H, W] with the channels last in memory.
Tensor empty_channels_last(const std::array<int64_t, 4>& sizes) {
  const std::array<int64_t, 4> strides{sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), strides.data(), aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// As torch.empty_like. For dense tensors by the direct way: a call through the dispatcher takes longer than a small
// layer's whole forward.
Tensor empty_like(const Tensor& self, ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (self.is_contiguous() || is_channels_last(self)) {
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(self.dim(), self.sizes().data(), self.strides().data(),
                                                    to<int32_t>(from(dtype)), aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
  }
  std::array<StableIValue, 6> stack{from(self),         from(std::optional(dtype)), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt),         from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor relaid(const Tensor& tensor, const Tensor& like) {
  if (same_layout(tensor, like)) return tensor;
  Tensor result = empty_like(like, tensor.scalar_type());
  torch::stable::copy_(result, tensor);
  return result;
}

// A weight with its mask and step size as contiguous memory, rows first.
struct Operand {
  Tensor weight, mask, step;
  int64_t rows, columns;

  Operand(const Tensor& weight_, const Tensor& mask_, const Tensor& step_, int64_t bits) {
    STD_TORCH_CHECK(weight_.is_cpu() && mask_.is_cpu() && step_.is_cpu(), "expected tensors on the CPU");
    STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits must be in 2..8, got ", bits);
    type_of(weight_, "weight");
    STD_TORCH_CHECK(mask_.scalar_type() == ScalarType::Bool && same_shape(mask_, weight_),
                    "mask must be bool of the weight's shape");
    const int64_t channels = weight_.dim() ? weight_.size(0) : 1;
    rows = step_.numel();
    STD_TORCH_CHECK(step_.dim() <= 1 && (rows == 1 || rows == channels), "step must have one value or ", channels,
                    ", got ", rows);
    columns = rows ? weight_.numel() / rows : 0;
    const bool usable = weight_.is_contiguous() || is_channels_last(weight_);
    weight = usable ? weight_ : torch::stable::contiguous(weight_);
    mask = relaid(mask_, weight);
    step = step_.scalar_type() == ScalarType::Float ? step_ : torch::stable::to(step_, ScalarType::Float);
    step = torch::stable::contiguous(step);
  }

  Type type() const { return type_of(weight, "weight"); }

  // A gradient in the weight's layout.
  Tensor upstream(const Tensor& grad) const {
    STD_TORCH_CHECK(grad.is_cpu() && same_shape(grad, weight), "grad must be on the CPU and of the weight's shape");
    type_of(grad, "grad");
    return relaid(grad, weight);
  }
};

const uint8_t* bytes(const Tensor& mask) { return static_cast<const uint8_t*>(mask.const_data_ptr()); }

// What an operation returns must be laid out as torch.empty_like(weight) says, which the kernels may not be able to
// write: they then write a contiguous tensor that is copied at the end.
struct Result {
  Tensor returned, written;

  Result(const Tensor& weight, const Operand& operand, ScalarType dtype)
      : returned(empty_like(weight, dtype)),
        written(same_layout(returned, operand.weight) ? returned : empty_like(operand.weight, dtype)) {}

  Tensor finished() {
    if (written.get() != returned.get()) torch::stable::copy_(returned, written);
    return returned;
  }
};

// Weights in flat order with their masks. A mask that is not contiguous is written aside and copied by finish().
struct Ranking {
  std::vector<Tensor> weights, masks, written;
  std::vector<Ranked> tensors;
  int64_t total = 0;

  explicit Ranking(const std::vector<Tensor>& weights_, const std::vector<Tensor>* masks_ = nullptr) {
    STD_TORCH_CHECK(!masks_ || masks_->size() == weights_.size(), "expected one mask for each weight");
    for (size_t i = 0; i < weights_.size(); ++i) {
      STD_TORCH_CHECK(weights_[i].is_cpu(), "expected tensors on the CPU");
      const Tensor& weight = weights.emplace_back(torch::stable::contiguous(weights_[i]));
      uint8_t* out = nullptr;
      if (masks_) {
        const Tensor& mask = masks.emplace_back((*masks_)[i]);
        STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Bool && same_shape(mask, weight),
                        "mask must be bool of the weight's shape");
        written.push_back(mask.is_contiguous() ? mask : torch::stable::new_empty(mask, mask.sizes()));
        out = static_cast<uint8_t*>(written.back().mutable_data_ptr());
      }
      tensors.push_back({weight.const_data_ptr(), type_of(weight, "weight"), weight.numel(), out});
      total += weight.numel();
    }
  }

  int64_t count() const { return static_cast<int64_t>(tensors.size()); }

  void finish() {
    for (size_t i = 0; i < masks.size(); ++i)
      if (!masks[i].is_contiguous()) torch::stable::copy_(masks[i], written[i]);
  }
};

int64_t value_of(const Tensor& scalar, const char* name) {
  STD_TORCH_CHECK(scalar.is_cpu() && scalar.numel() == 1, name, " must be one number on the CPU");
  if (scalar.scalar_type() == ScalarType::Int) return *static_cast<const int32_t*>(scalar.const_data_ptr());
  STD_TORCH_CHECK(scalar.scalar_type() == ScalarType::Long, name, " must be int32 or int64");
  return *static_cast<const int64_t*>(scalar.const_data_ptr());
}

Tensor as_tensor(int64_t value, const Tensor& like) {
  Tensor result = torch::stable::new_empty(like, {}, ScalarType::Long);
  *static_cast<int64_t*>(result.mutable_data_ptr()) = value;
  return result;
}

uint32_t key_of(const Tensor& scalar, const char* name) {
  const int64_t value = value_of(scalar, name);
  STD_TORCH_CHECK(value >= 0 && value < (int64_t{1} << 31), name, " must have 31 bits, got ", value);
  return static_cast<uint32_t>(value);
}

// fp32 values of channels, or null where there are none.
const float* of_channels(const std::optional<Tensor>& values, int64_t channels, const char* name) {
  if (!values) return nullptr;
  STD_TORCH_CHECK(values->is_cpu() && values->scalar_type() == ScalarType::Float && values->dim() == 1 &&
                      values->size(0) == channels && values->is_contiguous(),
                  name, " must be fp32 with ", channels, " values");
  return static_cast<const float*>(values->const_data_ptr());
}

const float* of_activations(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && is_channels_last(x), name,
                  " must be fp32, channels_last and on the CPU");
  return static_cast<const float*>(x.const_data_ptr());
}

}  // namespace
}  // namespace pqk
