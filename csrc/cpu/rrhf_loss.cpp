// RRHF: sums of the responses, every response against those of its prompt, then the gradient row by row. Each response
// gathers what it adds by itself and the responses are added in order, so the number of threads makes no difference.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "common.h"

namespace rlhf_kernels {
namespace {

template <typename T>
struct Response {
  T summed = 0, scale = 0, p = 0;  // Σ logprobs, 1 / length^power and their product
  double score = 0;                // in the dtype it came in: rounding would make ties
  int64_t prompt = 0;
  bool candidate = false;

  double rank = 0;  // Σ of its gaps to better ones
  int64_t wrong = 0, pairs = 0, right = 0;
  bool first = false, best = false;  // of its prompt
};

template <typename scalar_t, typename T>
void sum_up(const scalar_t* logprobs, const bool* mask, int64_t length, double power, Response<T>& response) {
  T sum = 0;
  int64_t count = 0;
#pragma omp simd reduction(+ : sum, count)
  for (int64_t t = 0; t < length; ++t) {
    sum += mask[t] ? static_cast<T>(logprobs[t]) : T(0);
    count += mask[t];
  }
  response.summed = sum;
  response.scale = static_cast<T>(std::pow(static_cast<double>(std::max<int64_t>(count, 1)), -power));
  response.p = response.summed * response.scale;
  response.candidate = count > 0 && response.score == response.score;
}

// Response i against those of its prompt.
template <typename T>
void compare(std::vector<Response<T>>& all, size_t i) {
  Response<T>& one = all[i];
  one.first = one.best = one.candidate;
  if (!one.candidate) return;
  for (size_t j = 0; j < all.size(); ++j) {
    const Response<T>& other = all[j];
    if (!other.candidate || other.prompt != one.prompt) continue;
    const T gap = one.p - other.p;
    const bool worse = one.score < other.score;
    if (worse && gap > 0) one.rank += gap;
    one.wrong += worse && gap > 0;
    one.wrong -= one.score > other.score && gap < 0;
    one.pairs += worse;
    one.right += worse && gap < 0;
    if (j < i) one.first = false;
    if (worse || (j < i && one.score == other.score)) one.best = false;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rrhf_loss_fwd_cpu(const at::Tensor& logprobs, const at::Tensor& scores,
                                                                 const at::Tensor& prompts, const at::Tensor& mask,
                                                                 double rank_coef, double sft_coef, double length_power,
                                                                 bool with_grad) {
  check_same_shape("rrhf_loss", "mask", mask, logprobs.sizes());
  check_same_shape("rrhf_loss", "scores", scores, {logprobs.size(0)});
  check_same_shape("rrhf_loss", "prompts", prompts, {logprobs.size(0)});
  const int64_t responses = logprobs.size(0), length = logprobs.size(1);
  const at::Tensor lp = logprobs.contiguous(), keep = mask.contiguous();
  const at::Tensor s = scores.to(at::kDouble).contiguous(), ids = prompts.to(at::kLong).contiguous();
  const auto options = logprobs.options().dtype(compute_type(logprobs));
  at::Tensor loss = at::empty({}, options), stats = at::empty({4}, options);
  at::Tensor dlogprobs = at::empty(with_grad ? logprobs.sizes() : at::IntArrayRef{0}, logprobs.options());
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(length, 1));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logprobs.scalar_type(), "rrhf_loss_fwd", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto* x = lp.const_data_ptr<scalar_t>();
    const auto* m = keep.const_data_ptr<bool>();
    std::vector<Response<T>> all(responses);
    at::parallel_for(0, responses, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        all[i].score = s.const_data_ptr<double>()[i];
        all[i].prompt = ids.const_data_ptr<int64_t>()[i];
        sum_up(x + i * length, m + i * length, length, length_power, all[i]);
      }
    });
    at::parallel_for(0, responses, std::max<int64_t>(1, 16384 / std::max<int64_t>(responses, 1)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i) compare(all, i);
                     });
    double rank = 0, likelihood = 0, counted = 0, pairs = 0, right = 0;
    for (const auto& each : all) {
      rank += each.rank;
      likelihood += each.best ? each.summed : T(0);
      counted += each.first;
      pairs += each.pairs;
      right += each.right;
    }
    const double count = std::max(counted, 1.0), rank_loss = rank / count, sft_loss = -likelihood / count;
    *loss.mutable_data_ptr<T>() = static_cast<T>(rank_coef * rank_loss + sft_coef * sft_loss);
    auto* stat = stats.mutable_data_ptr<T>();
    for (const double each : {rank_loss, sft_loss, right / std::max(pairs, 1.0), counted}) *stat++ = static_cast<T>(each);
    if (!with_grad) return;
    auto* d = dlogprobs.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, responses, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double ranked = rank_coef * static_cast<double>(all[i].wrong) * all[i].scale;
        const auto slope = static_cast<scalar_t>(static_cast<T>((ranked - (all[i].best ? sft_coef : 0.0)) / count));
        for (int64_t t = i * length; t < (i + 1) * length; ++t) d[t] = m[t] ? slope : scalar_t(0);
      }
    });
  });
  return {loss, stats, dlogprobs};
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) { m.impl("rrhf_loss_fwd", rrhf_loss_fwd_cpu); }

}  // namespace rlhf_kernels
