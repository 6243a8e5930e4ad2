// What the CUDA kernels share: launching, inputs of any strides and dtype, reductions of a warp and of a block.
// Every sum is taken in an order that the launch fixes, so the same input gives the same bits.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common.h"

namespace rlhf_kernels {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kItems = 4;  // neighbouring elements of a row that one thread of a scan or an elementwise kernel owns

// ------------------------------------------------------------------------------------------------------- launching

// On the current stream of the current device; an empty grid is nothing to do. `cooperative`: all blocks run at once,
// so they may wait for each other.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 blocks, int threads, bool cooperative, Args&&... args) {
  if (blocks.x == 0 || blocks.y == 0) return;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = c10::cuda::getCurrentCUDAStream();
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

// How many blocks of a kernel the current device holds at once.
template <typename... Params>
int64_t blocks_at_once(void (*kernel)(Params...), int threads) {
  int device = 0, processors = 0, per_processor = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0));
  return static_cast<int64_t>(processors) * per_processor;
}

// f(integral_constant) with a number of threads that suits rows of this length, kItems elements a thread.
template <typename F>
void with_threads_for(int64_t length, F f) {
  if (length <= 32 * kItems) {
    f(std::integral_constant<int, 32>());
  } else if (length <= 128 * kItems) {
    f(std::integral_constant<int, 128>());
  } else {
    f(std::integral_constant<int, 512>());
  }
}

// ---------------------------------------------------------------------------------------------------------- inputs

template <typename T>
__device__ __forceinline__ T load_as(const void* data, at::ScalarType dtype, int64_t i) {
  switch (dtype) {
    case at::ScalarType::Double:
      return static_cast<T>(static_cast<const double*>(data)[i]);
    case at::ScalarType::BFloat16:
      return static_cast<T>(static_cast<float>(static_cast<const c10::BFloat16*>(data)[i]));
    case at::ScalarType::Half:
      return static_cast<T>(static_cast<float>(static_cast<const c10::Half*>(data)[i]));
    default:
      return static_cast<T>(static_cast<const float*>(data)[i]);
  }
}

// A float tensor [B, T] (or [B]) of any strides and dtype, read as T; absent if data is null.
template <typename T>
struct Plane {
  const void* data = nullptr;
  int64_t row_stride = 0, stride = 0;
  at::ScalarType dtype = at::ScalarType::Float;
  bool vectors = false;  // kItems neighbours are one 16-byte load

  Plane() = default;
  explicit Plane(const at::Tensor& tensor)
      : data(tensor.const_data_ptr()),
        row_stride(tensor.stride(0)),
        stride(tensor.dim() > 1 ? tensor.stride(1) : 0),
        dtype(tensor.scalar_type()),
        vectors(std::is_same_v<T, float> && dtype == at::ScalarType::Float && stride == 1 && row_stride % kItems == 0 &&
                reinterpret_cast<uintptr_t>(data) % 16 == 0) {}
  explicit Plane(const std::optional<at::Tensor>& tensor) : Plane() {
    if (tensor) *this = Plane(*tensor);
  }

  __device__ T at(int64_t row, int64_t column) const {
    return load_as<T>(data, dtype, row * row_stride + column * stride);
  }

  // Elements column … column + kItems − 1 of a row; only where `keep`, 0 elsewhere.
  __device__ void load(int64_t row, int64_t column, int64_t length, const bool (&keep)[kItems],
                       T (&out)[kItems]) const {
    if constexpr (std::is_same_v<T, float>) {
      bool any = false;
      for (int i = 0; i < kItems; ++i) any |= keep[i];
      if (vectors && any && column + kItems <= length) {
        const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + row * row_stride + column);
        const float found[kItems] = {four.x, four.y, four.z, four.w};
        for (int i = 0; i < kItems; ++i) out[i] = keep[i] ? found[i] : 0.0f;
        return;
      }
    }
    for (int i = 0; i < kItems; ++i) out[i] = keep[i] ? at(row, column + i) : T(0);
  }
};

