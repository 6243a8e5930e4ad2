// The clipped PPO loss with its gradient in one pass. Chunks of a fixed size gather their own sums, which are then
// added in order: the result does not depend on the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <vector>

#include "common.h"
#include "ops.h"
#include "simd.h"

namespace rlhf_kernels {
namespace {

constexpr int64_t kChunk = 4096;

struct ChunkSums {
  double policy = 0, value = 0, squared_log_ratio = 0, above = 0, below = 0, value_clipped = 0, ratio = 0;
  double largest_ratio = 0;
  Moments residuals, targets;  // of returns − values and of returns

  void add(const ChunkSums& other) {
    policy += other.policy;
    value += other.value;
    squared_log_ratio += other.squared_log_ratio;
    above += other.above;
    below += other.below;
    value_clipped += other.value_clipped;
    ratio += other.ratio;
    // A NaN ratio must show.
    largest_ratio = other.largest_ratio <= largest_ratio ? largest_ratio : other.largest_ratio;
    residuals.merge(other.residuals);
    targets.merge(other.targets);
  }
};

template <typename T>
struct Inputs {
  const T *logprobs, *old_logprobs, *advantages, *values, *old_values, *returns;
  const bool* mask;

  // Two −inf have no ratio: such a token could not be sampled, so it is taken out.
  bool counts(int64_t i) const {
    constexpr T nothing = -std::numeric_limits<T>::infinity();
    return mask[i] && !(logprobs[i] == nothing && old_logprobs[i] == nothing);
  }
};

template <typename T>
struct Scalars {
  T low, high, dual_clip, cliprange_value, vf_coef;
};

template <typename T>
ChunkSums chunk(const Inputs<T>& in, int64_t begin, int64_t end, const Scalars<T>& s, T inverse_normalizer,
                T* dlogprobs, T* dvalues) {
  ChunkSums sums;
  std::array<bool, kChunk> counted;
  for (int64_t i = begin; i < end; ++i) {
    counted[i - begin] = in.counts(i);
    if (dlogprobs) dlogprobs[i] = dvalues[i] = 0;
    if (!counted[i - begin]) continue;
    const auto policy =
        policy_term(log_difference(in.logprobs[i], in.old_logprobs[i]), in.advantages[i], s.low, s.high, s.dual_clip);
    const auto value = value_term(in.values[i], in.old_values[i], in.returns[i], s.cliprange_value);
    sums.policy += policy.loss;
    sums.value += value.loss;
    sums.squared_log_ratio += static_cast<double>(policy.log_ratio) * policy.log_ratio;
    sums.above += policy.above;
    sums.below += policy.below;
    sums.value_clipped += value.clipped;
    sums.ratio += policy.ratio;
    if (!(policy.ratio <= sums.largest_ratio)) sums.largest_ratio = policy.ratio;
    if (dlogprobs) {
      dlogprobs[i] = policy.derivative * inverse_normalizer;
      dvalues[i] = s.vf_coef * value.derivative * inverse_normalizer;
    }
  }
  const auto target = [&](int64_t i) { return static_cast<double>(in.returns[begin + i]); };
  sums.targets = moments_of(counted.data(), end - begin, target);
  sums.residuals =
      moments_of(counted.data(), end - begin, [&](int64_t i) { return target(i) - in.values[begin + i]; });
  return sums;
}

// Calls f(chunk, begin, end) for each chunk, in parallel.
template <typename F>
void for_chunks(int64_t count, F f) {
  at::parallel_for(0, (count + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) f(c, c * kChunk, std::min(count, (c + 1) * kChunk));
  });
}

template <typename T>
int64_t number_counted(const Inputs<T>& in, int64_t count) {
  std::vector<int64_t> per_chunk((count + kChunk - 1) / kChunk, 0);
  for_chunks(count, [&](int64_t c, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) per_chunk[c] += in.counts(i);
  });
  int64_t total = 0;
  for (const int64_t n : per_chunk) total += n;
  return total;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ppo_loss_fwd_cpu(
    const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages, const at::Tensor& values,
    const at::Tensor& old_values, const at::Tensor& returns, const at::Tensor& mask,
    const std::optional<at::Tensor>& normalizer, double cliprange, double cliprange_high,
    std::optional<double> cliprange_value, double vf_coef, std::optional<double> dual_clip, bool with_grad) {
  const auto type = compute_type(logprobs);
  const auto prepared = [&](const char* name, const at::Tensor& tensor) {
    check_same_shape("ppo_loss", name, tensor, logprobs.sizes());
    return tensor.to(type).contiguous();
  };
  const at::Tensor lp = prepared("logprobs", logprobs), old = prepared("old_logprobs", old_logprobs);
  const at::Tensor adv = prepared("advantages", advantages), v = prepared("values", values);
  const at::Tensor old_v = prepared("old_values", old_values), ret = prepared("returns", returns);
  check_same_shape("ppo_loss", "mask", mask, logprobs.sizes());
  const at::Tensor keep = mask.contiguous();
  at::Tensor loss = at::empty({}, lp.options()), stats = at::empty({10}, lp.options());
  at::Tensor dlogprobs = with_grad ? at::empty_like(lp) : at::empty({0}, logprobs.options());
  at::Tensor dvalues = with_grad ? at::empty_like(v) : at::empty({0}, values.options());
  const int64_t count = lp.numel();
  AT_DISPATCH_FLOATING_TYPES(type, "ppo_loss_fwd", [&] {
    const Inputs<scalar_t> in{lp.const_data_ptr<scalar_t>(),    old.const_data_ptr<scalar_t>(),
                              adv.const_data_ptr<scalar_t>(),   v.const_data_ptr<scalar_t>(),
                              old_v.const_data_ptr<scalar_t>(), ret.const_data_ptr<scalar_t>(),
                              keep.const_data_ptr<bool>()};
    const Scalars<scalar_t> scalars{
        static_cast<scalar_t>(1 - cliprange), static_cast<scalar_t>(1 + cliprange_high),
        static_cast<scalar_t>(dual_clip.value_or(-1)), static_cast<scalar_t>(cliprange_value.value_or(-1)),
        static_cast<scalar_t>(vf_coef)};
    const double tokens = static_cast<double>(number_counted(in, count));
    const double total = normalizer ? normalizer->item<double>() : std::max(tokens, 1.0);
    auto* dlp = with_grad ? dlogprobs.mutable_data_ptr<scalar_t>() : nullptr;
    auto* dv = with_grad ? dvalues.mutable_data_ptr<scalar_t>() : nullptr;
    std::vector<ChunkSums> chunks((count + kChunk - 1) / kChunk);
    for_chunks(count, [&](int64_t c, int64_t begin, int64_t end) {
      chunks[c] = chunk(in, begin, end, scalars, static_cast<scalar_t>(1 / total), dlp, dv);
    });
    ChunkSums all;
    for (const ChunkSums& each : chunks) all.add(each);
    const double n = std::max(tokens, 1.0), spread = all.targets.variance();
    const double explained = spread > 0 ? 1 - all.residuals.variance() / spread : 0;
    const std::array<double, 10> row{all.policy / total,    all.value / total,       0.5 * all.squared_log_ratio / n,
                                     all.above / n,         all.below / n,           all.value_clipped / n,
                                     all.ratio / n,         all.largest_ratio,       explained,
                                     tokens};
    std::copy(row.begin(), row.end(), stats.mutable_data_ptr<scalar_t>());
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(row[0] + vf_coef * row[1]);
  });
  return {loss, stats, dlogprobs.to(logprobs.scalar_type()), dvalues.to(values.scalar_type())};
}

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) { m.impl("ppo_loss_fwd", ppo_loss_fwd_cpu); }

}  // namespace rlhf_kernels
