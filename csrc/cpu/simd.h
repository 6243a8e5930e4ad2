// Plain loops that the compiler vectorises for the target (AVX-512, AVX2, NEON): no intrinsics. `omp simd reduction`
// allows it to reorder the sums of one block, in an order fixed by the build and not by the number of threads.
#pragma once

#include <ATen/OpMathType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace rlhf_kernels {

// Elements handled at a time: 4 KiB in fp32, which stays in the L1 cache between the loops over it.
constexpr int64_t kBlock = 1024;

// exp(x) for x ≤ 88: error below 2 ulp, 0 below −87.33 (and for −inf), NaN for NaN.
inline float fast_exp(float x) {
  constexpr float shift = 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer, which stands in the low bits
  const float y = x < -87.33f ? -87.33f : x;
  const float rounded = y * 1.44269504f + shift;
  const float n = rounded - shift;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const auto exponent = (std::bit_cast<uint32_t>(rounded) << 23) + 0x3f800000u;
  const float result = p * std::bit_cast<float>(exponent);
  return x < -87.33f ? 0.0f : result;
}

inline double fast_exp(double x) { return std::exp(x); }

template <typename T>
T block_max(const T* x, int64_t n) {
  T highest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

// A block of any dtype in the arithmetic type: the block itself, or a converted copy in `buffer`.
template <typename T>
const T* widened(const T* x, int64_t, T*) {
  return x;
}

inline const float* widened(const c10::BFloat16* x, int64_t n, float* buffer) {
  const auto* bits = reinterpret_cast<const uint16_t*>(x);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = std::bit_cast<float>(static_cast<uint32_t>(bits[i]) << 16);
  return buffer;
}

inline const float* widened(const c10::Half* x, int64_t n, float* buffer) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<float>(x[i]);
  return buffer;
}

template <typename From, typename To>
void narrow(const From* x, int64_t n, To* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<To>(x[i]);
}

inline void narrow(const float* x, int64_t n, c10::BFloat16* out) {
  auto* bits = reinterpret_cast<uint16_t*>(out);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {  // round to nearest even; NaN stays NaN
    const auto word = std::bit_cast<uint32_t>(x[i]);
    const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    bits[i] = static_cast<uint16_t>(x[i] != x[i] ? 0x7fc0u : rounded);
  }
}

// Mean and summed squared deviation of a set, merged without cancellation (Chan, Golub and LeVeque 1979).
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    squares += other.squares + delta * delta * count * other.count / total;
    mean += delta * other.count / total;
    count = total;
  }

  double variance() const { return count > 0 ? squares / count : 0; }
};

// Moments of f(i) over the i < n with keep[i]; sums are taken from the first value, so that equal values have none.
template <typename F>
Moments moments_of(const bool* keep, int64_t n, F f) {
  Moments moments;
  const int64_t first = std::find(keep, keep + n, true) - keep;
  if (first == n) return moments;
  const double base = f(first);
  double sum = 0;
  for (int64_t i = first; i < n; ++i) {
    if (keep[i]) {
      sum += f(i) - base;
      moments.count += 1;
    }
  }
  moments.mean = base + sum / moments.count;
  for (int64_t i = first; i < n; ++i) {
    if (keep[i]) moments.squares += (f(i) - moments.mean) * (f(i) - moments.mean);
  }
  return moments;
}

}  // namespace rlhf_kernels
