// Ops of which other ops are made.
#pragma once

#include <ATen/core/Tensor.h>

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

}  // namespace rlhf_kernels
