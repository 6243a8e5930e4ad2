// What the kernels share: checks that name op, argument, wanted and got; rows of strided tensors; option parsing.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

#include "formulas.h"

namespace rlhf_kernels {

inline void check_same_shape(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef wanted) {
  TORCH_CHECK_VALUE(tensor.sizes() == wanted, op, ": ", name, " must have shape ", wanted, ", got ", tensor.sizes());
}

inline void check_token(const char* op, int64_t token, int64_t vocabulary) {
  TORCH_CHECK_VALUE(token < vocabulary, op, ": tokens must be below V = ", vocabulary, ", got ", token);
}

// fp32 arithmetic, fp64 for fp64.
inline at::ScalarType compute_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline KlEstimator kl_estimator(const char* op, std::string_view name) {
  if (name == "k1") return KlEstimator::k1;
  if (name == "k2") return KlEstimator::k2;
  if (name == "k3") return KlEstimator::k3;
  if (name == "abs") return KlEstimator::abs;
  if (name == "pos") return KlEstimator::pos;
  TORCH_CHECK_VALUE(false, op, ": kl_estimator must be one of k1, k2, k3, abs, pos, got '", name, "'");
}

template <typename T>
Clips<T> clips_of(double cliprange, double cliprange_high, std::optional<double> dual_clip) {
  return {static_cast<T>(1 - cliprange), static_cast<T>(1 + cliprange_high), static_cast<T>(dual_clip.value_or(-1))};
}

// Row i of a tensor [..., V] with any leading strides, such as logits[:, :-1], without a copy.
class Rows {
 public:
  explicit Rows(const at::Tensor& tensor)
      : tensor_(tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous()),
        sizes_(tensor_.sizes().slice(0, tensor_.dim() - 1)),
        strides_(tensor_.strides().slice(0, tensor_.dim() - 1)) {}

  int64_t offset(int64_t row) const {
    int64_t offset = 0;
    for (int64_t dim = static_cast<int64_t>(sizes_.size()) - 1; dim >= 0; --dim) {
      offset += row % sizes_[dim] * strides_[dim];
      row /= sizes_[dim];
    }
    return offset;
  }

  template <typename T>
  const T* row(int64_t row) const {
    return tensor_.const_data_ptr<T>() + offset(row);
  }

 private:
  at::Tensor tensor_;
  at::IntArrayRef sizes_, strides_;
};

}  // namespace rlhf_kernels
