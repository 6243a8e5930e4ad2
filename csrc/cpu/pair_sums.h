// Two rows of logits in one pass: they go block by block through the L1 cache together, where Σ p · (log p − log q) is
// gathered beside the sums of each.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarTypeToTypeMeta.h>

#include <utility>

#include "softmax_rows.h"

namespace rlhf_kernels {

template <typename T>
struct PairSums {
  RowSums<T> first, second;
  double difference = 0;  // Σ exp(d) · (d − d₂)

  // Whole rows.
  template <typename scalar_t>
  void add_rows(const scalar_t* x, const scalar_t* y, int64_t vocabulary, T inverse_temperature) {
    for_blocks(x, vocabulary, T(0), [&](int64_t start, int64_t n, const T* block, const scalar_t* next) {
      T buffer[kBlock];
      add(block, widened(y + start, n, buffer), n, inverse_temperature, next, y + start + kBlock);
    });
  }

  template <typename scalar_t>
  void add(const T* x, const T* y, int64_t n, T inverse, const scalar_t* next_x, const scalar_t* next_y) {
    const double before = first.sum;
    const double drop = first.rise(block_max(x, n), inverse), second_drop = second.rise(block_max(y, n), inverse);
    difference = std::exp(drop) * (difference + (drop - second_drop) * before);
    const T origin = first.base(), second_origin = second.base();
    T sums[kLanes] = {}, weighted[kLanes] = {}, second_sums[kLanes] = {}, differences[kLanes] = {};
    const auto add_one = [&](int64_t i, int64_t lane) {
      const T d = (x[i] - origin) * inverse, second_d = (y[i] - second_origin) * inverse, e = fast_exp(d);
      sums[lane] += e;
      weighted[lane] += e * bounded(d);
      second_sums[lane] += fast_exp(second_d);
      differences[lane] += e > 0 ? e * (d - second_d) : T(0);  // 0 · ∞ would be NaN
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      prefetch_lanes(next_x + i);
      prefetch_lanes(next_y + i);
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) add_one(i + lane, lane);
    }
#pragma omp simd
    for (int64_t lane = 0; lane < n - i; ++lane) add_one(i + lane, lane);
    first.sum += lane_sum(sums);
    first.weighted += lane_sum(weighted);
    second.sum += lane_sum(second_sums);
    difference += lane_sum(differences);
  }

  // KL(first ‖ second) of the two distributions.
  double kl() const {
    return first.empty() ? 0 : difference / first.sum - std::log(first.sum) + std::log(second.sum);
  }
};

// Both logits in the wider of their dtypes, so that a kernel is made for one dtype only.
inline std::pair<at::Tensor, at::Tensor> in_one_dtype(const at::Tensor& logits, const at::Tensor& ref_logits) {
  const auto type = c10::promoteTypes(logits.scalar_type(), ref_logits.scalar_type());
  return {logits.to(type), ref_logits.to(type)};
}

}  // namespace rlhf_kernels
