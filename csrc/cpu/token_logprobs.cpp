// log π(token) and entropy from logits. Forward: each row is read once, block by block, with an online maximum; a block
// is in the L1 cache when its exponentials are summed. Backward: from the saved logsumexp, one read and one write.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <optional>

#include "common.h"
#include "simd.h"

namespace rlhf_kernels {
namespace {

template <typename T>
struct RowStats {
  T highest = -std::numeric_limits<T>::infinity();  // of the logits, before the temperature
  double sum = 0;       // Σ exp(z − highest)
  double weighted = 0;  // Σ exp(z − highest) · (z − highest)
};

// Soft-capped logits of a block, in `buffer`; −inf stays −inf.
template <typename T>
const T* capped(const T* x, int64_t n, T softcap, T* buffer) {
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = x[i] == -std::numeric_limits<T>::infinity() ? x[i] : softcap * std::tanh(x[i] / softcap);
  }
  return buffer;
}

template <bool with_entropy, typename T>
void add_block(RowStats<T>& row, const T* x, int64_t n, T inverse_temperature) {
  const T block_highest = block_max(x, n);
  if (block_highest > row.highest) {
    if (row.sum > 0) {
      const double drop = (static_cast<double>(row.highest) - block_highest) * inverse_temperature;
      const double scale = std::exp(drop);
      row.weighted = scale * (row.weighted + drop * row.sum);
      row.sum *= scale;
    }
    row.highest = block_highest;
  }
  const T highest = row.highest;
  // A row of −inf so far sums nothing; NaN must still come through.
  const T base = highest == -std::numeric_limits<T>::infinity() ? T(0) : highest;
  T sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t i = 0; i < n; ++i) {
    const T d = (x[i] - base) * inverse_temperature;
    const T e = fast_exp(d);
    sum += e;
    if (with_entropy) weighted += e * (d < T(-1000) ? T(-1000) : d);  // 0 · −inf would be NaN
  }
  row.sum += sum;
  row.weighted += weighted;
}

template <typename scalar_t>
void forward_rows(const at::Tensor& logits, const int64_t* tokens, const bool* mask, double temperature,
                  std::optional<double> softcap, bool with_entropy, at::Tensor& logprobs_out, at::Tensor& entropy_out,
                  at::Tensor& lse_out) {
  using T = at::opmath_type<scalar_t>;
  const Rows rows(logits);
  const int64_t vocabulary = logits.size(-1), count = lse_out.numel();
  auto* logprobs = logprobs_out.mutable_data_ptr<T>();
  auto* entropy = with_entropy ? entropy_out.mutable_data_ptr<T>() : nullptr;
  auto* lse = lse_out.mutable_data_ptr<T>();
  const T inverse = static_cast<T>(1 / temperature), cap = static_cast<T>(softcap.value_or(0));
  std::atomic<int64_t> outside{-1};
  at::parallel_for(0, count, std::max<int64_t>(1, 32768 / vocabulary), [&](int64_t begin, int64_t end) {
    T buffer[kBlock], scratch[kBlock];
    for (int64_t i = begin; i < end; ++i) {
      logprobs[i] = lse[i] = 0;
      if (with_entropy) entropy[i] = 0;
      if (tokens[i] < 0 || (mask && !mask[i])) continue;
      if (tokens[i] >= vocabulary) {
        outside = tokens[i];
        continue;
      }
      const scalar_t* row = rows.row<scalar_t>(i);
      RowStats<T> stats;
      T chosen = 0;
      for (int64_t start = 0; start < vocabulary; start += kBlock) {
        const int64_t n = std::min(kBlock, vocabulary - start);
        const T* block = widened(row + start, n, buffer);
        if (softcap) block = capped(block, n, cap, scratch);
        if (tokens[i] >= start && tokens[i] < start + n) chosen = block[tokens[i] - start];
        with_entropy ? add_block<true>(stats, block, n, inverse) : add_block<false>(stats, block, n, inverse);
      }
      const double log_sum = std::log(stats.sum);
      const double highest = static_cast<double>(stats.highest) * inverse;
      const bool empty = stats.sum == 0;
      lse[i] = static_cast<T>(empty ? -std::numeric_limits<double>::infinity() : highest + log_sum);
      logprobs[i] = chosen == -std::numeric_limits<T>::infinity()
                        ? chosen
                        : static_cast<T>((static_cast<double>(chosen) - stats.highest) * inverse - log_sum);
      if (with_entropy && !empty) entropy[i] = static_cast<T>(log_sum - stats.weighted / stats.sum);
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
                           temperature, softcap, with_entropy, logprobs, entropy, lse);
  });
  return {logprobs, entropy, lse};
}

