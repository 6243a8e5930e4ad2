// Fresh memory for large results. Each of its pages is a fault when it is first written, at 4 KiB a page longer than the
// arithmetic that fills it; Linux grants pages of 2 MiB to who asks for them.
#pragma once

#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rlhf_kernels {

inline at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty(sizes, options);
#ifdef __linux__
  constexpr size_t page = 2 << 20;
  if (tensor.nbytes() >= 16 * page) {
    const auto start = reinterpret_cast<size_t>(tensor.mutable_data_ptr());
    const size_t first = (start + page - 1) / page * page, end = (start + tensor.nbytes()) / page * page;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a hint: a refusal changes nothing
  }
#endif
  return tensor;
}

}  // namespace rlhf_kernels
