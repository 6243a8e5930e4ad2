// The clipped PPO loss with its gradient in one launch. Each token is read once: its derivatives wait in registers until
// all blocks have counted their tokens (a cooperative launch), then they are divided and written. A block that had more
// than one tile works the earlier ones out again.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include "device.cuh"
#include "ppo.h"

namespace rlhf_kernels {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct TokenInputs {
  Plane<T> logprobs, old_logprobs, advantages, values, old_values, returns, entropy;
  MaskPlane mask;
  int64_t rows, columns;
  Clips<T> clips;
  T cliprange_value, vf_coef, entropy_coef;  // cliprange_value < 0: none
  Plane<T> normalizer;
  bool with_entropy;

  __device__ int64_t groups() const { return (columns + kItems - 1) / kItems; }
};

// What is summed over the tokens.
template <typename T>
struct TokenSums {
  T policy, value, squared_log_ratio, ratio, highest_ratio, entropy;
  int counted, masked, above, below, value_clipped, padding;  // masked: also the tokens that have no ratio
  Spread<T> residuals, targets;                               // of returns − values and of returns

  static __device__ TokenSums none() { return {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {0, 0, 0}, {0, 0, 0}}; }
};

template <typename T>
__device__ TokenSums<T> merged(const TokenSums<T>& a, const TokenSums<T>& b) {
  return {a.policy + b.policy,
          a.value + b.value,
          a.squared_log_ratio + b.squared_log_ratio,
          a.ratio + b.ratio,
          b.highest_ratio <= a.highest_ratio ? a.highest_ratio : b.highest_ratio,  // NaN must show
          a.entropy + b.entropy,
          a.counted + b.counted,
          a.masked + b.masked,
          a.above + b.above,
          a.below + b.below,
          a.value_clipped + b.value_clipped,
          0,
          merged(a.residuals, b.residuals),
          merged(a.targets, b.targets)};
}

template <typename T>
struct TokenGradients {
  T logprobs[kItems], values[kItems];  // of the sum, not yet of the mean
};

// kItems neighbouring tokens: their derivatives, and what they add to `sums`.
template <typename T>
__device__ void token_terms(const TokenInputs<T>& in, int64_t group, TokenGradients<T>& gradients, TokenSums<T>& sums) {
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  const int64_t row = group / in.groups(), column = group % in.groups() * kItems;
  bool keep[kItems], counted[kItems];
  T logprobs[kItems], old_logprobs[kItems], advantages[kItems], values[kItems], old_values[kItems], returns[kItems];
  T entropy[kItems] = {}, residuals[kItems];
  in.mask.load(row, column, in.columns, keep);
  in.logprobs.load(row, column, in.columns, keep, logprobs);
  in.old_logprobs.load(row, column, in.columns, keep, old_logprobs);
  in.advantages.load(row, column, in.columns, keep, advantages);
  in.values.load(row, column, in.columns, keep, values);
  in.old_values.load(row, column, in.columns, keep, old_values);
  in.returns.load(row, column, in.columns, keep, returns);
  if (in.with_entropy) in.entropy.load(row, column, in.columns, keep, entropy);
  for (int i = 0; i < kItems; ++i) {
    // Two −∞ have no ratio: such a token could not be sampled, so it is taken out.
    counted[i] = keep[i] && !(logprobs[i] == nothing && old_logprobs[i] == nothing);
    gradients.logprobs[i] = gradients.values[i] = 0;
    residuals[i] = returns[i] - values[i];
    sums.masked += keep[i];
    sums.entropy += entropy[i];
    if (!counted[i]) continue;
    const auto policy =
        policy_term(log_difference(logprobs[i], old_logprobs[i]), advantages[i], in.clips.low, in.clips.high,
                    in.clips.dual_clip);
    const auto value = value_term(values[i], old_values[i], returns[i], in.cliprange_value);
    gradients.logprobs[i] = policy.derivative;
    gradients.values[i] = in.vf_coef * value.derivative;
    sums.policy += policy.loss;
    sums.value += value.loss;
    sums.squared_log_ratio += policy.log_ratio * policy.log_ratio;
    sums.ratio += policy.ratio;
    if (!(policy.ratio <= sums.highest_ratio)) sums.highest_ratio = policy.ratio;
    sums.counted += 1;
    sums.above += policy.above != 0;
    sums.below += policy.below != 0;
    sums.value_clipped += value.clipped != 0;
  }
  sums.residuals = merged(sums.residuals, spread_of(residuals, counted));
  sums.targets = merged(sums.targets, spread_of(returns, counted));
}

template <typename scalar_t, typename T>
__device__ void store_gradient(scalar_t* gradient, int64_t row, int64_t column, int64_t columns,
                               const T (&items)[kItems], T factor) {
  for (int i = 0; i < kItems; ++i) {
    if (column + i < columns) gradient[row * columns + column + i] = static_cast<scalar_t>(items[i] * factor);
  }
}

// The gradients in the dtypes of their inputs, as AT_DISPATCH would need a kernel for each pair of them.
struct GradientTarget {
  void* data;
  at::ScalarType dtype;

