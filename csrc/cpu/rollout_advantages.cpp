// From scores to advantages: `token_rewards` alone, and `rollout_advantages`, which runs its row and that of `gae` one
// after the other while both are in the cache. The whitening statistics are gathered on the way and merged row by row,
// so they do not depend on the number of threads; one more pass over the advantages applies them.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "common.h"
#include "ops.h"
#include "rows.h"
#include "simd.h"

namespace rlhf_kernels {
namespace {

// The inputs of a reward row in one dtype and layout.
struct RewardInputs {
  RewardInputs(const char* op, const at::Tensor& scores_in, const at::Tensor& logprobs_in, const at::Tensor& ref_in,
               const std::optional<at::Tensor>& attention_in, const at::Tensor& mask_in)
      : type(compute_type(logprobs_in)),
        batch(logprobs_in.size(0)),
        length(logprobs_in.size(1)),
        scores(scores_in.to(type).contiguous()),
        logprobs(logprobs_in.to(type).contiguous()),
        ref_logprobs(ref_in.to(type).contiguous()),
        attention(attention_in ? attention_in->to(type).contiguous() : at::Tensor()),
        mask(mask_in.contiguous()),
        per_token(scores.dim() == 2) {
    check_same_shape(op, "scores", scores, logprobs.sizes().slice(0, per_token ? 2 : 1));
    check_same_shape(op, "ref_logprobs", ref_logprobs, logprobs.sizes());
    check_same_shape(op, "mask", mask, logprobs.sizes());
    if (attention.defined()) check_same_shape(op, "attention", attention, logprobs.sizes());
  }

  template <typename T>
  void row(int64_t b, T kl_coef, T beta, KlEstimator estimator, T* rewards, T* kl) const {
    const int64_t i = b * length;
    reward_row<T>(scores.const_data_ptr<T>() + (per_token ? i : b), per_token, logprobs.const_data_ptr<T>() + i, ref_logprobs.const_data_ptr<T>() + i,
                  attention.defined() ? attention.const_data_ptr<T>() + i : nullptr, mask.const_data_ptr<bool>() + i,
                  length, kl_coef, beta, estimator, rewards + i, kl + i);
  }

  int64_t grain() const { return std::max<int64_t>(1, 4096 / std::max<int64_t>(length, 1)); }

  at::ScalarType type;
  int64_t batch, length;
  at::Tensor scores, logprobs, ref_logprobs, attention, mask;
  bool per_token;
};

std::tuple<at::Tensor, at::Tensor> token_rewards_cpu(const at::Tensor& scores, const at::Tensor& logprobs,
                                                     const at::Tensor& ref_logprobs,
                                                     const std::optional<at::Tensor>& attention, const at::Tensor& mask,
                                                     double kl_coef, double beta, std::string_view estimator_name) {
  const RewardInputs in("token_rewards", scores, logprobs, ref_logprobs, attention, mask);
  const auto estimator = kl_estimator("token_rewards", estimator_name);
  at::Tensor rewards = at::empty_like(in.logprobs), kl = at::empty_like(in.logprobs);
  AT_DISPATCH_FLOATING_TYPES(in.type, "token_rewards", [&] {
    auto *rp = rewards.mutable_data_ptr<scalar_t>(), *kp = kl.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, in.batch, in.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) in.row<scalar_t>(b, kl_coef, beta, estimator, rp, kp);
    });
  });
  return {rewards, kl};
}

template <typename T>
void whiten_rows(T* advantages, const bool* mask, const std::vector<Moments>& rows, int64_t length, int64_t grain) {
  Moments all;
  for (const Moments& row : rows) all.merge(row);
  const T mean = static_cast<T>(all.mean), scale = static_cast<T>(1 / std::sqrt(all.variance() + 1e-8));
  at::parallel_for(0, static_cast<int64_t>(rows.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * length; i < end * length; ++i) advantages[i] = mask[i] ? (advantages[i] - mean) * scale : 0;
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rollout_advantages_cpu(
    const at::Tensor& scores, const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
    const std::optional<at::Tensor>& attention, const at::Tensor& values, const at::Tensor& mask, double kl_coef,
    double beta, double gamma, double lam, std::string_view estimator_name, bool whiten) {
  const RewardInputs in("rollout_advantages", scores, logprobs, ref_logprobs, attention, mask);
  const auto estimator = kl_estimator("rollout_advantages", estimator_name);
  const at::Tensor v = values.to(in.type).contiguous();
  check_same_shape("rollout_advantages", "values", v, in.logprobs.sizes());
  at::Tensor advantages = at::empty_like(v), returns = at::empty_like(v);
  at::Tensor rewards = at::empty_like(v), kl = at::empty_like(v);
  std::vector<Moments> moments(whiten ? in.batch : 0);
  AT_DISPATCH_FLOATING_TYPES(in.type, "rollout_advantages", [&] {
    auto *ap = advantages.mutable_data_ptr<scalar_t>(), *gp = returns.mutable_data_ptr<scalar_t>();
    auto *rp = rewards.mutable_data_ptr<scalar_t>(), *kp = kl.mutable_data_ptr<scalar_t>();
    const auto* vp = v.const_data_ptr<scalar_t>();
    const auto* mp = in.mask.const_data_ptr<bool>();
    at::parallel_for(0, in.batch, in.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t i = b * in.length;
        in.row<scalar_t>(b, kl_coef, beta, estimator, rp, kp);
        gae_row<scalar_t>(rp + i, vp + i, mp + i, in.length, gamma, lam, ap + i, gp + i);
        if (whiten) {
          const scalar_t* row = ap + i;
          moments[b] = moments_of(mp + i, in.length, [&](int64_t t) { return static_cast<double>(row[t]); });
        }
      }
    });
    if (whiten) whiten_rows<scalar_t>(ap, mp, moments, in.length, in.grain());
  });
  return {advantages, returns, rewards, kl};
}

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("token_rewards", token_rewards_cpu);
  m.impl("rollout_advantages", rollout_advantages_cpu);
}

}  // namespace rlhf_kernels
