// PPO from logits and scores to a loss and the gradient of the logits, in three launches: the rollout [B, T], the rows of
// logits, and the sums over the tokens. A row is read from memory once: its gradient is written while it is still in the
// L2 cache, so there are only as many blocks as rows that fit there.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "logits.cuh"
#include "ppo.h"

namespace rlhf_kernels {
namespace {

constexpr int kThreads = 1024;  // a block fills half of a multiprocessor

template <typename T>
struct PolicyInputs {
  Plane<T> old_logprobs;
  const T* advantages;       // raw, contiguous like the outputs
  const Spread<T>* spreads;  // of the advantages, one for each of `parts`
  int64_t parts, columns;
  bool whiten;
  Plane<T> normalizer;
  Clips<T> clips;
  T entropy_coef;
};

template <typename T>
struct RowOutputs {
  T *logprobs, *entropy, *advantages;
};

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    fused_ppo_rows_kernel(LogitProblem<scalar_t> in, Softmax<T> softmax, PolicyInputs<T> policy, int64_t rows,
                          RowOutputs<T> out, scalar_t* dlogits) {
  const int64_t vocabulary = in.logits.vocabulary;
  Spread<T> all{0, 0, 0};
  for (int64_t i = threadIdx.x; i < policy.parts; i += kThreads) all = merged(all, policy.spreads[i]);
  all = block_reduce<kThreads>(all, [](const Spread<T>& a, const Spread<T>& b) { return merged(a, b); });
  const T count = all.count > 0 ? all.count : T(1);
  const T total = policy.normalizer.data ? policy.normalizer.at(0, 0) : count;
  const T scale = 1 / std::sqrt(all.squares / count + T(1e-8));
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    RowResult<T> result{0, 0, 0};
    RowGradient<T> gradient{0, 0};
    T advantage = 0;
    if (in.counts(i)) {
      const scalar_t* row = in.logits.row(i);
      const bool outside = in.tokens[i] >= vocabulary;
      const T chosen = softmax.scaled(static_cast<T>(row[outside ? 0 : in.tokens[i]]));
      result = row_result(row_sums<kThreads, true, true, T>(row, vocabulary, softmax), chosen, outside);
      advantage = policy.advantages[i];
      if (policy.whiten) advantage = (advantage - all.mean) * scale;
      if (dlogits) {
        const T old_logprob = policy.old_logprobs.at(i / policy.columns, i % policy.columns);
        gradient.logprob = policy_derivative(result.logprob, old_logprob, advantage, policy.clips) / total;
        gradient.entropy = -policy.entropy_coef / total;
      }
    }
    if (threadIdx.x == 0) {
      out.logprobs[i] = result.logprob;
      out.entropy[i] = result.entropy;
      out.advantages[i] = advantage;
    }
    if (!dlogits) continue;
    scalar_t* target = dlogits + i * vocabulary;
    if (gradient.logprob == 0 && gradient.entropy == 0) {  // NaN is neither
      write_zeros<kThreads>(0, vocabulary, vocabulary, target);
    } else {
      write_gradient<kThreads>(in.logits.row(i), 0, vocabulary, vocabulary, in.tokens[i], softmax, result.lse,
                               result.entropy, gradient, target);
    }
  }
}

// As many blocks as there are rows that fit in half of the L2 cache, but one a multiprocessor at least.
template <typename Kernel>
int64_t blocks_in_cache(Kernel kernel, int64_t row_bytes) {
  int device = 0, processors = 0, cache = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device));
  const int64_t fitting = cache / 2 / std::max<int64_t>(row_bytes, 1);
  return std::clamp<int64_t>(fitting, processors, blocks_at_once(kernel, kThreads));
}

