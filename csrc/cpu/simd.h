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

// Length of arrays that are used side by side: a load is held up by a store that is a multiple of 4 KiB away.
constexpr int64_t kPadded = kBlock + 48;

// Independent sums of a loop, enough to hide the latency of an addition: four vectors of AVX-512.
constexpr int64_t kLanes = 64;

// exp(x) for x ≤ 88: error below 3 ulp, 0 below −87.33 (and for −inf), NaN for NaN.
inline float fast_exp(float x) {
  constexpr float shift = 12582912.0f + 127;  // 1.5 · 2²³ rounds to an integer, 127 makes its low bits an exponent
  const float y = x < -87.33f ? -87.33f : x;
  const float rounded = y * 1.44269504f + shift;
  const float n = rounded - shift;
  const float f = (y * 1.44269504f - n) + y * 1.925963033e-8f;  // log₂e in two parts
  float p = 1.3264727214e-3f;                                   // 2ᶠ for |f| ≤ ½
  p = p * f + 9.6715128125e-3f;
  p = p * f + 5.5507337448e-2f;
  p = p * f + 2.4022242083e-1f;
  p = p * f + 6.9314697760e-1f;
  p = p * f + 1.0f;
  const auto scale = std::bit_cast<float>(std::bit_cast<uint32_t>(rounded) << 23);
  return x < -87.33f ? 0.0f : p * scale;
}

inline double fast_exp(double x) { return std::exp(x); }

// Asks for n values that will be read soon: memory should not wait for arithmetic.
template <typename T>
void prefetch(const T* x, int64_t n) {
  for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(T)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(x) + byte);
  }
}

// log(1 + x) for 0 ≤ x ≤ 1, as 2·artanh(x / (2 + x)): error below 2 ulp; NaN for NaN.
inline float fast_log1p(float x) {
  const float t = x / (2.0f + x), square = t * t;
  float p = 1.0f / 13;
  for (const float term : {1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f}) p = p * square + term;
  return 2.0f * t * p;
}

inline double fast_log1p(double x) { return std::log1p(x); }

template <typename T>
T block_max(const T* x, int64_t n) {
  T lanes[kLanes], highest = -std::numeric_limits<T>::infinity();
  std::fill(lanes, lanes + kLanes, highest);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  }
  for (; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
#pragma omp simd reduction(max : highest)
  for (int64_t lane = 0; lane < kLanes; ++lane) highest = lanes[lane] > highest ? lanes[lane] : highest;
  return highest;
}

template <typename T>
T lane_sum(const T (&lanes)[kLanes]) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <typename T>
T widened(T x) {
  return x;
}

inline float widened(c10::BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }

inline float widened(c10::Half x) { return static_cast<float>(x); }

// A block of any dtype in the arithmetic type: the block itself, or a converted copy in `buffer`.
inline const float* widened(const float* x, int64_t, float*) { return x; }

inline const double* widened(const double* x, int64_t, double*) { return x; }

template <typename narrow_t>
const float* widened(const narrow_t* x, int64_t n, float* buffer) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = widened(x[i]);
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

}  // namespace rlhf_kernels