// ∂L/∂logits of one block: p · (−g − g_H · (log p + H)) / temperature, and g / temperature more at the token.
template <bool with_entropy, typename T>
void backward_block(const T* x, int64_t n, T inverse_temperature, T lse, T entropy, T grad, T grad_entropy, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T logp = x[i] * inverse_temperature - lse;
    const T p = fast_exp(logp);
    T weight = -grad;
    if (with_entropy) weight -= grad_entropy * ((logp < T(-1000) ? T(-1000) : logp) + entropy);
    out[i] = p * weight * inverse_temperature;
  }
}

template <typename scalar_t>
void backward_rows(const at::Tensor& logits, const int64_t* tokens, const bool* mask, const at::Tensor& lse_in,
                   const at::Tensor& entropy_in, const at::Tensor& grad_in, const at::Tensor& grad_entropy_in,
                   double temperature, std::optional<double> softcap, at::Tensor& out) {
  using T = at::opmath_type<scalar_t>;
  const Rows rows(logits);
  const int64_t vocabulary = logits.size(-1), count = lse_in.numel();
  const T* lse = lse_in.const_data_ptr<T>();
  const T* grads = grad_in.defined() ? grad_in.const_data_ptr<T>() : nullptr;
  const T* grads_entropy = grad_entropy_in.defined() ? grad_entropy_in.const_data_ptr<T>() : nullptr;
  const T* entropies = grads_entropy ? entropy_in.const_data_ptr<T>() : nullptr;
  scalar_t* dlogits = out.mutable_data_ptr<scalar_t>();
  const T inverse = static_cast<T>(1 / temperature), cap = static_cast<T>(softcap.value_or(0));
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  at::parallel_for(0, count, std::max<int64_t>(1, 32768 / vocabulary), [&](int64_t begin, int64_t end) {
    T buffer[kBlock], scratch[kBlock], gradient[kBlock];
    for (int64_t i = begin; i < end; ++i) {
      scalar_t* target = dlogits + i * vocabulary;
      if (tokens[i] < 0 || tokens[i] >= vocabulary || (mask && !mask[i]) || lse[i] == nothing) {
        std::fill(target, target + vocabulary, scalar_t(0));
        continue;
      }
      const scalar_t* row = rows.row<scalar_t>(i);
      const T grad = grads ? grads[i] : T(0), grad_entropy = grads_entropy ? grads_entropy[i] : T(0);
      const T entropy = entropies ? entropies[i] : T(0);
      for (int64_t start = 0; start < vocabulary; start += kBlock) {
        const int64_t n = std::min(kBlock, vocabulary - start);
        const T* block = widened(row + start, n, buffer);
        if (softcap) block = capped(block, n, cap, scratch);
        if (grads_entropy) {
          backward_block<true>(block, n, inverse, lse[i], entropy, grad, grad_entropy, gradient);
        } else {
          backward_block<false>(block, n, inverse, lse[i], entropy, grad, grad_entropy, gradient);
        }
        const int64_t token = tokens[i] - start;
        if (token >= 0 && token < n) gradient[token] = block[token] == nothing ? 0 : gradient[token] + grad * inverse;
        if (softcap) {
          for (int64_t j = 0; j < n; ++j) {
            const T tanh = block[j] / cap;
            gradient[j] = block[j] == nothing ? 0 : gradient[j] * (1 - tanh * tanh);
          }
        }
        narrow(gradient, n, target + start);
      }
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
                            saved_lse, saved_entropy, grad, grad_h, temperature, softcap, dlogits);
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
