// The attention of one query per sequence. Work is split over (sequence, key head): each key is read once for all the
// query heads that share it. The rows of the key heads are then added in order.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "common.h"
#include "rows.h"
#include "simd.h"

namespace rlhf_kernels {
namespace {

// ⟨query, key⟩; a width that the compiler knows leaves no loop.
template <int64_t width, typename T>
T dot(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < (width ? width : n); ++i) sum += a[i] * b[i];
  return sum;
}

// Scores of one key under the `group` queries that share it, `stride` apart.
template <int64_t width, typename T>
void key_scores(const T* queries, const T* key, int64_t n, int64_t group, T scale, int64_t stride, T* scores) {
  for (int64_t g = 0; g < group; ++g) scores[g * stride] = scale * dot<width>(queries + g * n, key, n);
}

// Softmax over scores[first, last], in place; `sink` joins the denominator. Places that are not attended hold −inf.
template <typename T>
void softmax(T* scores, int64_t n, std::optional<T> sink) {
  T highest = block_max(scores, n);
  if (sink && *sink > highest) highest = *sink;
  if (highest == -std::numeric_limits<T>::infinity()) highest = 0;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = fast_exp(scores[i] - highest);
    sum += scores[i];
  }
  if (sink) sum += std::exp(*sink - highest);
  const T scale = sum > 0 ? 1 / sum : (sum == 0 ? T(0) : sum);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) scores[i] *= scale;
}

at::Tensor attention_row_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& key_mask,
                             const std::optional<at::Tensor>& sink, double scale, std::optional<double> softcap,
                             std::optional<int64_t> window) {
  const int64_t batch = query.size(0), heads = query.size(1), dim = query.size(2);
  const int64_t key_heads = key.size(1), length = key.size(2);
  TORCH_CHECK_VALUE(key_heads > 0 && heads % key_heads == 0, "attention_row: key must have a number of heads that divides ",
                    heads, ", got ", key_heads);
  check_same_shape("attention_row", "key", key, {batch, key_heads, length, dim});
  check_same_shape("attention_row", "key_mask", key_mask, {batch, length});
  const int64_t group = heads / key_heads;
  const auto type = compute_type(query);
  const at::Tensor q = query.to(type).contiguous(), mask = key_mask.contiguous();
  const at::Tensor sinks = sink ? sink->to(type).contiguous() : at::Tensor();
  const Rows keys(key);
  at::Tensor partial = at::empty({batch, key_heads, length}, q.options()), out = at::zeros({batch, length}, q.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, key.scalar_type(), "attention_row", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto* qp = q.const_data_ptr<T>();
    const auto* mp = mask.const_data_ptr<bool>();
    const auto* sp = sink ? sinks.const_data_ptr<T>() : nullptr;
    auto* rows = partial.mutable_data_ptr<T>();
    const auto score_key = dim == 64 ? key_scores<64, T> : dim == 128 ? key_scores<128, T> : key_scores<0, T>;
    at::parallel_for(0, batch * key_heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> scores(group * length), widened_key(dim);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / key_heads, h = i % key_heads;
        const bool* attended = mp + b * length;
        const int64_t last = last_true(attended, length);
        const int64_t first = window ? std::max<int64_t>(0, last + 1 - *window) : 0;
        std::fill(scores.begin(), scores.end(), -std::numeric_limits<T>::infinity());
        const T* queries = qp + (b * heads + h * group) * dim;
        for (int64_t t = first; t <= last; ++t) {
          if (!attended[t]) continue;
          const T* k = widened(keys.row<scalar_t>(i * length + t), dim, widened_key.data());
          score_key(queries, k, dim, group, static_cast<T>(scale), length, scores.data() + t);
          for (int64_t g = 0; softcap && g < group; ++g) {
            T& score = scores[g * length + t];
            score = static_cast<T>(*softcap) * std::tanh(score / static_cast<T>(*softcap));
          }
        }
        T* row = rows + i * length;
        std::fill(row, row + length, T(0));
        for (int64_t g = 0; g < group; ++g) {
          T* head = scores.data() + g * length;
          softmax(head, length, sp ? std::optional<T>(sp[h * group + g]) : std::nullopt);
          for (int64_t t = 0; t < length; ++t) row[t] += head[t];
        }
      }
    });
    auto* result = out.mutable_data_ptr<T>();
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < key_heads; ++h) {
        for (int64_t t = 0; t < length; ++t) result[b * length + t] += rows[(b * key_heads + h) * length + t];
      }
      for (int64_t t = 0; t < length; ++t) result[b * length + t] /= static_cast<T>(heads);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) { m.impl("attention_row", attention_row_cpu); }

}  // namespace rlhf_kernels
