// Memory for gradients of logits: fresh pages cost more than the arithmetic that fills them, and huge ones cost less.
// Not for the buffers of matrix products, which were slower for it where the kernel had to move memory together first.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rlhf_kernels {

// at::empty in huge pages where the kernel gives them to those who ask (transparent_hugepage = madvise or always): one
// fault in place of 512. It is only advice: what cannot be had, or is there already, stays as it is.
inline at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor out = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto first = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t begin = (first + kHuge - 1) / kHuge * kHuge, end = (first + out.nbytes()) / kHuge * kHuge;
  if (out.nbytes() >= 2 * kHuge && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

}  // namespace rlhf_kernels
