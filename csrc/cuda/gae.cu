// Generalised advantage estimation: a block goes through its rows from right to left, tile by tile.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "scan.cuh"

namespace rlhf_kernels {
namespace {

template <typename T, int THREADS>
__global__ void __launch_bounds__(THREADS)
    gae_kernel(Plane<T> rewards, Plane<T> values, MaskPlane mask, int64_t length, T gamma, T lam, T* advantages,
               T* returns) {
  constexpr int tile = THREADS * kItems;
  const int64_t row = blockIdx.x;
  GaeCarry<T> carry{0, 0};
  for (int64_t start = (length - 1) / tile * tile; start >= 0; start -= tile) {
    const int64_t column = start + threadIdx.x * kItems;
    bool keep[kItems];
    T r[kItems], v[kItems], a[kItems], g[kItems];
    mask.load(row, column, length, keep);
    rewards.load(row, column, length, keep, r);
    values.load(row, column, length, keep, v);
    scan_tile<THREADS>(r, v, keep, gamma, lam, carry, a);
    for (int i = 0; i < kItems; ++i) g[i] = a[i] + v[i];
    store_items(advantages + row * length, column, length, a);
    store_items(returns + row * length, column, length, g);
  }
}

std::tuple<at::Tensor, at::Tensor> gae_cuda(const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask,
                                            double gamma, double lam) {
  check_same_shape("gae", "values", values, rewards.sizes());
  check_same_shape("gae", "mask", mask, rewards.sizes());
  const c10::cuda::CUDAGuard guard(rewards.device());
  const auto type = compute_type(rewards);
  const int64_t batch = rewards.size(0), length = rewards.size(1);
  at::Tensor advantages = at::empty({batch, length}, rewards.options().dtype(type));
  at::Tensor returns = at::empty_like(advantages);
  AT_DISPATCH_FLOATING_TYPES(type, "gae", [&] {
    with_threads_for(length, [&](auto threads) {
      launch(gae_kernel<scalar_t, threads>, dim3(length ? batch : 0), threads, false, Plane<scalar_t>(rewards),
             Plane<scalar_t>(values), MaskPlane(mask), length, gamma, lam, advantages.mutable_data_ptr<scalar_t>(),
             returns.mutable_data_ptr<scalar_t>());
    });
  });
  return {advantages, returns};
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CUDA, m) { m.impl("gae", gae_cuda); }

}  // namespace rlhf_kernels
