// Scalar maths of the losses and rewards, written once for the CPU and for CUDA.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define RK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RK_HOST_DEVICE inline
#endif

namespace rlhf_kernels {

enum class KlEstimator { k1, k2, k3, abs, pos };

// exp(20) = 4.9e8: beyond it one token would be the whole batch.
constexpr double kMaxLogRatio = 20.0;

template <typename T>
RK_HOST_DEVICE T clamped(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);  // NaN passes through
}

// a − b; 0 where both are −inf.
template <typename T>
RK_HOST_DEVICE T log_difference(T a, T b) {
  return a == b ? T(0) : a - b;
}

// Per-token estimate of KL(π ‖ ref) from D = log π − log ref.
template <typename T>
RK_HOST_DEVICE T kl_estimate(T difference, KlEstimator kind) {
  switch (kind) {
    case KlEstimator::k1:
      return difference;
    case KlEstimator::k2:
      return difference * difference / 2;
    case KlEstimator::k3: {
      const T d = clamped(difference, T(-kMaxLogRatio), T(kMaxLogRatio));
      return std::expm1(-d) + d;
    }
    case KlEstimator::abs:
      return difference < 0 ? -difference : difference;
    case KlEstimator::pos:
      return difference < 0 ? T(0) : difference;
  }
  return difference;
}

// Derivative of the k3 estimate by the log-probability.
template <typename T>
RK_HOST_DEVICE T k3_derivative(T difference) {
  return difference >= T(-kMaxLogRatio) && difference <= T(kMaxLogRatio) ? -std::expm1(-difference) : T(0);
}

template <typename T>
struct PolicyTerm {
  T loss, derivative, log_ratio, ratio;
  T above, below;  // 1 if held by the upper bound with A > 0, by the lower one with A < 0
};

// Numbers instead of booleans, and nested choices instead of &&: compilers make vector code of these.

// max(−A·ρ, −A·clip(ρ)), for A < 0 at most −dual_clip·A, and its derivative by the log-probability, from ρ = exp of the
// clamped difference. The bounds are inclusive: at 1 ± cliprange the gradient is kept. dual_clip ≤ 0 means none.
template <typename T>
RK_HOST_DEVICE PolicyTerm<T> policy_term_of(T difference, T ratio, T advantage, T low, T high, T dual_clip) {
  PolicyTerm<T> term;
  term.log_ratio = clamped(difference, T(-kMaxLogRatio), T(kMaxLogRatio));
  term.ratio = ratio;
  term.above = advantage > 0 ? (ratio > high ? T(1) : T(0)) : T(0);
  term.below = advantage < 0 ? (ratio < low ? T(1) : T(0)) : T(0);
  const T bounded = dual_clip > 0 ? (advantage < 0 ? (ratio > dual_clip ? T(1) : T(0)) : T(0)) : T(0);
  const T outside = difference > T(kMaxLogRatio) ? T(1) : (difference < T(-kMaxLogRatio) ? T(1) : T(0));
  const T unclipped = -advantage * ratio;
  const T clipped = -advantage * clamped(ratio, low, high);
  term.loss = bounded != 0 ? -dual_clip * advantage : (clipped >= unclipped ? clipped : unclipped);  // NaN shows
  term.derivative = term.above + term.below + bounded + outside != 0 ? T(0) : unclipped;
  return term;
}

template <typename T>
RK_HOST_DEVICE PolicyTerm<T> policy_term(T difference, T advantage, T low, T high, T dual_clip) {
  const T ratio = std::exp(clamped(difference, T(-kMaxLogRatio), T(kMaxLogRatio)));
  return policy_term_of(difference, ratio, advantage, low, high, dual_clip);
}

// Bounds of the ratio; dual_clip ≤ 0 means none.
template <typename T>
struct Clips {
  T low, high, dual_clip;
};

// The derivative alone, of a token that counts. One that neither policy could sample has no ratio and no gradient.
template <typename T>
RK_HOST_DEVICE T policy_derivative(T logprob, T old_logprob, T advantage, const Clips<T>& clips) {
  if (logprob == old_logprob && logprob == -T(INFINITY)) return T(0);
  const T difference = log_difference(logprob, old_logprob);
  return policy_term(difference, advantage, clips.low, clips.high, clips.dual_clip).derivative;
}

template <typename T>
struct ValueTerm {
  T loss, derivative;
  T clipped;  // 1 if the clipped error is the larger one
};

// ½ max((V − R)², (V_old + clip(V − V_old) − R)²) and its derivative by V. cliprange < 0 means none.
template <typename T>
RK_HOST_DEVICE ValueTerm<T> value_term(T value, T old_value, T target, T cliprange) {
  const T error = value - target, change = value - old_value, bound = cliprange < 0 ? T(INFINITY) : cliprange;
  const T clipped_error = old_value + clamped(change, -bound, bound) - target;
  const T outside = change > bound ? T(1) : (change < -bound ? T(1) : T(0));
  const T clipped = clipped_error * clipped_error > error * error ? outside : T(0);
  const T chosen = clipped != 0 ? clipped_error : error;
  return {chosen * chosen / 2, clipped != 0 ? T(0) : error, clipped};
}

}  // namespace rlhf_kernels
