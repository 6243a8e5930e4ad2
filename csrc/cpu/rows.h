// One row of the [B, T] ops: rewards from a score, and the reverse scan of GAE. Shared by the ops and their fusion. They
// work on the places that count, side by side: the loops have no branch, and what is masked changes no bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "formulas.h"
#include "simd.h"

namespace rlhf_kernels {

// Column of the last true place, −1 if there is none.
inline int64_t last_true(const bool* mask, int64_t n) {
  int64_t last = n - 1;
  while (last >= 0 && !mask[last]) --last;
  return last;
}

inline int64_t number_true(const bool* mask, int64_t n) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(mask);  // a loop over bool is not vectorised
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    int32_t of_block = 0;
    for (int64_t i = begin; i < std::min(begin + kBlock, n); ++i) of_block += bytes[i];
    total += of_block;
  }
  return total;
}

// The places of a row that count. Without a hole between them they are used where they stand.
class LivePlaces {
 public:
  explicit LivePlaces(int64_t length) : length_(length), index_(length) {}

  void find(const bool* mask) {
    count_ = number_true(mask, length_);
    first_ = std::find(mask, mask + length_, true) - mask;
    whole_ = count_ == 0 || last_true(mask, length_) - first_ + 1 == count_;
    if (whole_) return;
    int64_t k = 0;
    for (int64_t t = first_; k < count_; ++t) {
      index_[k] = t;
      k += mask[t];
    }
  }

  int64_t count() const { return count_; }

  // The values at the places, in `buffer` if they do not stand together.
  template <typename T>
  const T* gather(const T* row, T* buffer) const {
    if (whole_) return row + first_;
    for (int64_t k = 0; k < count_; ++k) buffer[k] = row[index_[k]];
    return buffer;
  }

  // Where to write them, and then the rest of the row: zeros where masked.
  template <typename T>
  T* target(T* row, T* buffer) const {
    return whole_ ? row + first_ : buffer;
  }

  template <typename T>
  void put(const T* values, T* row) const {
    if (whole_) {
      std::fill(row, row + first_, T(0));
      std::fill(row + first_ + count_, row + length_, T(0));
    } else {
      std::fill(row, row + length_, T(0));
      for (int64_t k = 0; k < count_; ++k) row[index_[k]] = values[k];
    }
  }

 private:
  int64_t length_, first_ = 0, count_ = 0;
  bool whole_ = true;
  std::vector<int64_t> index_;
};

// Places looked ahead in the scan below.
constexpr int64_t kAhead = 16;

// Memory for the rows that one thread works on.
template <typename T>
struct RowBuffers {
  explicit RowBuffers(int64_t length) : places(length), length(length), memory(10 * length + kAhead) {}

  T* operator[](int64_t k) { return memory.data() + k * length; }

  LivePlaces places;
  int64_t length;
  std::vector<T> memory;
};

template <typename T, typename F>
void estimate_kl(const T* logprobs, const T* ref_logprobs, int64_t n, T* kl, F estimate) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) kl[i] = estimate(log_difference(logprobs[i], ref_logprobs[i]));
}

template <typename T>
void kl_row(const T* logprobs, const T* ref_logprobs, int64_t n, KlEstimator estimator, T* kl) {
  const auto fill = [=](auto estimate) { estimate_kl(logprobs, ref_logprobs, n, kl, estimate); };
  switch (estimator) {  // outside of the loop, so that the loop is vectorised
    case KlEstimator::k1:
      return fill([](T d) { return kl_estimate(d, KlEstimator::k1); });
    case KlEstimator::k2:
      return fill([](T d) { return kl_estimate(d, KlEstimator::k2); });
    case KlEstimator::k3:
      return fill([](T d) { return kl_estimate(d, KlEstimator::k3); });
    case KlEstimator::abs:
      return fill([](T d) { return kl_estimate(d, KlEstimator::abs); });
    case KlEstimator::pos:
      return fill([](T d) { return kl_estimate(d, KlEstimator::pos); });
  }
}

// rewards[i] = credit[i] − kl_coef · kl[i] of the n places that count: the credit is a score each, or a share of the one
// score: β·α_i·R + (1 − β)·R·1[i last]; attention may be null: all of R on the last place.
template <typename T>
void reward_row(const T* scores, bool per_token, const T* attention, const T* kl, int64_t n, T kl_coef, T beta,
                T* rewards) {
  if (n == 0) return;
  if (per_token) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) rewards[i] = scores[i] - kl_coef * kl[i];
    return;
  }
  const T score = *scores;
  if (!attention) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) rewards[i] = -kl_coef * kl[i];
    rewards[n - 1] = score - kl_coef * kl[n - 1];
    return;
  }
  double mass = 0;
#pragma omp simd reduction(+ : mass)
  for (int64_t i = 0; i < n; ++i) mass += attention[i];
  const bool uniform = !(mass >= 1e-12 && std::isfinite(mass));
  const auto even = static_cast<T>(1.0 / static_cast<double>(n));
  const double scale = 1 / mass;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T share = uniform ? even : static_cast<T>(attention[i] * scale);
    rewards[i] = beta * share * score - kl_coef * kl[i];
  }
  rewards[n - 1] += (1 - beta) * score;
}

// A_i = δ_i + γλ·A_{i+1} over the n places that count, with δ_i = r_i + γ·V_{i+1} − V_i. Not one after the other: each
// place first gathers the 16 deltas ahead of it, then adds γλ¹⁶ times the advantage 16 places ahead. `deltas` has room for
// n + kAhead.
template <typename T>
void gae_row(const T* rewards, const T* values, int64_t n, T gamma, T lam, T* deltas, T* advantages, T* returns) {
  if (n == 0) return;
#pragma omp simd
  for (int64_t i = 0; i < n - 1; ++i) deltas[i] = rewards[i] + gamma * values[i + 1] - values[i];
  deltas[n - 1] = rewards[n - 1] - values[n - 1];
  std::fill(deltas + n, deltas + n + kAhead, T(0));
  T decay = gamma * lam;
  for (const int64_t step : {1, 4}) {  // 4 ahead, then 16; a place reads only what is not yet overwritten
    const T once = decay, twice = decay * decay, thrice = twice * decay;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      deltas[i] += once * deltas[i + step] + twice * deltas[i + 2 * step] + thrice * deltas[i + 3 * step];
    }
    decay = twice * twice;
  }
  T ahead[kAhead] = {};
  int64_t i = n;
  for (; i >= kAhead; i -= kAhead) {
    const int64_t start = i - kAhead;
#pragma omp simd
    for (int64_t lane = 0; lane < kAhead; ++lane) {
      ahead[lane] = deltas[start + lane] + decay * ahead[lane];
      advantages[start + lane] = ahead[lane];
      returns[start + lane] = ahead[lane] + values[start + lane];
    }
  }
  for (int64_t k = 0; k < i; ++k) {
    advantages[k] = deltas[k] + decay * ahead[k + kAhead - i];
    returns[k] = advantages[k] + values[k];
  }
}

// Moments of n values; sums are taken from the first one, so that equal values have none.
template <typename T>
Moments moments_of(const T* x, int64_t n) {
  Moments moments;
  if (n == 0) return moments;
  const double base = x[0];
  double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] - base;
  const double mean = base + sum / static_cast<double>(n);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  moments.count = static_cast<double>(n);
  moments.mean = mean;
  moments.squares = squares;
  return moments;
}

}  // namespace rlhf_kernels
