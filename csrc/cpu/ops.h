// Ops of which other ops are made.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace rlhf_kernels {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rollout_advantages_cpu(
    const at::Tensor& scores, const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
    const std::optional<at::Tensor>& attention, const at::Tensor& values, const at::Tensor& mask, double kl_coef,
    double beta, double gamma, double lam, std::string_view kl_estimator, bool whiten);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ppo_loss_fwd_cpu(
    const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages, const at::Tensor& values,
    const at::Tensor& old_values, const at::Tensor& returns, const at::Tensor& mask,
    const std::optional<at::Tensor>& normalizer, double cliprange, double cliprange_high,
    std::optional<double> cliprange_value, double vf_coef, std::optional<double> dual_clip, bool with_grad);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_logprobs_fwd_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& bias, double temperature, std::optional<double> softcap, bool with_entropy,
    bool with_unit, std::optional<int64_t> memory_budget, std::optional<int64_t> max_tokens, bool keep_logits);

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_logprobs_bwd_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& bias, const at::Tensor& lse, const at::Tensor& entropy,
    const std::optional<at::Tensor>& grad_logprobs, const std::optional<at::Tensor>& grad_entropy, double temperature,
    std::optional<double> softcap, std::array<bool, 3> needs, std::optional<int64_t> memory_budget,
    std::optional<int64_t> max_tokens, const std::optional<at::Tensor>& kept_logits);

}  // namespace rlhf_kernels
