// log π(token) and entropy from hidden states and the head, a chunk of the logits at a time.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "linear.h"
#include "ops.h"

namespace rlhf_kernels {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_logprobs_fwd_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& bias, double temperature, std::optional<double> softcap, bool with_entropy,
    bool with_unit, std::optional<int64_t> memory_budget, std::optional<int64_t> max_tokens, bool keep_logits) {
  const LiveRows live("linear_logprobs", hidden, weight, tokens, mask, max_tokens);
  Head head(weight, bias);
  const auto starts = head.chunks(live.count(), memory_budget);
  LinearGrads units(live, head, hidden, weight, bias, {with_unit, false, false}, starts.size() == 2);
  const at::Tensor rows = at::empty({3, live.count()}, hidden.options().dtype(head.type));
  const std::vector<int64_t> all{tokens.numel(), head.vocabulary};
  const at::Tensor kept = at::empty(keep_logits ? at::IntArrayRef(all) : at::IntArrayRef{0}, rows.options());
  if (keep_logits) kept.narrow(0, live.count(), tokens.numel() - live.count()).zero_();
  AT_DISPATCH_FLOATING_TYPES(head.type, "linear_logprobs_fwd", [&] {
    const auto scaling = scaling_of<scalar_t>(temperature, softcap);
    auto* out = rows.mutable_data_ptr<scalar_t>();
    for (size_t chunk = 0; chunk + 1 < starts.size(); ++chunk) {
      const int64_t start = starts[chunk], n = starts[chunk + 1] - start;
      const auto* token = live.tokens.const_data_ptr<int64_t>() + start;
      const at::Tensor given = keep_logits ? kept.narrow(0, start, n) : at::Tensor();
      const at::Tensor logits = head.logits(live.hidden.narrow(0, start, n), given);
      head.for_rows<scalar_t>(logits, [&](int64_t i, scalar_t* row) {
        const auto stats = token_stats(row, head.vocabulary, token[i], scaling, with_entropy);
        out[start + i] = stats.logprob;
        out[live.count() + start + i] = stats.entropy;
        out[2 * live.count() + start + i] = stats.lse;
        if (with_unit) head.write_gradient<scalar_t>(row, token[i], stats, {1, 0}, scaling, row);
      });
      if (with_unit) units.add(start, head.gradient(logits));
    }
  });
  const at::Tensor entropy = with_entropy ? live.scatter(rows[1]) : at::empty({0}, rows.options());
  return {live.scatter(rows[0]), entropy, live.scatter(rows[2]), std::get<0>(units.result()), kept};
}

Tensor3 linear_logprobs_bwd_cpu(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens,
                                const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& bias,
                                const at::Tensor& lse, const at::Tensor& entropy,
                                const std::optional<at::Tensor>& grad_logprobs,
                                const std::optional<at::Tensor>& grad_entropy, double temperature,
                                std::optional<double> softcap, std::array<bool, 3> needs,
                                std::optional<int64_t> memory_budget, std::optional<int64_t> max_tokens,
                                const std::optional<at::Tensor>& kept_logits) {
  const LiveRows live("linear_logprobs", hidden, weight, tokens, mask, max_tokens);
  Head head(weight, bias);
  const auto starts = head.chunks(live.count(), memory_budget);
  LinearGrads grads(live, head, hidden, weight, bias, needs, starts.size() == 2);
  const auto prepared = [&](const std::optional<at::Tensor>& x) {
    return x ? live.gather(*x, head.type) : at::zeros({live.count()}, hidden.options().dtype(head.type));
  };
  const at::Tensor total = prepared(lse), g = prepared(grad_logprobs), g_entropy = prepared(grad_entropy);
  const at::Tensor saved_entropy = prepared(grad_entropy ? std::optional(entropy) : std::nullopt);
  AT_DISPATCH_FLOATING_TYPES(head.type, "linear_logprobs_bwd", [&] {
    const auto scaling = scaling_of<scalar_t>(temperature, softcap);
    const auto values = [](const at::Tensor& x) { return x.const_data_ptr<scalar_t>(); };
    for (size_t chunk = 0; chunk + 1 < starts.size(); ++chunk) {
      const int64_t start = starts[chunk], n = starts[chunk + 1] - start;
      const auto* token = live.tokens.const_data_ptr<int64_t>();
      std::vector<char> kept(n);
      // The kept logits are left as they are: the graph may be used again.
      const at::Tensor room = kept_logits ? head.buffer(n) : head.logits(live.hidden.narrow(0, start, n));
      const auto* logits = (kept_logits ? kept_logits->narrow(0, start, n) : room).const_data_ptr<scalar_t>();
      head.for_rows<scalar_t>(room, [&](int64_t i, scalar_t* row) {
        const int64_t k = start + i;
        const TokenStats<scalar_t> stats{0, values(saved_entropy)[k], values(total)[k]};
        const TokenGrads<scalar_t> upstream{values(g)[k], values(g_entropy)[k]};
        kept[i] = !upstream.zero();
        if (kept[i]) head.write_gradient(logits + i * head.vocabulary, token[k], stats, upstream, scaling, row);
      });
      grads.add(start, head.gradient(room), &kept);
    }
  });
  return grads.result();
}

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("linear_logprobs_fwd", linear_logprobs_fwd_cpu);
  m.impl("linear_logprobs_bwd", linear_logprobs_bwd_cpu);
}

}  // namespace rlhf_kernels
