// Small tensors as vectors of doubles or integers, and back, and ids as groups, for ops on a number per response.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <unordered_map>
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

// Which of the different ids each one is, numbered as they come.
struct Groups {
  std::vector<int64_t> of;  // the group of each id
  std::vector<int64_t> sizes;
};

inline Groups groups_of(const std::vector<int64_t>& ids) {
  Groups groups;
  if (ids.empty()) return groups;
  groups.of.resize(ids.size());
  const auto number = [&](int64_t& group) {  // −1: not seen before
    if (group < 0) {
      group = static_cast<int64_t>(groups.sizes.size());
      groups.sizes.push_back(0);
    }
    ++groups.sizes[group];
    return group;
  };
  const auto [low, high] = std::minmax_element(ids.begin(), ids.end());
  const int64_t lowest = *low;
  const auto range = static_cast<uint64_t>(*high) - static_cast<uint64_t>(lowest);
  if (range < 4 * ids.size()) {  // most often they count prompts
    std::vector<int64_t> table(range + 1, -1);
    for (size_t i = 0; i < ids.size(); ++i) groups.of[i] = number(table[ids[i] - lowest]);
  } else {
    std::unordered_map<int64_t, int64_t> table;
    for (size_t i = 0; i < ids.size(); ++i) groups.of[i] = number(table.try_emplace(ids[i], -1).first->second);
  }
  return groups;
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
