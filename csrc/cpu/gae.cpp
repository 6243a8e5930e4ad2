// Generalised advantage estimation: one thread a row, scanned from right to left.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common.h"
#include "rows.h"

namespace rlhf_kernels {
namespace {

std::tuple<at::Tensor, at::Tensor> gae_cpu(const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask,
                                           double gamma, double lam) {
  check_same_shape("gae", "values", values, rewards.sizes());
  check_same_shape("gae", "mask", mask, rewards.sizes());
  const auto type = compute_type(rewards);
  const at::Tensor r = rewards.to(type).contiguous(), v = values.to(type).contiguous(), keep = mask.contiguous();
  at::Tensor advantages = at::empty_like(r), returns = at::empty_like(r);
  const int64_t batch = r.size(0), length = r.size(1);
  AT_DISPATCH_FLOATING_TYPES(type, "gae", [&] {
    const auto *rp = r.const_data_ptr<scalar_t>(), *vp = v.const_data_ptr<scalar_t>();
    const auto* mp = keep.const_data_ptr<bool>();
    auto *ap = advantages.mutable_data_ptr<scalar_t>(), *gp = returns.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch, std::max<int64_t>(1, 8192 / std::max<int64_t>(length, 1)), [&](int64_t begin, int64_t end) {
      RowBuffers<scalar_t> buffers(length);
      auto& places = buffers.places;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t i = b * length;
        places.find(mp + i);
        auto *to = places.target(ap + i, buffers[0]), *returns_to = places.target(gp + i, buffers[1]);
        gae_row<scalar_t>(places.gather(rp + i, buffers[2]), places.gather(vp + i, buffers[3]), places.count(), gamma,
                          lam, buffers[9], to, returns_to);
        places.put(to, ap + i);
        places.put(returns_to, gp + i);
      }
    });
  });
  return {advantages, returns};
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) { m.impl("gae", gae_cpu); }

}  // namespace rlhf_kernels
