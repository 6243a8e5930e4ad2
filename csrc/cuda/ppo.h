// Host functions of one op's .cu file that another op is made of.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace rlhf_kernels {

enum class Whiten {
  no,
  yes,
  later,  // by whoever has the spreads [blocks, 3]
};

struct Rollout {
  at::Tensor advantages, returns, rewards, kl, spreads;
};

// `tokens`: a negative one is masked. Rewards and KL only where asked for.
Rollout rollout(const char* op, const at::Tensor& scores, const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
                const std::optional<at::Tensor>& attention, const at::Tensor& values, const at::Tensor& mask,
                const at::Tensor* tokens, double kl_coef, double beta, double gamma, double lam,
                std::string_view estimator, Whiten whiten, bool with_rewards);

struct PpoScalars {
  double cliprange, cliprange_high;
  std::optional<double> cliprange_value;
  double vf_coef;
  std::optional<double> dual_clip;
  double entropy_coef = 0;
};

// Loss and statistics of tokens whose log-probabilities are known, and the gradients that are given room. With `entropy`
// the whole count of the mask divides, as it does in fused_ppo_loss.
std::tuple<at::Tensor, at::Tensor> ppo_tokens(const char* op, const at::Tensor& logprobs,
                                              const at::Tensor& old_logprobs, const at::Tensor& advantages,
                                              const at::Tensor& values, const at::Tensor& old_values,
                                              const at::Tensor& returns, const at::Tensor& mask,
                                              const at::Tensor* tokens, const std::optional<at::Tensor>& entropy,
                                              const std::optional<at::Tensor>& normalizer, const PpoScalars& scalars,
                                              at::Tensor* dlogprobs, at::Tensor* dvalues);

}  // namespace rlhf_kernels
