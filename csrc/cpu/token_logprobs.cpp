// log π(token) and entropy from logits. Forward: each row is read once. Backward: from the saved logsumexp, one read and
// one write.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <optional>

#include "common.h"
#include "softmax_rows.h"

namespace rlhf_kernels {
namespace {

template <typename scalar_t>
void forward_rows(const at::Tensor& logits, const int64_t* tokens, const bool* mask,
                  const Scaling<at::opmath_type<scalar_t>>& scaling, bool with_entropy, at::Tensor& logprobs_out,
                  at::Tensor& entropy_out, at::Tensor& lse_out) {
  using T = at::opmath_type<scalar_t>;
  const Rows rows(logits);
  const int64_t vocabulary = logits.size(-1), count = lse_out.numel();
  auto* logprobs = logprobs_out.mutable_data_ptr<T>();
  auto* entropy = with_entropy ? entropy_out.mutable_data_ptr<T>() : nullptr;
  auto* lse = lse_out.mutable_data_ptr<T>();
  std::atomic<int64_t> outside{-1};
  at::parallel_for(0, count, std::max<int64_t>(1, 32768 / vocabulary), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      TokenStats<T> row;
      if (tokens[i] >= 0 && (!mask || mask[i])) {
        if (tokens[i] < vocabulary) {
          row = token_stats(rows.row<scalar_t>(i), vocabulary, tokens[i], scaling, with_entropy);
        } else {
          outside = tokens[i];
        }
      }
      logprobs[i] = row.logprob;
      if (with_entropy) entropy[i] = row.entropy;
      lse[i] = row.lse;
    }
  });
  if (outside >= 0) check_token("token_logprobs", outside, vocabulary);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> token_logprobs_fwd_cpu(const at::Tensor& logits,
                                                                      const at::Tensor& tokens,
                                                                      const std::optional<at::Tensor>& mask,
                                                                      double temperature,
                                                                      std::optional<double> softcap,
                                                                      bool with_entropy,
                                                                      const std::optional<at::Tensor>&) {
  check_same_shape("token_logprobs", "tokens", tokens, logits.sizes().slice(0, logits.dim() - 1));
  if (mask) check_same_shape("token_logprobs", "mask", *mask, tokens.sizes());
  const auto options = logits.options().dtype(compute_type(logits));
  at::Tensor logprobs = at::empty(tokens.sizes(), options), lse = at::empty(tokens.sizes(), options);
  at::Tensor entropy = with_entropy ? at::empty(tokens.sizes(), options) : at::empty({0}, options);
  const at::Tensor index = tokens.to(at::kLong).contiguous();
  const at::Tensor keep = mask ? mask->contiguous() : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "token_logprobs_fwd", [&] {
    forward_rows<scalar_t>(logits, index.const_data_ptr<int64_t>(), mask ? keep.const_data_ptr<bool>() : nullptr,
                           scaling_of<at::opmath_type<scalar_t>>(temperature, softcap), with_entropy, logprobs, entropy,
                           lse);
  });
  return {logprobs, entropy, lse};
}

template <typename scalar_t>
void backward_rows(const at::Tensor& logits, const int64_t* tokens, const bool* mask, const at::Tensor& lse_in,
                   const at::Tensor& entropy_in, const at::Tensor& grad_in, const at::Tensor& grad_entropy_in,
                   const Scaling<at::opmath_type<scalar_t>>& scaling, at::Tensor& out) {
  using T = at::opmath_type<scalar_t>;
  const Rows rows(logits);
  const int64_t vocabulary = logits.size(-1), count = lse_in.numel();
  const T* lse = lse_in.const_data_ptr<T>();
  const T* grads = grad_in.defined() ? grad_in.const_data_ptr<T>() : nullptr;
  const T* grads_entropy = grad_entropy_in.defined() ? grad_entropy_in.const_data_ptr<T>() : nullptr;
  const T* entropies = grads_entropy ? entropy_in.const_data_ptr<T>() : nullptr;
  scalar_t* dlogits = out.mutable_data_ptr<scalar_t>();
  at::parallel_for(0, count, std::max<int64_t>(1, 32768 / vocabulary), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      scalar_t* target = dlogits + i * vocabulary;
      if (tokens[i] < 0 || tokens[i] >= vocabulary || (mask && !mask[i])) {
        std::fill(target, target + vocabulary, scalar_t(0));
        continue;
      }
      const TokenStats<T> row{0, entropies ? entropies[i] : T(0), lse[i]};
      const TokenGrads<T> upstream{grads ? grads[i] : T(0), grads_entropy ? grads_entropy[i] : T(0)};
      token_gradient(rows.row<scalar_t>(i), vocabulary, tokens[i], row, upstream, scaling, target);
    }
  });
}

// `dlogits` may be the logits themselves: a block is written after it has been read.
void token_logprobs_bwd_out_cpu(const at::Tensor& logits, const at::Tensor& tokens,
                                const std::optional<at::Tensor>& mask, const at::Tensor& lse,
                                const at::Tensor& entropy, const std::optional<at::Tensor>& grad_logprobs,
                                const std::optional<at::Tensor>& grad_entropy, double temperature,
                                std::optional<double> softcap, at::Tensor& dlogits) {
  check_same_shape("token_logprobs", "lse", lse, tokens.sizes());
  const auto type = compute_type(logits);
  const auto prepared = [&](const std::optional<at::Tensor>& grad) {
    if (!grad) return at::Tensor();
    check_same_shape("token_logprobs", "a gradient", *grad, tokens.sizes());
    return grad->to(type).contiguous();
  };
  const at::Tensor grad = prepared(grad_logprobs), grad_h = prepared(grad_entropy);
  const at::Tensor index = tokens.to(at::kLong).contiguous(), saved_lse = lse.contiguous();
  const at::Tensor saved_entropy = entropy.contiguous(), keep = mask ? mask->contiguous() : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "token_logprobs_bwd", [&] {
    backward_rows<scalar_t>(logits, index.const_data_ptr<int64_t>(), mask ? keep.const_data_ptr<bool>() : nullptr,
                            saved_lse, saved_entropy, grad, grad_h,
                            scaling_of<at::opmath_type<scalar_t>>(temperature, softcap), dlogits);
  });
}

at::Tensor token_logprobs_bwd_cpu(const at::Tensor& logits, const at::Tensor& tokens,
                                  const std::optional<at::Tensor>& mask, const at::Tensor& lse,
                                  const at::Tensor& entropy, const std::optional<at::Tensor>& grad_logprobs,
                                  const std::optional<at::Tensor>& grad_entropy, double temperature,
                                  std::optional<double> softcap) {
  at::Tensor dlogits = at::empty(logits.sizes(), logits.options());
  token_logprobs_bwd_out_cpu(logits, tokens, mask, lse, entropy, grad_logprobs, grad_entropy, temperature, softcap,
                             dlogits);
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("token_logprobs_fwd", token_logprobs_fwd_cpu);
  m.impl("token_logprobs_bwd", token_logprobs_bwd_cpu);
  m.impl("token_logprobs_bwd_out", token_logprobs_bwd_out_cpu);
}

}  // namespace rlhf_kernels
