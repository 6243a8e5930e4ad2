// The clipped PPO loss with its gradient in one pass. Chunks of a fixed size gather their own sums, which are then
// added in order: the result does not depend on the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <vector>

#include "common.h"
#include "ops.h"
#include "rows.h"
#include "simd.h"

namespace rlhf_kernels {
namespace {

// Sums over some of the tokens.
struct TokenSums {
  double policy = 0, value = 0, squared_log_ratio = 0, above = 0, below = 0, value_clipped = 0, ratio = 0;
  double highest_ratio = 0;
  Moments residuals, targets;  // of returns − values and of returns

  void add(const TokenSums& other) {
    policy += other.policy;
    value += other.value;
    squared_log_ratio += other.squared_log_ratio;
    above += other.above;
    below += other.below;
    value_clipped += other.value_clipped;
    ratio += other.ratio;
    // A NaN ratio must show.
    highest_ratio = other.highest_ratio <= highest_ratio ? highest_ratio : other.highest_ratio;
    residuals.merge(other.residuals);
    targets.merge(other.targets);
  }
};

template <typename T>
struct Inputs {
  const T *logprobs, *old_logprobs, *advantages, *values, *old_values, *returns;
  const bool* mask;
};

template <typename T>
struct Scalars {
  Clips<T> clips;
  T cliprange_value, vf_coef;
};

// Moments of x[i] where keep[i] is 1; `first` is one of these places. Taken from x[first], so that equal values have none.
template <typename T, typename F>
Moments block_moments(const T* keep, int64_t n, int64_t first, double count, F x) {
  const T base = x(first);
  T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const T deviation = x(i) - base;
    sum += keep[i] != 0 ? deviation : T(0);
  }
  const T mean = base + static_cast<T>(sum / count);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) {
    const T deviation = x(i) - mean;
    squares += keep[i] != 0 ? deviation * deviation : T(0);
  }
  Moments moments;
  moments.count = count;
  moments.mean = mean;
  moments.squares = squares;
  return moments;
}

// Tokens at a time: what the loops below read and write stays in the L1 cache between them.
constexpr int64_t kTokens = kBlock / 2;

// Up to kTokens tokens from `begin` on, in loops without a branch, each of which asks for some of the next ones.
template <typename T>
TokenSums block_terms(const Inputs<T>& in, int64_t begin, int64_t n, const Scalars<T>& s, T inverse_total,
                      T* dlogprobs, T* dvalues) {
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  const T *logprobs = in.logprobs + begin, *old_logprobs = in.old_logprobs + begin, *advantages = in.advantages + begin;
  const T *values = in.values + begin, *old_values = in.old_values + begin, *returns = in.returns + begin;
  const auto* mask = reinterpret_cast<const uint8_t*>(in.mask + begin);  // a loop over bool is not vectorised
  T keep[kPadded / 2], differences[kPadded / 2], ratios[kPadded / 2], gains[kPadded / 2];
  T count = 0;
  for (int64_t i = 0; i < n; ++i) keep[i] = mask[i];
  prefetch(logprobs + kTokens, kTokens);
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) {
    // Two −inf have no ratio: such a token could not be sampled, so it is taken out.
    const T a = logprobs[i], b = old_logprobs[i], masked = keep[i];
    keep[i] = a == nothing ? (b == nothing ? T(0) : masked) : masked;
    count += keep[i];
    differences[i] = keep[i] != 0 ? log_difference(a, b) : T(0);
  }
  prefetch(old_logprobs + kTokens, kTokens);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) gains[i] = keep[i] != 0 ? advantages[i] : T(0);
  prefetch(advantages + kTokens, kTokens);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {  // 1 where masked: with a gain of 0 nothing is added
    ratios[i] = fast_exp(clamped(differences[i], T(-kMaxLogRatio), T(kMaxLogRatio)));
  }
  TokenSums sums;
  if (count == 0) {
    if (dlogprobs) std::fill(dlogprobs + begin, dlogprobs + begin + n, T(0));
    if (dvalues) std::fill(dvalues + begin, dvalues + begin + n, T(0));
    return sums;
  }
  T policy_sum = 0, squared = 0, above = 0, below = 0, ratio_sum = 0, highest = 0, value_sum = 0, value_clipped = 0;
  T gradients[kPadded / 2], value_gradients[kPadded / 2];
  prefetch(values + kTokens, kTokens);
#pragma omp simd reduction(+ : policy_sum, squared, above, below, ratio_sum) reduction(max : highest)
  for (int64_t i = 0; i < n; ++i) {
    const auto term =
        policy_term_of(differences[i], ratios[i], gains[i], s.clips.low, s.clips.high, s.clips.dual_clip);
    const T ratio = ratios[i] * keep[i];
    policy_sum += term.loss;
    squared += term.log_ratio * term.log_ratio;
    above += term.above;
    below += term.below;
    ratio_sum += ratio;
    highest = ratio > highest ? ratio : highest;
    gradients[i] = term.derivative * inverse_total;
  }
  prefetch(old_values + kTokens, kTokens);
