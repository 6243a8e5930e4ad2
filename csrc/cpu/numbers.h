// Small tensors as vectors of doubles or integers, and back, for ops on a number per response.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <vector>

namespace rlhf_kernels {

inline std::vector<double> doubles(const at::Tensor& tensor) {
  const at::Tensor wide = tensor.to(at::kDouble).contiguous();
  return std::vector<double>(wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel());
}

inline std::vector<int64_t> integers(const at::Tensor& tensor) {
  const at::Tensor wide = tensor.to(at::kLong).contiguous();
  return std::vector<int64_t>(wide.const_data_ptr<int64_t>(), wide.const_data_ptr<int64_t>() + wide.numel());
}

inline at::Tensor tensor_of(const double* values, at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor result = at::empty(sizes, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, result.scalar_type(), "tensor_of", [&] {
    auto* out = result.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < result.numel(); ++i) out[i] = static_cast<scalar_t>(values[i]);
  });
  return result;
}

}  // namespace rlhf_kernels
