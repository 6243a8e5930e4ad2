// The clipped policy loss from hidden states and the head. A token's coefficient depends on its own log-probability only,
// so a chunk's gradient is written over its logits, row by row, and three products do forward and backward together.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "linear.h"
#include "ops.h"

namespace rlhf_kernels {
namespace {

// Σ k3(log π − log ref) over the tokens that the statistics of the loss count; in order, whatever the threads.
template <typename T>
double kl_sum(const T* logprobs, const T* old_logprobs, const T* ref_logprobs, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (logprobs[i] == kNothing<T> && old_logprobs[i] == kNothing<T>) continue;
    sum += kl_estimate(log_difference(logprobs[i], ref_logprobs[i]), KlEstimator::k3);
  }
  return sum;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_ppo_loss_fwd_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, const at::Tensor& old_logprobs,
    const at::Tensor& advantages, const at::Tensor& mask, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ref_logprobs, const std::optional<at::Tensor>& normalizer, double temperature,
    double cliprange, double cliprange_high, std::optional<double> dual_clip, double entropy_coef, double kl_coef,
    std::array<bool, 3> needs, std::optional<int64_t> memory_budget, std::optional<int64_t> max_tokens) {
  const LiveRows live("linear_ppo_loss", hidden, weight, tokens, mask, max_tokens);
  Head head(weight, bias);
  const auto starts = head.chunks(live.count(), memory_budget);
  LinearGrads grads(live, head, hidden, weight, bias, needs, starts.size() == 2);
  const bool with_grad = needs[0] || needs[1] || needs[2];
  const auto count = static_cast<double>(std::max<int64_t>(live.count(), 1));
  const double total = normalizer ? normalizer->item<double>() : count;
  const at::Tensor old = live.gather(old_logprobs, head.type), advantage = live.gather(advantages, head.type);
  const at::Tensor ref = ref_logprobs ? live.gather(*ref_logprobs, head.type) : at::Tensor();
  const at::Tensor logprobs = at::empty({live.count()}, old.options()), zeros = at::zeros({live.count()}, old.options());
  double entropy_sum = 0, kl = 0;
  AT_DISPATCH_FLOATING_TYPES(head.type, "linear_ppo_loss_fwd", [&] {
    const auto scaling = scaling_of<scalar_t>(temperature, std::nullopt);
    const auto clips = clips_of<scalar_t>(cliprange, cliprange_high, dual_clip);
    const auto *olds = old.const_data_ptr<scalar_t>(), *a = advantage.const_data_ptr<scalar_t>();
    const auto* refs = ref.defined() ? ref.const_data_ptr<scalar_t>() : nullptr;
    const auto* token = live.tokens.const_data_ptr<int64_t>();
    auto* out = logprobs.mutable_data_ptr<scalar_t>();
    std::vector<scalar_t> entropy(live.count());
    for (size_t chunk = 0; chunk + 1 < starts.size(); ++chunk) {
      const int64_t start = starts[chunk], n = starts[chunk + 1] - start;
      std::vector<char> kept(n);
      const at::Tensor logits = head.logits(live.hidden.narrow(0, start, n));
      head.for_rows<scalar_t>(logits, [&](int64_t i, scalar_t* row) {
        const int64_t k = start + i;
        const auto stats = token_stats(row, head.vocabulary, token[k], scaling, true);
        out[k] = stats.logprob;
        entropy[k] = stats.entropy;
        if (!with_grad) return;
        scalar_t g = policy_derivative(stats.logprob, olds[k], a[k], clips);
        if (refs) g += static_cast<scalar_t>(kl_coef) * k3_derivative(log_difference(stats.logprob, refs[k]));
        const TokenGrads<scalar_t> upstream{static_cast<scalar_t>(g / total),
                                            static_cast<scalar_t>(-entropy_coef / total)};
        kept[i] = !upstream.zero();
        if (kept[i]) head.write_gradient(row, token[k], stats, upstream, scaling, row);
      });
      if (with_grad) grads.add(start, head.gradient(logits), &kept);
    }
    for (const scalar_t h : entropy) entropy_sum += h;
    if (refs) kl = kl_sum(out, olds, refs, live.count());
  });
  // The statistics are those of ppo_loss without a value.
  const auto of_ppo = ppo_loss_fwd_cpu(logprobs, old, advantage, zeros, zeros, zeros, zeros.logical_not(),
                                       at::scalar_tensor(total, old.options()), cliprange, cliprange_high, std::nullopt,
                                       0.0, dual_clip, false);
  at::Tensor stats = at::empty({9}, old.options());
  AT_DISPATCH_FLOATING_TYPES(head.type, "linear_ppo_loss_stats", [&] {
    const auto* p = std::get<1>(of_ppo).const_data_ptr<scalar_t>();
    const auto counted = std::max<double>(p[9], 1);
    const std::array<double, 9> row{p[0], entropy_sum / count, kl / counted, p[2], p[3], p[4], p[6], p[7], p[9]};
    std::copy(row.begin(), row.end(), stats.mutable_data_ptr<scalar_t>());
  });
  const at::Tensor loss = std::get<0>(of_ppo) + at::Scalar((kl_coef * kl - entropy_coef * entropy_sum) / total);
  return std::tuple_cat(std::make_tuple(loss, stats), grads.result());
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) { m.impl("linear_ppo_loss_fwd", linear_ppo_loss_fwd_cpu); }

}  // namespace rlhf_kernels