#pragma omp simd reduction(+ : value_sum, value_clipped)
  for (int64_t i = 0; i < n; ++i) {
    const auto term = value_term(values[i], old_values[i], returns[i], s.cliprange_value);
    const T gradient = s.vf_coef * term.derivative * inverse_total;
    value_sum += keep[i] != 0 ? term.loss : T(0);
    value_clipped += keep[i] != 0 ? term.clipped : T(0);
    value_gradients[i] = keep[i] != 0 ? gradient : T(0);
  }
  prefetch(returns + kTokens, kTokens);
  if (dlogprobs) std::copy(gradients, gradients + n, dlogprobs + begin);
  if (dvalues) std::copy(value_gradients, value_gradients + n, dvalues + begin);
  sums.policy = policy_sum;
  sums.value = value_sum;
  sums.squared_log_ratio = squared;
  sums.above = above;
  sums.below = below;
  sums.value_clipped = value_clipped;
  sums.ratio = ratio_sum;
  sums.highest_ratio = ratio_sum != ratio_sum ? ratio_sum : highest;  // a maximum passes NaN over
  const int64_t first = std::find(keep, keep + n, T(1)) - keep;
  sums.targets = block_moments(keep, n, first, count, [=](int64_t i) { return returns[i]; });
  sums.residuals = block_moments(keep, n, first, count, [=](int64_t i) { return returns[i] - values[i]; });
  return sums;
}

template <typename T>
TokenSums all_terms(const Inputs<T>& in, int64_t count, const Scalars<T>& scalars, double total, T* dlogprobs,
                    T* dvalues) {
  constexpr int64_t chunk = 16 * kTokens;
  std::vector<TokenSums> chunks((count + chunk - 1) / chunk);
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t begin = first * chunk; begin < std::min(last * chunk, count); begin += kTokens) {
      const int64_t n = std::min(kTokens, count - begin);
      chunks[begin / chunk].add(
          block_terms(in, begin, n, scalars, static_cast<T>(1 / total), dlogprobs, dvalues));
    }
  });
  TokenSums all;
  for (const TokenSums& each : chunks) all.add(each);
  return all;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ppo_loss_fwd_cpu(
    const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages, const at::Tensor& values,
    const at::Tensor& old_values, const at::Tensor& returns, const at::Tensor& mask,
    const std::optional<at::Tensor>& normalizer, double cliprange, double cliprange_high,
    std::optional<double> cliprange_value, double vf_coef, std::optional<double> dual_clip, bool with_grad) {
  const auto type = compute_type(logprobs);
  const auto prepared = [&](const char* name, const at::Tensor& tensor) {
    check_same_shape("ppo_loss", name, tensor, logprobs.sizes());
    return tensor.to(type).contiguous();
  };
  const at::Tensor lp = prepared("logprobs", logprobs), old = prepared("old_logprobs", old_logprobs);
  const at::Tensor adv = prepared("advantages", advantages), v = prepared("values", values);
  const at::Tensor old_v = prepared("old_values", old_values), ret = prepared("returns", returns);
  check_same_shape("ppo_loss", "mask", mask, logprobs.sizes());
  const at::Tensor keep = mask.contiguous();
  at::Tensor loss = at::empty({}, lp.options()), stats = at::empty({10}, lp.options());
  at::Tensor dlogprobs = with_grad ? at::empty_like(lp) : at::empty({0}, logprobs.options());
  at::Tensor dvalues = with_grad ? at::empty_like(v) : at::empty({0}, values.options());
  const int64_t count = lp.numel();
  AT_DISPATCH_FLOATING_TYPES(type, "ppo_loss_fwd", [&] {
    const Inputs<scalar_t> in{lp.const_data_ptr<scalar_t>(),    old.const_data_ptr<scalar_t>(),
                              adv.const_data_ptr<scalar_t>(),   v.const_data_ptr<scalar_t>(),
                              old_v.const_data_ptr<scalar_t>(), ret.const_data_ptr<scalar_t>(),
                              keep.const_data_ptr<bool>()};
    const Scalars<scalar_t> scalars{clips_of<scalar_t>(cliprange, cliprange_high, dual_clip),
                                    static_cast<scalar_t>(cliprange_value.value_or(-1)), static_cast<scalar_t>(vf_coef)};
    auto* dlp = with_grad ? dlogprobs.mutable_data_ptr<scalar_t>() : nullptr;
    auto* dv = with_grad ? dvalues.mutable_data_ptr<scalar_t>() : nullptr;
    double total = normalizer ? normalizer->item<double>() : std::max<double>(number_true(in.mask, count), 1);
    TokenSums all = all_terms(in, count, scalars, total, dlp, dv);
    const double tokens = all.targets.count, n = std::max(tokens, 1.0);
    if (!normalizer && total != n) {  // the mask has tokens without a ratio, so that its own count is not the divisor
      total = n;
      all = all_terms(in, count, scalars, total, dlp, dv);
    }
    const double spread = all.targets.variance();
    const double explained = spread > 0 ? 1 - all.residuals.variance() / spread : 0;
    const std::array<double, 10> row{all.policy / total,    all.value / total,       0.5 * all.squared_log_ratio / n,
                                     all.above / n,         all.below / n,           all.value_clipped / n,
                                     all.ratio / n,         all.highest_ratio,       explained,
                                     tokens};
    std::copy(row.begin(), row.end(), stats.mutable_data_ptr<scalar_t>());
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(row[0] + vf_coef * row[1]);
  });
  return {loss, stats, dlogprobs.to(logprobs.scalar_type()), dvalues.to(values.scalar_type())};
}

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) { m.impl("ppo_loss_fwd", ppo_loss_fwd_cpu); }

}  // namespace rlhf_kernels
