// Log-probability and entropy of one token a row: forward reads the logits once, backward reads and writes them once.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "logits.cuh"

namespace rlhf_kernels {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kBlocks = 2048;  // of a backward pass: rows are split until there are about this many

template <typename scalar_t, typename T, bool ENTROPY>
__global__ void __launch_bounds__(kThreads)
    token_logprobs_fwd_kernel(LogitProblem<scalar_t> in, Softmax<T> softmax, T* __restrict__ logprobs,
                              T* __restrict__ entropy, T* __restrict__ lse) {
  const int64_t i = blockIdx.x;
  RowResult<T> result{0, 0, 0};
  if (in.counts(i)) {
    const int64_t vocabulary = in.logits.vocabulary;
    const scalar_t* row = in.logits.row(i);
    const bool outside = in.tokens[i] >= vocabulary;
    const T chosen = softmax.scaled(static_cast<T>(row[outside ? 0 : in.tokens[i]]));
    result = row_result(row_sums<kThreads, ENTROPY, false, T>(row, vocabulary, softmax), chosen, outside);
  }
  if (threadIdx.x > 0) return;
  logprobs[i] = result.logprob;
  lse[i] = result.lse;
  if (ENTROPY) entropy[i] = result.entropy;
}

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    token_logprobs_bwd_kernel(LogitProblem<scalar_t> in, Softmax<T> softmax, const T* __restrict__ lse,
                              const T* __restrict__ entropy, const T* __restrict__ grad_logprobs,
                              const T* __restrict__ grad_entropy, int64_t columns, scalar_t* dlogits) {
  const int64_t i = blockIdx.x, vocabulary = in.logits.vocabulary;
  const int64_t begin = blockIdx.y * columns, end = begin + columns < vocabulary ? begin + columns : vocabulary;
  scalar_t* target = dlogits + i * vocabulary;
  if (!in.counts(i)) return write_zeros<kThreads>(begin, end, vocabulary, target);
  const RowGradient<T> gradient{grad_logprobs ? grad_logprobs[i] : T(0), grad_entropy ? grad_entropy[i] : T(0)};
  write_gradient<kThreads>(in.logits.row(i), begin, end, vocabulary, in.tokens[i], softmax, lse[i],
                              grad_entropy ? entropy[i] : T(0), gradient, target);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> token_logprobs_fwd_cuda(
    const at::Tensor& logits, const at::Tensor& tokens, const std::optional<at::Tensor>& mask, double temperature,
    std::optional<double> softcap, bool with_entropy, const std::optional<at::Tensor>&) {
  const LogitInputs inputs("token_logprobs", logits, tokens, mask);
  const auto options = logits.options().dtype(compute_type(logits));
  at::Tensor logprobs = at::empty(tokens.sizes(), options), lse = at::empty_like(logprobs);
  at::Tensor entropy = at::empty(with_entropy ? tokens.sizes() : at::IntArrayRef{0}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "token_logprobs_fwd", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto kernel = with_entropy ? token_logprobs_fwd_kernel<scalar_t, T, true>
                                     : token_logprobs_fwd_kernel<scalar_t, T, false>;
    launch(kernel, dim3(tokens.numel()), kThreads, false, inputs.problem<scalar_t>(),
           softmax_of<T>(temperature, softcap), logprobs.mutable_data_ptr<T>(), entropy.mutable_data_ptr<T>(),
           lse.mutable_data_ptr<T>());
  });
  return {logprobs, entropy, lse};
}

// `dlogits` may be the logits themselves: a thread writes what it alone has read.
void token_logprobs_bwd_out_cuda(const at::Tensor& logits, const at::Tensor& tokens,
                                 const std::optional<at::Tensor>& mask, const at::Tensor& lse,
                                 const at::Tensor& entropy, const std::optional<at::Tensor>& grad_logprobs,
                                 const std::optional<at::Tensor>& grad_entropy, double temperature,
                                 std::optional<double> softcap, at::Tensor& dlogits) {
  const LogitInputs inputs("token_logprobs", logits, tokens, mask);
  const auto type = compute_type(logits);
  const auto prepared = [&](const std::optional<at::Tensor>& tensor) {
    if (!tensor) return at::Tensor();
    check_same_shape("token_logprobs", "a gradient", *tensor, tokens.sizes());
    return tensor->to(type).contiguous();
  };
  const at::Tensor saved_lse = lse.contiguous(), saved_entropy = entropy.contiguous();
  const at::Tensor grad = prepared(grad_logprobs), grad_h = prepared(grad_entropy);
  const int64_t rows = std::max<int64_t>(tokens.numel(), 1), vocabulary = logits.size(-1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "token_logprobs_bwd", [&] {
    using T = at::opmath_type<scalar_t>;
    const int64_t tile = kThreads * LogitRows<scalar_t>::items, tiles = (vocabulary + tile - 1) / tile;
    const int64_t splits = std::clamp<int64_t>(kBlocks / rows, 1, tiles), columns = (tiles + splits - 1) / splits * tile;
    launch(token_logprobs_bwd_kernel<scalar_t, T>, dim3(tokens.numel(), (vocabulary + columns - 1) / columns),
           kThreads, false, inputs.problem<scalar_t>(), softmax_of<T>(temperature, softcap),
           saved_lse.const_data_ptr<T>(), saved_entropy.const_data_ptr<T>(),
           grad.defined() ? grad.const_data_ptr<T>() : nullptr, grad_h.defined() ? grad_h.const_data_ptr<T>() : nullptr,
           columns, dlogits.mutable_data_ptr<scalar_t>());
  });
}

at::Tensor token_logprobs_bwd_cuda(const at::Tensor& logits, const at::Tensor& tokens,
                                   const std::optional<at::Tensor>& mask, const at::Tensor& lse,
                                   const at::Tensor& entropy, const std::optional<at::Tensor>& grad_logprobs,
                                   const std::optional<at::Tensor>& grad_entropy, double temperature,
                                   std::optional<double> softcap) {
  at::Tensor dlogits = at::empty(logits.sizes(), logits.options());
  token_logprobs_bwd_out_cuda(logits, tokens, mask, lse, entropy, grad_logprobs, grad_entropy, temperature, softcap,
                              dlogits);
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CUDA, m) {
  m.impl("token_logprobs_fwd", token_logprobs_fwd_cuda);
  m.impl("token_logprobs_bwd", token_logprobs_bwd_cuda);
  m.impl("token_logprobs_bwd_out", token_logprobs_bwd_out_cuda);
}

}  // namespace rlhf_kernels
