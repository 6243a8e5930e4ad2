// From scores to advantages in one launch: rewards, reverse scan and whitening. A block goes through its rows from right
// to left. Whitening needs the whole batch, so all blocks wait for each other once (a cooperative launch); the tile that
// a block had last is still in its registers then, which for short rows is all there is. `token_rewards` is the first
// part alone.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include "ppo.h"
#include "rewards.cuh"
#include "scan.cuh"

namespace rlhf_kernels {
namespace {

template <typename T, int THREADS>
__global__ void __launch_bounds__(THREADS) token_rewards_kernel(RewardInputs<T> in, T* rewards, T* kl) {
  const int64_t row = blockIdx.x;
  const RowCredit<T> credit = row_credit<THREADS>(in, row);
  const T score = in.per_token ? T(0) : in.scores.at(row, 0);
  for (int64_t column = threadIdx.x * kItems; column < in.length; column += THREADS * kItems) {
    RewardTile<T> tile;
    T paid[kItems], estimate[kItems];
    tile.load(in, row, column);
    tile.pay(in, row, score, credit, column, paid, estimate);
    store_items(rewards + row * in.length, column, in.length, paid);
    store_items(kl + row * in.length, column, in.length, estimate);
  }
}

std::tuple<at::Tensor, at::Tensor> token_rewards_cuda(const at::Tensor& scores, const at::Tensor& logprobs,
                                                      const at::Tensor& ref_logprobs,
                                                      const std::optional<at::Tensor>& attention,
                                                      const at::Tensor& mask, double kl_coef, double beta,
                                                      std::string_view estimator) {
  const c10::cuda::CUDAGuard guard(logprobs.device());
  const auto type = compute_type(logprobs);
  at::Tensor rewards = at::empty(logprobs.sizes(), logprobs.options().dtype(type)), kl = at::empty_like(rewards);
  AT_DISPATCH_FLOATING_TYPES(type, "token_rewards", [&] {
    const RewardInputs<scalar_t> in("token_rewards", scores, logprobs, ref_logprobs, attention, mask, nullptr, kl_coef,
                                    beta, estimator);
    with_threads_for(in.length, [&](auto threads) {
      launch(token_rewards_kernel<scalar_t, threads>, dim3(in.length ? in.batch : 0), threads, false, in,
             rewards.mutable_data_ptr<scalar_t>(), kl.mutable_data_ptr<scalar_t>());
    });
  });
  return {rewards, kl};
}

template <typename T>
struct RolloutOutputs {
  T *advantages, *returns, *rewards, *kl;
  Spread<T>* spreads;  // one a block, of its advantages; null: not wanted
  bool whiten;
};

template <typename T, int THREADS>
__global__ void __launch_bounds__(THREADS)
    rollout_advantages_kernel(RewardInputs<T> in, Plane<T> values, T gamma, T lam, RolloutOutputs<T> out) {
  constexpr int tile = THREADS * kItems;
  const int64_t last_start = (in.length - 1) / tile * tile;
  Spread<T> spread{0, 0, 0};
  T advantages[kItems];
  bool keep[kItems];
  int64_t held = -1;  // the row whose first tile is in `advantages` and `keep`
  for (int64_t row = blockIdx.x; row < in.batch; row += gridDim.x) {
    if (held >= 0) store_items(out.advantages + held * in.length, threadIdx.x * kItems, in.length, advantages);
    held = row;
    RewardTile<T> inputs;
    T v[kItems];
    GaeCarry<T> carry{0, 0};
    inputs.load(in, row, last_start + threadIdx.x * kItems);
    values.load(row, last_start + threadIdx.x * kItems, in.length, inputs.keep, v);
    const T score = in.per_token ? T(0) : in.scores.at(row, 0);
    const RowCredit<T> credit = row_credit<THREADS>(in, row);
    for (int64_t start = last_start; start >= 0; start -= tile) {
      const int64_t column = start + threadIdx.x * kItems, at = row * in.length;
      T rewards[kItems], kl[kItems], returns[kItems];
      if (start != last_start) {
        store_items(out.advantages + at, column + tile, in.length, advantages);
        inputs.load(in, row, column);
        values.load(row, column, in.length, inputs.keep, v);
      }
      inputs.pay(in, row, score, credit, column, rewards, kl);
      scan_tile<THREADS>(rewards, v, inputs.keep, gamma, lam, carry, advantages);
      for (int i = 0; i < kItems; ++i) {
        keep[i] = inputs.keep[i];
        returns[i] = advantages[i] + v[i];
      }
      store_items(out.returns + at, column, in.length, returns);
      if (out.rewards) {
        store_items(out.rewards + at, column, in.length, rewards);
        store_items(out.kl + at, column, in.length, kl);
      }
      if (out.spreads) spread = merged(spread, spread_of(advantages, keep));
    }
  }
  const auto merge = [](const Spread<T>& a, const Spread<T>& b) { return merged(a, b); };
  T mean = 0, scale = 1;
  if (out.spreads) {
    spread = block_reduce<THREADS>(spread, merge);
    if (threadIdx.x == 0) out.spreads[blockIdx.x] = spread;
  }
  if (out.whiten) {
    cooperative_groups::this_grid().sync();
    Spread<T> all{0, 0, 0};
    for (unsigned i = threadIdx.x; i < gridDim.x; i += THREADS) all = merged(all, out.spreads[i]);
    all = block_reduce<THREADS>(all, merge);
    mean = all.mean;
    scale = 1 / std::sqrt(all.squares / (all.count > 0 ? all.count : T(1)) + T(1e-8));
  }
  if (held < 0) return;
  for (int i = 0; i < kItems; ++i) advantages[i] = keep[i] ? (advantages[i] - mean) * scale : T(0);
  store_items(out.advantages + held * in.length, threadIdx.x * kItems, in.length, advantages);
  if (!out.whiten) return;
  // What was written before the wait, latest first: it may still be in the cache.
  for (int64_t row = held; row >= 0; row -= gridDim.x) {
    T* const of_row = out.advantages + row * in.length;
    for (int64_t start = row == held ? tile : 0; start < in.length; start += tile) {
      const int64_t column = start + threadIdx.x * kItems;
      in.mask.load(row, column, in.length, keep);
      for (int i = 0; i < kItems; ++i) advantages[i] = keep[i] ? (of_row[column + i] - mean) * scale : T(0);
      store_items(of_row, column, in.length, advantages);
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rollout_advantages_cuda(
    const at::Tensor& scores, const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
    const std::optional<at::Tensor>& attention, const at::Tensor& values, const at::Tensor& mask, double kl_coef,
    double beta, double gamma, double lam, std::string_view estimator, bool whiten) {
  const Rollout result =
      rollout("rollout_advantages", scores, logprobs, ref_logprobs, attention, values, mask, nullptr, kl_coef, beta,
              gamma, lam, estimator, whiten ? Whiten::yes : Whiten::no, true);
  return {result.advantages, result.returns, result.rewards, result.kl};
}

}  // namespace

Rollout rollout(const char* op, const at::Tensor& scores, const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
                const std::optional<at::Tensor>& attention, const at::Tensor& values, const at::Tensor& mask,
                const at::Tensor* tokens, double kl_coef, double beta, double gamma, double lam,
                std::string_view estimator, Whiten whiten, bool with_rewards) {
  check_same_shape(op, "values", values, logprobs.sizes());
  const c10::cuda::CUDAGuard guard(logprobs.device());
  const auto options = logprobs.options().dtype(compute_type(logprobs));
  Rollout result;
  result.advantages = at::empty(logprobs.sizes(), options);
  result.returns = at::empty_like(result.advantages);
  if (with_rewards) {
    result.rewards = at::empty_like(result.advantages);
    result.kl = at::empty_like(result.advantages);
  }
  AT_DISPATCH_FLOATING_TYPES(result.advantages.scalar_type(), "rollout_advantages", [&] {
    const RewardInputs<scalar_t> in(op, scores, logprobs, ref_logprobs, attention, mask, tokens, kl_coef, beta,
                                    estimator);
    RolloutOutputs<scalar_t> out{};
    out.advantages = result.advantages.mutable_data_ptr<scalar_t>();
    out.returns = result.returns.mutable_data_ptr<scalar_t>();
    out.rewards = with_rewards ? result.rewards.mutable_data_ptr<scalar_t>() : nullptr;
    out.kl = with_rewards ? result.kl.mutable_data_ptr<scalar_t>() : nullptr;
    out.whiten = whiten == Whiten::yes;
    with_threads_for(in.length, [&](auto threads) {
      const auto kernel = rollout_advantages_kernel<scalar_t, threads>;
      int64_t blocks = in.length ? in.batch : 0;
      if (whiten != Whiten::no) {
        blocks = std::min(blocks, blocks_at_once(kernel, threads));
        result.spreads = at::empty({blocks, 3}, options);
        out.spreads = reinterpret_cast<Spread<scalar_t>*>(result.spreads.template mutable_data_ptr<scalar_t>());
      }
      launch(kernel, dim3(blocks), threads, out.whiten, in, Plane<scalar_t>(values), static_cast<scalar_t>(gamma),
             static_cast<scalar_t>(lam), out);
    });
  });
  return result;
}

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CUDA, m) {
  m.impl("token_rewards", token_rewards_cuda);
  m.impl("rollout_advantages", rollout_advantages_cuda);
}

}  // namespace rlhf_kernels
