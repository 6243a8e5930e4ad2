// One row of the [B, T] ops: rewards from a score, and the reverse scan of GAE. Shared by the ops and their fusion.
#pragma once

#include <cmath>
#include <cstdint>

#include "formulas.h"

namespace rlhf_kernels {

// Column of the last true place, −1 if there is none.
inline int64_t last_true(const bool* mask, int64_t n) {
  int64_t last = n - 1;
  while (last >= 0 && !mask[last]) --last;
  return last;
}

// rewards[t] = β·α_t·R + (1 − β)·R·1[t = last] − kl_coef·kl[t]; attention may be null: all of R on the last place.
// Where each token has a score of its own, R_t − kl_coef·kl[t].
template <typename T>
void reward_row(const T* scores, bool per_token, const T* logprobs, const T* ref_logprobs, const T* attention, const bool* mask, int64_t n,
                T kl_coef, T beta, KlEstimator estimator, T* rewards, T* kl) {
  const int64_t last = last_true(mask, n);
  double mass = 0;
  int64_t count = 0;
  for (int64_t t = 0; t <= last; ++t) {
    if (!mask[t]) continue;
    ++count;
    if (attention) mass += attention[t];
  }
  const bool uniform = !(mass >= 1e-12 && std::isfinite(mass));
  for (int64_t t = 0; t < n; ++t) {
    rewards[t] = kl[t] = 0;
    if (!mask[t]) continue;
    kl[t] = kl_estimate(log_difference(logprobs[t], ref_logprobs[t]), estimator);
    T credit = per_token ? scores[t] : t == last ? *scores : T(0);
    if (attention) {
      const T share = static_cast<T>(uniform ? 1.0 / count : attention[t] / mass);
      credit = (1 - beta) * credit + beta * share * *scores;
    }
    rewards[t] = credit - kl_coef * kl[t];
  }
}

// Reverse scan; a masked place is stepped over: what comes after it is carried unchanged.
template <typename T>
void gae_row(const T* rewards, const T* values, const bool* mask, int64_t n, T gamma, T lam, T* advantages,
             T* returns) {
  T next_value = 0, next_advantage = 0;
  for (int64_t t = n - 1; t >= 0; --t) {
    advantages[t] = returns[t] = 0;
    if (!mask[t]) continue;
    next_advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * next_advantage;
    next_value = values[t];
    advantages[t] = next_advantage;
    returns[t] = next_advantage + next_value;
  }
}

}  // namespace rlhf_kernels
