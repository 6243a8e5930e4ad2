// From logits and scores to the PPO loss and the gradient of the logits. Advantages come first, from the rollout alone;
// then each row of logits is read once, and a second time from the cache for its gradient, since a token's coefficient
// depends on its own log-probability only.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <atomic>
#include <optional>

#include "common.h"
#include "ops.h"
#include "softmax_rows.h"

namespace rlhf_kernels {
namespace {

template <typename scalar_t>
void ppo_rows(const at::Tensor& logits, const at::Tensor& tokens, const at::Tensor& mask,
              const at::Tensor& old_logprobs, const at::Tensor& advantages, const Clips<at::opmath_type<scalar_t>>& clips,
              const Scaling<at::opmath_type<scalar_t>>& scaling, double total, double entropy_coef,
              at::Tensor& logprobs_out, at::Tensor& entropy_out, std::optional<at::Tensor> dlogits) {
  using T = at::opmath_type<scalar_t>;
  const Rows rows(logits);
  const int64_t vocabulary = logits.size(-1);
  const auto* token = tokens.const_data_ptr<int64_t>();
  const auto* counts = mask.const_data_ptr<bool>();
  const auto *old = old_logprobs.const_data_ptr<T>(), *advantage = advantages.const_data_ptr<T>();
  auto *logprobs = logprobs_out.mutable_data_ptr<T>(), *entropy = entropy_out.mutable_data_ptr<T>();
  auto* gradient = dlogits ? dlogits->mutable_data_ptr<scalar_t>() : nullptr;
  const T inverse_total = static_cast<T>(1 / total), of_entropy = static_cast<T>(-entropy_coef / total);
  std::atomic<int64_t> outside{-1};
  at::parallel_for(0, tokens.numel(), std::max<int64_t>(1, 32768 / vocabulary), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      TokenStats<T> row;
      TokenGrads<T> upstream;
      if (counts[i] && token[i] >= vocabulary) {
        outside = token[i];
      } else if (counts[i]) {
        row = token_stats(rows.row<scalar_t>(i), vocabulary, token[i], scaling, true);
        upstream = {policy_derivative(row.logprob, old[i], advantage[i], clips) * inverse_total, of_entropy};
      }
      logprobs[i] = row.logprob;
      entropy[i] = row.entropy;
      if (!gradient) continue;
      scalar_t* target = gradient + i * vocabulary;
      token_gradient(rows.row<scalar_t>(i), vocabulary, std::max<int64_t>(token[i], 0), row, upstream, scaling, target);
    }
  });
  if (outside >= 0) check_token("token_logprobs", outside, vocabulary);
}

// One after the other, so that the number of threads makes no difference.
double sum_in_order(const at::Tensor& x) {
  double sum = 0;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sum_in_order", [&] {
    const auto* p = x.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < x.numel(); ++i) sum += p[i];
  });
  return sum;
}