struct MaskPlane {
  const bool* data = nullptr;
  int64_t row_stride = 0, stride = 0;
  const void* tokens = nullptr;  // where given, a negative token is masked too
  int64_t token_row_stride = 0, token_stride = 0;
  bool wide_tokens = false;

  explicit MaskPlane(const at::Tensor& mask, const at::Tensor* token_tensor = nullptr)
      : data(mask.const_data_ptr<bool>()), row_stride(mask.stride(0)), stride(mask.stride(1)) {
    if (token_tensor) {
      tokens = token_tensor->const_data_ptr();
      token_row_stride = token_tensor->stride(0);
      token_stride = token_tensor->stride(1);
      wide_tokens = token_tensor->scalar_type() == at::ScalarType::Long;
    }
  }

  __device__ bool at(int64_t row, int64_t column) const {
    if (!data[row * row_stride + column * stride]) return false;
    if (!tokens) return true;
    const int64_t i = row * token_row_stride + column * token_stride;
    return wide_tokens ? static_cast<const int64_t*>(tokens)[i] >= 0 : static_cast<const int32_t*>(tokens)[i] >= 0;
  }

  __device__ void load(int64_t row, int64_t column, int64_t length, bool (&out)[kItems]) const {
    for (int i = 0; i < kItems; ++i) out[i] = column + i < length && at(row, column + i);
  }
};

// Writes kItems neighbours of a contiguous row.
template <typename T>
__device__ __forceinline__ void store_items(T* row, int64_t column, int64_t length, const T (&items)[kItems]) {
  if constexpr (std::is_same_v<T, float>) {
    if (column + kItems <= length && reinterpret_cast<uintptr_t>(row + column) % 16 == 0) {
      *reinterpret_cast<float4*>(row + column) = make_float4(items[0], items[1], items[2], items[3]);
      return;
    }
  }
  for (int i = 0; i < kItems; ++i) {
    if (column + i < length) row[column + i] = items[i];
  }
}

// ------------------------------------------------------------------------------------------------------ reductions

// The value that the lane `offset` further on holds, word by word, for any trivially copyable type.
template <typename V>
__device__ __forceinline__ V from_lane_after(const V& value, int offset) {
  static_assert(sizeof(V) % sizeof(int) == 0);
  int words[sizeof(V) / sizeof(int)];
  memcpy(words, &value, sizeof(V));
  for (int& word : words) word = __shfl_down_sync(kAllLanes, word, offset);
  V result;
  memcpy(&result, words, sizeof(V));
  return result;
}

// combine() over the block's threads in a fixed order; the result in all of them.
template <int THREADS, typename V, typename Combine>
__device__ __forceinline__ V block_reduce(V value, Combine combine) {
  constexpr int warps = THREADS / kWarp;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = combine(value, from_lane_after(value, offset));
  __shared__ V parts[warps];
  __syncthreads();  // some may still read an earlier result
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = parts[0];
  for (int i = 1; i < warps; ++i) value = combine(value, parts[i]);
  return value;
}

// Count, mean and Σ (x − mean)².
template <typename T>
struct Spread {
  T count, mean, squares;
};

// Of two sets together, without cancellation (Chan, Golub and LeVeque 1979); equal values keep a spread of 0.
template <typename T>
__device__ __forceinline__ Spread<T> merged(const Spread<T>& a, const Spread<T>& b) {
  const T total = a.count + b.count, share = total > 0 ? b.count / total : T(0), delta = b.mean - a.mean;
  if (b.count == 0) return a;
  return {total, a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share};
}

template <typename T>
__device__ __forceinline__ Spread<T> spread_of(const T (&x)[kItems], const bool (&keep)[kItems]) {
  Spread<T> result{0, 0, 0};
  for (int i = 0; i < kItems; ++i) {
    if (keep[i]) result = merged(result, Spread<T>{1, x[i], 0});
  }
  return result;
}

}  // namespace rlhf_kernels
