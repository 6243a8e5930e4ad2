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

  // Writes the rewards and KL of row b, whose places have been found; returns the rewards that count, side by side.
  template <typename T>
  const T* row(int64_t b, RowBuffers<T>& buffers, T kl_coef, T beta, KlEstimator estimator, T* rewards, T* kl) const {
    const int64_t i = b * length, n = buffers.places.count();
    const auto gather = [&](const at::Tensor& x, int64_t k) {
      return buffers.places.gather(x.const_data_ptr<T>() + i, buffers[k]);
    };
    T *to = buffers.places.target(rewards + i, buffers[0]), *kl_to = buffers.places.target(kl + i, buffers[1]);
    kl_row(gather(logprobs, 2), gather(ref_logprobs, 3), n, estimator, kl_to);
    reward_row(per_token ? gather(scores, 4) : scores.const_data_ptr<T>() + b, per_token,
               attention.defined() ? gather(attention, 5) : nullptr, kl_to, n, kl_coef, beta, to);
    buffers.places.put(to, rewards + i);
    buffers.places.put(kl_to, kl + i);
    return to;
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
    const auto* mp = in.mask.const_data_ptr<bool>();
    at::parallel_for(0, in.batch, in.grain(), [&](int64_t begin, int64_t end) {
      RowBuffers<scalar_t> buffers(in.length);
      for (int64_t b = begin; b < end; ++b) {
        buffers.places.find(mp + b * in.length);
        in.row<scalar_t>(b, buffers, kl_coef, beta, estimator, rp, kp);
      }
    });
  });
  return {rewards, kl};
}

template <typename T>
void whiten_rows(T* advantages, const bool* mask, const std::vector<Moments>& rows, int64_t length, int64_t grain) {
  Moments all;
  for (const Moments& row : rows) all.merge(row);
  const T mean = static_cast<T>(all.mean), scale = static_cast<T>(1 / std::sqrt(all.variance() + 1e-8));
  const auto* counts = reinterpret_cast<const uint8_t*>(mask);  // a loop over bool is not vectorised
  at::parallel_for(0, static_cast<int64_t>(rows.size()), grain, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin * length; i < end * length; ++i) {
      advantages[i] = counts[i] != 0 ? (advantages[i] - mean) * scale : T(0);
    }
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
      RowBuffers<scalar_t> buffers(in.length);
      auto& places = buffers.places;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t i = b * in.length;
        places.find(mp + i);
        const auto* row_rewards = in.row<scalar_t>(b, buffers, kl_coef, beta, estimator, rp, kp);
        auto *to = places.target(ap + i, buffers[6]), *returns_to = places.target(gp + i, buffers[7]);
        gae_row<scalar_t>(row_rewards, places.gather(vp + i, buffers[8]), places.count(), gamma, lam, buffers[9], to,
                          returns_to);
        places.put(to, ap + i);
        places.put(returns_to, gp + i);
        if (whiten) moments[b] = moments_of(to, places.count());
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