// `dlogits` may be the logits themselves: a block is written after it has been read for the last time.
std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_ppo_loss(
    const at::Tensor& logits, const at::Tensor& tokens, const at::Tensor& scores, const at::Tensor& old_logprobs,
    const at::Tensor& ref_logprobs, const std::optional<at::Tensor>& attention, const at::Tensor& values,
    const at::Tensor& old_values, const at::Tensor& mask, const std::optional<at::Tensor>& normalizer,
    double temperature, std::optional<double> softcap, double kl_coef, double beta, double gamma, double lam,
    std::string_view kl_estimator, bool whiten, double cliprange, double cliprange_high,
    std::optional<double> cliprange_value, double vf_coef, std::optional<double> dual_clip, double entropy_coef,
    std::optional<at::Tensor> dlogits) {
  check_same_shape("fused_ppo_loss", "tokens", tokens, logits.sizes().slice(0, logits.dim() - 1));
  const auto type = compute_type(logits);
  const at::Tensor index = tokens.to(at::kLong).contiguous(), counted = mask.logical_and(index.ge(0)).contiguous();
  const at::Tensor old = old_logprobs.to(type).contiguous();
  // fp64, which costs nothing here: an advantage near 0 is a difference of large numbers.
  const auto rollout = rollout_advantages_cpu(scores, old_logprobs.to(at::kDouble), ref_logprobs, attention, old_values, counted,
                                              kl_coef, beta, gamma, lam, kl_estimator, whiten);
  const at::Tensor advantages = std::get<0>(rollout).to(type), returns = std::get<1>(rollout);
  // The mask's own count divides, which no logit can change: a token's gradient follows from its own row.
  const double tokens_counted = counted.sum().item<double>();
  const double total = normalizer ? normalizer->item<double>() : std::max(tokens_counted, 1.0);
  at::Tensor logprobs = at::empty(tokens.sizes(), logits.options().dtype(type));
  at::Tensor entropy = at::empty(tokens.sizes(), logprobs.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "fused_ppo_loss_fwd", [&] {
    using T = at::opmath_type<scalar_t>;
    ppo_rows<scalar_t>(logits, index, counted, old, advantages, clips_of<T>(cliprange, cliprange_high, dual_clip),
                       scaling_of<T>(temperature, softcap), total, entropy_coef, logprobs, entropy, dlogits);
  });
  const auto of_ppo = ppo_loss_fwd_cpu(logprobs, old_logprobs, advantages, values, old_values, returns, counted,
                                       at::scalar_tensor(total, logprobs.options()), cliprange, cliprange_high,
                                       cliprange_value, vf_coef, dual_clip, dlogits.has_value());
  const double entropy_sum = sum_in_order(entropy);
  const at::Tensor& stats = std::get<1>(of_ppo);
  const at::Tensor mean = at::full({1}, entropy_sum / std::max(tokens_counted, 1.0), stats.options());
  return {std::get<0>(of_ppo) - at::Scalar(entropy_coef * entropy_sum / total),
          at::cat({stats.slice(0, 0, 2), mean, stats.slice(0, 2)}), std::get<3>(of_ppo)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_ppo_loss_fwd_cpu(
    const at::Tensor& logits, const at::Tensor& tokens, const at::Tensor& scores, const at::Tensor& old_logprobs,
    const at::Tensor& ref_logprobs, const std::optional<at::Tensor>& attention, const at::Tensor& values,
    const at::Tensor& old_values, const at::Tensor& mask, const std::optional<at::Tensor>& normalizer,
    double temperature, std::optional<double> softcap, double kl_coef, double beta, double gamma, double lam,
    std::string_view kl_estimator, bool whiten, double cliprange, double cliprange_high,
    std::optional<double> cliprange_value, double vf_coef, std::optional<double> dual_clip, double entropy_coef,
    bool with_grad) {
  const at::Tensor dlogits = at::empty(with_grad ? logits.sizes() : at::IntArrayRef{0}, logits.options());
  const auto [loss, stats, dvalues] =
      fused_ppo_loss(logits, tokens, scores, old_logprobs, ref_logprobs, attention, values, old_values, mask,
                     normalizer, temperature, softcap, kl_coef, beta, gamma, lam, kl_estimator, whiten, cliprange,
                     cliprange_high, cliprange_value, vf_coef, dual_clip, entropy_coef,
                     with_grad ? std::optional(dlogits) : std::nullopt);
  return {loss, stats, dlogits, dvalues};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_ppo_loss_fwd_out_cpu(
    const at::Tensor& logits, const at::Tensor& tokens, const at::Tensor& scores, const at::Tensor& old_logprobs,
    const at::Tensor& ref_logprobs, const std::optional<at::Tensor>& attention, const at::Tensor& values,
    const at::Tensor& old_values, const at::Tensor& mask, const std::optional<at::Tensor>& normalizer,
    double temperature, std::optional<double> softcap, double kl_coef, double beta, double gamma, double lam,
    std::string_view kl_estimator, bool whiten, double cliprange, double cliprange_high,
    std::optional<double> cliprange_value, double vf_coef, std::optional<double> dual_clip, double entropy_coef,
    at::Tensor& dlogits) {
  return fused_ppo_loss(logits, tokens, scores, old_logprobs, ref_logprobs, attention, values, old_values, mask,
                        normalizer, temperature, softcap, kl_coef, beta, gamma, lam, kl_estimator, whiten, cliprange,
                        cliprange_high, cliprange_value, vf_coef, dual_clip, entropy_coef, dlogits);
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("fused_ppo_loss_fwd", fused_ppo_loss_fwd_cpu);
  m.impl("fused_ppo_loss_fwd_out", fused_ppo_loss_fwd_out_cpu);
}

}  // namespace rlhf_kernels
