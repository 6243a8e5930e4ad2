// Softmax sums that can be taken in parts, and loads of 16 bytes.
#pragma once

#include <ATen/OpMathType.h>

#include "device.cuh"

namespace rlhf_kernels {

template <typename scalar_t>
struct alignas(16) Vector {
  scalar_t items[16 / sizeof(scalar_t)];
};

// exp for arguments that are at most about 0: 2 ulp and the rounding of x · log₂ e, which matters only far below 0.
__device__ __forceinline__ float exponential(float x) { return exp2f(x * 1.44269504f); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <typename T>
__device__ __forceinline__ T finite_or_zero(T highest) {
  return highest == -std::numeric_limits<T>::infinity() ? T(0) : highest;
}

// Of a set of logits z: the highest, Σ exp(z − highest), Σ exp(z − highest) · (z − highest).
template <typename T>
struct Sums {
  T highest, sum, weighted;

  static __device__ Sums none() { return {-std::numeric_limits<T>::infinity(), 0, 0}; }
};

template <typename T>
__device__ __forceinline__ Sums<T> merged(const Sums<T>& a, const Sums<T>& b) {
  const T highest = b.highest > a.highest ? b.highest : a.highest, base = finite_or_zero(highest);
  // Of an empty set nothing remains: its scale is exp(−∞) = 0, and its shift must not be multiplied in.
  const T scale_a = exponential(a.highest - base), scale_b = exponential(b.highest - base);
  const T shift_a = scale_a > 0 ? a.highest - base : T(0), shift_b = scale_b > 0 ? b.highest - base : T(0);
  return {highest, scale_a * a.sum + scale_b * b.sum,
          scale_a * (a.weighted + shift_a * a.sum) + scale_b * (b.weighted + shift_b * b.sum)};
}

}  // namespace rlhf_kernels