// `dlogits` may be the logits themselves: a thread writes what it alone has read.
std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_ppo_loss(
    const at::Tensor& logits, const at::Tensor& tokens, const at::Tensor& scores, const at::Tensor& old_logprobs,
    const at::Tensor& ref_logprobs, const std::optional<at::Tensor>& attention, const at::Tensor& values,
    const at::Tensor& old_values, const at::Tensor& mask, const std::optional<at::Tensor>& normalizer,
    double temperature, std::optional<double> softcap, double kl_coef, double beta, double gamma, double lam,
    std::string_view estimator, bool whiten, double cliprange, double cliprange_high,
    std::optional<double> cliprange_value, double vf_coef, std::optional<double> dual_clip, double entropy_coef,
    std::optional<at::Tensor> dlogits) {
  const LogitInputs inputs("fused_ppo_loss", logits, tokens, mask);
  // In the dtype of the log-probabilities, which that of the logits need not be.
  const Rollout raw = rollout("fused_ppo_loss", scores, old_logprobs, ref_logprobs, attention, old_values, mask, &tokens,
                              kl_coef, beta, gamma, lam, estimator, Whiten::later, false);
  const auto options = logits.options().dtype(compute_type(logits));
  at::Tensor logprobs = at::empty(tokens.sizes(), options), entropy = at::empty_like(logprobs);
  at::Tensor advantages = at::empty_like(logprobs);
  at::Tensor dvalues = at::empty(dlogits ? values.sizes() : at::IntArrayRef{0}, values.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "fused_ppo_loss_fwd", [&] {
    using T = at::opmath_type<scalar_t>;
    const at::Tensor raw_advantages = raw.advantages.to(options.dtype()), spreads = raw.spreads.to(options.dtype());
    const at::Tensor divisor = normalizer ? normalizer->to(options.dtype()).reshape({1}) : at::Tensor();
    const PolicyInputs<T> policy{Plane<T>(old_logprobs),
                                 raw_advantages.const_data_ptr<T>(),
                                 reinterpret_cast<const Spread<T>*>(spreads.const_data_ptr<T>()),
                                 spreads.size(0),
                                 tokens.size(1),
                                 whiten,
                                 divisor.defined() ? Plane<T>(divisor) : Plane<T>(),
                                 clips_of<T>(cliprange, cliprange_high, dual_clip),
                                 static_cast<T>(entropy_coef)};
    const RowOutputs<T> out{logprobs.mutable_data_ptr<T>(), entropy.mutable_data_ptr<T>(),
                            advantages.mutable_data_ptr<T>()};
    const auto kernel = fused_ppo_rows_kernel<scalar_t, T>;
    const int64_t row_bytes = logits.size(-1) * static_cast<int64_t>(sizeof(scalar_t));
    launch(kernel, dim3(std::min(tokens.numel(), blocks_in_cache(kernel, row_bytes))), kThreads, false,
           inputs.problem<scalar_t>(), softmax_of<T>(temperature, softcap), policy, tokens.numel(), out,
           dlogits ? dlogits->mutable_data_ptr<scalar_t>() : nullptr);
  });
  const auto [loss, stats] =
      ppo_tokens("fused_ppo_loss", logprobs, old_logprobs, advantages, values, old_values, raw.returns, mask, &tokens,
                 entropy, normalizer, {cliprange, cliprange_high, cliprange_value, vf_coef, dual_clip, entropy_coef},
                 nullptr, dlogits ? &dvalues : nullptr);
  return {loss, stats, dvalues};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_ppo_loss_fwd_cuda(
    const at::Tensor& logits, const at::Tensor& tokens, const at::Tensor& scores, const at::Tensor& old_logprobs,
    const at::Tensor& ref_logprobs, const std::optional<at::Tensor>& attention, const at::Tensor& values,
    const at::Tensor& old_values, const at::Tensor& mask, const std::optional<at::Tensor>& normalizer,
    double temperature, std::optional<double> softcap, double kl_coef, double beta, double gamma, double lam,
    std::string_view estimator, bool whiten, double cliprange, double cliprange_high,
    std::optional<double> cliprange_value, double vf_coef, std::optional<double> dual_clip, double entropy_coef,
    bool with_grad) {
  const at::Tensor dlogits = at::empty(with_grad ? logits.sizes() : at::IntArrayRef{0}, logits.options());
  const auto [loss, stats, dvalues] =
      fused_ppo_loss(logits, tokens, scores, old_logprobs, ref_logprobs, attention, values, old_values, mask,
                     normalizer, temperature, softcap, kl_coef, beta, gamma, lam, estimator, whiten, cliprange,
                     cliprange_high, cliprange_value, vf_coef, dual_clip, entropy_coef,
                     with_grad ? std::optional<at::Tensor>(dlogits) : std::nullopt);
  return {loss, stats, dlogits, dvalues};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_ppo_loss_fwd_out_cuda(
    const at::Tensor& logits, const at::Tensor& tokens, const at::Tensor& scores, const at::Tensor& old_logprobs,
    const at::Tensor& ref_logprobs, const std::optional<at::Tensor>& attention, const at::Tensor& values,
    const at::Tensor& old_values, const at::Tensor& mask, const std::optional<at::Tensor>& normalizer,
    double temperature, std::optional<double> softcap, double kl_coef, double beta, double gamma, double lam,
    std::string_view estimator, bool whiten, double cliprange, double cliprange_high,
    std::optional<double> cliprange_value, double vf_coef, std::optional<double> dual_clip, double entropy_coef,
    at::Tensor& dlogits) {
  return fused_ppo_loss(logits, tokens, scores, old_logprobs, ref_logprobs, attention, values, old_values, mask,
                        normalizer, temperature, softcap, kl_coef, beta, gamma, lam, estimator, whiten, cliprange,
                        cliprange_high, cliprange_value, vf_coef, dual_clip, entropy_coef, dlogits);
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CUDA, m) {
  m.impl("fused_ppo_loss_fwd", fused_ppo_loss_fwd_cuda);
  m.impl("fused_ppo_loss_fwd_out", fused_ppo_loss_fwd_out_cuda);
}

}  // namespace rlhf_kernels
