// Log-probabilities under policy and reference, entropy and KL in one pass over both logits.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <optional>

#include "common.h"
#include "pair_sums.h"

namespace rlhf_kernels {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs policy_ref_logprobs_fwd_cpu(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& tokens,
                                    const std::optional<at::Tensor>& mask, double temperature,
                                    const std::optional<at::Tensor>&) {
  constexpr const char* op = "policy_ref_logprobs";
  check_same_shape(op, "ref_logits", ref_logits, logits.sizes());
  check_same_shape(op, "tokens", tokens, logits.sizes().slice(0, logits.dim() - 1));
  if (mask) check_same_shape(op, "mask", *mask, tokens.sizes());
  const auto [x, y] = in_one_dtype(logits, ref_logits);
  const auto type = compute_type(x);
  const int64_t count = tokens.numel(), vocabulary = logits.size(-1);
  const at::Tensor rows = at::empty({6, count}, x.options().dtype(type));
  const at::Tensor index = tokens.to(at::kLong).contiguous(), keep = mask ? mask->contiguous() : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "policy_ref_logprobs_fwd", [&] {
    using T = at::opmath_type<scalar_t>;
    const Rows policy_rows(x), ref_rows(y);
    const auto* token = index.const_data_ptr<int64_t>();
    const auto* counts = mask ? keep.const_data_ptr<bool>() : nullptr;
    auto* out = rows.mutable_data_ptr<T>();
    const T inverse = static_cast<T>(1 / temperature);
    std::atomic<int64_t> outside{-1};
    at::parallel_for(0, count, std::max<int64_t>(1, 32768 / vocabulary), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        TokenStats<T> policy, reference;
        T kl = 0;
        if (token[i] >= vocabulary && (!counts || counts[i])) {
          outside = token[i];
        } else if (token[i] >= 0 && (!counts || counts[i])) {
          const auto *p = policy_rows.row<scalar_t>(i), *q = ref_rows.row<scalar_t>(i);
          PairSums<T> sums;
          sums.add_rows(p, q, vocabulary, inverse);
          policy = sums.first.stats(static_cast<T>(p[token[i]]), inverse, true);
          reference = sums.second.stats(static_cast<T>(q[token[i]]), inverse, false);
          kl = static_cast<T>(sums.kl());
        }
        int64_t k = i;
        for (const T value : {policy.logprob, reference.logprob, policy.entropy, kl, policy.lse, reference.lse}) {
          out[k] = value;
          k += count;
        }
      }
    });
    if (outside >= 0) check_token("token_logprobs", outside, vocabulary);
  });
  const auto output = [&](int64_t i, const at::Tensor& like) {
    return rows.select(0, i).to(compute_type(like)).view(tokens.sizes()).clone();
  };
  return {output(0, logits), output(1, ref_logits), output(2, logits),
          output(3, logits), output(4, logits),     output(5, ref_logits)};
}

// `dlogits` may be the logits themselves: a block is written after it has been read.
void policy_ref_logprobs_bwd_out_cpu(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& tokens,
                                     const std::optional<at::Tensor>& mask, const at::Tensor& lse,
                                     const at::Tensor& ref_lse, const at::Tensor& entropy, const at::Tensor& kl,
                                     const std::optional<at::Tensor>& grad_logprobs,
                                     const std::optional<at::Tensor>& grad_entropy,
                                     const std::optional<at::Tensor>& grad_kl, double temperature,
                                     at::Tensor& dlogits) {
  const auto [x, y] = in_one_dtype(logits, ref_logits);
  const auto type = compute_type(x);
  const int64_t count = tokens.numel(), vocabulary = logits.size(-1);
  const auto prepared = [&](const std::optional<at::Tensor>& row) {
    if (!row) return at::Tensor();
    check_same_shape("policy_ref_logprobs", "a gradient", *row, tokens.sizes());
    return row->to(type).contiguous();
  };
  const at::Tensor stats[] = {prepared(lse), prepared(ref_lse), prepared(entropy), prepared(kl)};
  const at::Tensor grads[] = {prepared(grad_logprobs), prepared(grad_entropy), prepared(grad_kl)};
  const at::Tensor index = tokens.to(at::kLong).contiguous(), keep = mask ? mask->contiguous() : at::Tensor();
  const at::Tensor gradient = x.scalar_type() == dlogits.scalar_type() ? dlogits : at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "policy_ref_logprobs_bwd", [&] {
    using T = at::opmath_type<scalar_t>;
    const Rows policy_rows(x), ref_rows(y);
    const auto* token = index.const_data_ptr<int64_t>();
    const auto* counts = mask ? keep.const_data_ptr<bool>() : nullptr;
    const auto at = [](const at::Tensor& row, int64_t i) { return row.defined() ? row.const_data_ptr<T>()[i] : T(0); };
    const auto scaling = scaling_of<T>(temperature, std::nullopt);
    const T inverse = scaling.inverse_temperature;
    auto* out = gradient.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, count, std::max<int64_t>(1, 32768 / vocabulary), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        auto* target = out + i * vocabulary;
        if (token[i] < 0 || token[i] >= vocabulary || (counts && !counts[i])) {
          std::fill(target, target + vocabulary, scalar_t(0));
          continue;
        }
        const TokenStats<T> row{0, at(stats[2], i), at(stats[0], i)};
        const TokenGrads<T> upstream{at(grads[0], i), at(grads[1], i)};
        const T of_kl = at(grads[2], i), ref_total = at(stats[1], i), divergence = at(stats[3], i);
        const auto *p = policy_rows.row<scalar_t>(i), *q = ref_rows.row<scalar_t>(i);
        if (of_kl == 0 || row.lse == kNothing<T>) {
          token_gradient(p, vocabulary, token[i], row, upstream, scaling, target);
          continue;
        }
        write_gradient(p, vocabulary, token[i], row.lse, upstream.logprob, scaling, target, [=](T log_p, int64_t v) {
          const T log_ratio = log_p - (widened(q[v]) * inverse - ref_total);
          return gradient_weight<true>(log_p, row.entropy, upstream) + of_kl * (log_ratio - divergence);
        });
      }
    });
  });
  if (!gradient.is_same(dlogits)) dlogits.copy_(gradient);
}

at::Tensor policy_ref_logprobs_bwd_cpu(const at::Tensor& logits, const at::Tensor& ref_logits,
                                       const at::Tensor& tokens, const std::optional<at::Tensor>& mask,
                                       const at::Tensor& lse, const at::Tensor& ref_lse, const at::Tensor& entropy,
                                       const at::Tensor& kl, const std::optional<at::Tensor>& grad_logprobs,
                                       const std::optional<at::Tensor>& grad_entropy,
                                       const std::optional<at::Tensor>& grad_kl, double temperature) {
  at::Tensor dlogits = at::empty(logits.sizes(), logits.options());
  policy_ref_logprobs_bwd_out_cpu(logits, ref_logits, tokens, mask, lse, ref_lse, entropy, kl, grad_logprobs,
                                  grad_entropy, grad_kl, temperature, dlogits);
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("policy_ref_logprobs_fwd", policy_ref_logprobs_fwd_cpu);
  m.impl("policy_ref_logprobs_bwd", policy_ref_logprobs_bwd_cpu);
  m.impl("policy_ref_logprobs_bwd_out", policy_ref_logprobs_bwd_out_cpu);
}

}  // namespace rlhf_kernels