  template <typename T>
  __device__ void store(int64_t row, int64_t column, int64_t columns, const T (&items)[kItems], T factor) const {
    switch (dtype) {
      case at::ScalarType::Double:
        return store_gradient(static_cast<double*>(data), row, column, columns, items, factor);
      case at::ScalarType::BFloat16:
        return store_gradient(static_cast<c10::BFloat16*>(data), row, column, columns, items, factor);
      case at::ScalarType::Half:
        return store_gradient(static_cast<c10::Half*>(data), row, column, columns, items, factor);
      default:
        return store_gradient(static_cast<float*>(data), row, column, columns, items, factor);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    ppo_loss_fwd_kernel(TokenInputs<T> in, TokenSums<T>* parts, T* __restrict__ loss, T* __restrict__ stats,
                        GradientTarget dlogprobs, GradientTarget dvalues) {
  const int64_t groups = in.rows * in.groups(), stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const auto merge = [](const TokenSums<T>& a, const TokenSums<T>& b) { return merged(a, b); };
  TokenSums<T> sums = TokenSums<T>::none();
  TokenGradients<T> gradients;
  int64_t held = -1;  // the group whose derivatives are in `gradients`
  for (int64_t group = first; group < groups; group += stride) {
    token_terms(in, group, gradients, sums);
    held = group;
  }
  sums = block_reduce<kThreads>(sums, merge);
  if (threadIdx.x == 0) parts[blockIdx.x] = sums;
  cooperative_groups::this_grid().sync();
  int64_t counted = 0, masked = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) {
    counted += parts[i].counted;
    masked += parts[i].masked;
  }
  const T n = static_cast<T>(counted > 0 ? counted : 1), n_masked = static_cast<T>(masked > 0 ? masked : 1);
  const T total = in.normalizer.data ? in.normalizer.at(0, 0) : (in.with_entropy ? n_masked : n);
  if (dlogprobs.data || dvalues.data) {
    for (int64_t group = held; group >= 0; group -= stride) {
      TokenSums<T> unused = TokenSums<T>::none();
      if (group != held) token_terms(in, group, gradients, unused);
      const int64_t row = group / in.groups(), column = group % in.groups() * kItems;
      if (dlogprobs.data) dlogprobs.store(row, column, in.columns, gradients.logprobs, 1 / total);
      if (dvalues.data) dvalues.store(row, column, in.columns, gradients.values, 1 / total);
    }
  }
  if (blockIdx.x > 0) return;
  TokenSums<T> all = TokenSums<T>::none();
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) all = merged(all, parts[i]);
  all = block_reduce<kThreads>(all, merge);
  if (threadIdx.x > 0) return;
  const T explained = all.targets.squares > 0 ? 1 - all.residuals.squares / all.targets.squares : T(0);
  *stats++ = all.policy / total;
  *stats++ = all.value / total;
  if (in.with_entropy) *stats++ = all.entropy / n_masked;
  *stats++ = all.squared_log_ratio / 2 / n;
  *stats++ = all.above / n;
  *stats++ = all.below / n;
  *stats++ = all.value_clipped / n;
  *stats++ = all.ratio / n;
  *stats++ = all.highest_ratio;
  *stats++ = explained;
  *stats++ = static_cast<T>(counted);
  *loss = (all.policy + in.vf_coef * all.value - in.entropy_coef * all.entropy) / total;
}

// As [rows, columns], whatever the number of dimensions.
at::Tensor two_dimensional(const at::Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  if (tensor.dim() < 2) return tensor.reshape({1, tensor.numel()});
  return tensor.flatten(0, -2);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ppo_loss_fwd_cuda(
    const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages, const at::Tensor& values,
    const at::Tensor& old_values, const at::Tensor& returns, const at::Tensor& mask,
    const std::optional<at::Tensor>& normalizer, double cliprange, double cliprange_high,
    std::optional<double> cliprange_value, double vf_coef, std::optional<double> dual_clip, bool with_grad) {
  const auto room = [&](const at::Tensor& like) {
    return at::empty(with_grad ? like.sizes() : at::IntArrayRef{0}, like.options());
  };
  at::Tensor dlogprobs = room(logprobs), dvalues = room(values);
  const auto [loss, stats] = ppo_tokens(
      "ppo_loss", logprobs, old_logprobs, advantages, values, old_values, returns, mask, nullptr, std::nullopt,
      normalizer, {cliprange, cliprange_high, cliprange_value, vf_coef, dual_clip}, with_grad ? &dlogprobs : nullptr,
      with_grad ? &dvalues : nullptr);
  return {loss, stats, dlogprobs, dvalues};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> ppo_tokens(const char* op, const at::Tensor& logprobs,
                                              const at::Tensor& old_logprobs, const at::Tensor& advantages,
                                              const at::Tensor& values, const at::Tensor& old_values,
                                              const at::Tensor& returns, const at::Tensor& mask,
                                              const at::Tensor* tokens, const std::optional<at::Tensor>& entropy,
                                              const std::optional<at::Tensor>& normalizer, const PpoScalars& scalars,
                                              at::Tensor* dlogprobs, at::Tensor* dvalues) {
  check_same_shape(op, "old_logprobs", old_logprobs, logprobs.sizes());
  check_same_shape(op, "advantages", advantages, logprobs.sizes());
  check_same_shape(op, "values", values, logprobs.sizes());
  check_same_shape(op, "old_values", old_values, logprobs.sizes());
  check_same_shape(op, "returns", returns, logprobs.sizes());
  check_same_shape(op, "mask", mask, logprobs.sizes());
  const c10::cuda::CUDAGuard guard(logprobs.device());
  const auto options = logprobs.options().dtype(compute_type(logprobs));
  at::Tensor loss = at::empty({}, options), stats = at::empty({entropy ? 11 : 10}, options);
  AT_DISPATCH_FLOATING_TYPES(stats.scalar_type(), "ppo_loss_fwd", [&] {
    using T = scalar_t;
    // Views of these, or copies that must live until the launch.
    const at::Tensor lp = two_dimensional(logprobs), old = two_dimensional(old_logprobs), keep = two_dimensional(mask);
    const at::Tensor adv = two_dimensional(advantages), v = two_dimensional(values);
    const at::Tensor old_v = two_dimensional(old_values), ret = two_dimensional(returns);
    const at::Tensor h = entropy ? two_dimensional(*entropy) : at::Tensor();
    const at::Tensor ids = tokens ? two_dimensional(*tokens) : at::Tensor();
    const at::Tensor divisor = normalizer ? normalizer->to(options.dtype()).reshape({1}) : at::Tensor();
    const TokenInputs<T> in{Plane<T>(lp),
                            Plane<T>(old),
                            Plane<T>(adv),
                            Plane<T>(v),
                            Plane<T>(old_v),
                            Plane<T>(ret),
                            h.defined() ? Plane<T>(h) : Plane<T>(),
                            MaskPlane(keep, tokens ? &ids : nullptr),
                            lp.size(0),
                            lp.size(1),
                            clips_of<T>(scalars.cliprange, scalars.cliprange_high, scalars.dual_clip),
                            static_cast<T>(scalars.cliprange_value.value_or(-1)),
                            static_cast<T>(scalars.vf_coef),
                            static_cast<T>(scalars.entropy_coef),
                            divisor.defined() ? Plane<T>(divisor) : Plane<T>(),
                            entropy.has_value()};
    const auto kernel = ppo_loss_fwd_kernel<T>;
    const int64_t groups = in.rows * ((in.columns + kItems - 1) / kItems);
    const int64_t blocks =
        std::clamp<int64_t>((groups + kThreads - 1) / kThreads, 1, blocks_at_once(kernel, kThreads));
    at::Tensor parts = at::empty({blocks * static_cast<int64_t>(sizeof(TokenSums<T>))}, options.dtype(at::kByte));
    const auto target = [](at::Tensor* tensor) {
      return tensor ? GradientTarget{tensor->mutable_data_ptr(), tensor->scalar_type()}
                    : GradientTarget{nullptr, at::ScalarType::Float};
    };
    launch(kernel, dim3(blocks), kThreads, true, in, reinterpret_cast<TokenSums<T>*>(parts.mutable_data_ptr()),
           loss.mutable_data_ptr<T>(), stats.mutable_data_ptr<T>(), target(dlogprobs), target(dvalues));
  });
  return {loss, stats};
}

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CUDA, m) { m.impl("ppo_loss_fwd", ppo_loss_fwd_cuda); }

}  // namespace rlhf_kernels
