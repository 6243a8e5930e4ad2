// The softmax of one row of logits: a token's log-probability, the entropy, and their gradient. A row is read block by
// block, and a block is in the L1 cache when its exponentials are summed. Shared by the ops over logits and over a head.
#pragma once

#include <optional>
#include <type_traits>

#include "simd.h"

namespace rlhf_kernels {

template <typename T>
struct Scaling {
  T inverse_temperature;
  T softcap;  // 0: none
};

template <typename T>
Scaling<T> scaling_of(double temperature, std::optional<double> softcap) {
  return {static_cast<T>(1 / temperature), static_cast<T>(softcap.value_or(0))};
}

template <typename T>
struct TokenStats {
  T logprob = 0, entropy = 0, lse = 0;
};

template <typename T>
struct TokenGrads {
  T logprob = 0, entropy = 0;

  // NaN is no zero: it has to show.
  bool zero() const { return logprob == 0 && entropy == 0; }
};

template <typename T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();

// −inf, a forbidden token, stays −inf.
template <typename T>
T capped(T x, T softcap) {
  return softcap == 0 || x == kNothing<T> ? x : softcap * std::tanh(x / softcap);
}

// f(start, n, block, next) for each block of a row, widened and soft-capped; `next` is what will be read after it.
template <typename T, typename scalar_t, typename F>
void for_blocks(const scalar_t* row, int64_t vocabulary, T softcap, F f) {
  T buffer[kBlock];
  for (int64_t start = 0; start < vocabulary; start += kBlock) {
    const int64_t n = std::min(kBlock, vocabulary - start);
    const T* block = widened(row + start, n, buffer);
    if (softcap != 0) {
      for (int64_t i = 0; i < n; ++i) buffer[i] = capped(block[i], softcap);
      block = buffer;
    }
    f(start, n, block, row + start + kBlock);
  }
}

// Asks for what will be read a block later: the sums below wait for arithmetic, the memory should not wait for them.
template <typename scalar_t>
void prefetch_lanes(const scalar_t* next) {
#pragma GCC unroll 8
  for (int64_t byte = 0; byte < static_cast<int64_t>(kLanes * sizeof(scalar_t)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(next) + byte);
  }
}

// 0 · −inf would be NaN.
template <typename T>
T bounded(T log_p) {
  return log_p < T(-1000) ? T(-1000) : log_p;
}

// Σ exp(d) and Σ exp(d) · d of a row, with d = (x − highest) / temperature and the highest logit so far.
template <typename T>
struct RowSums {
  T highest = kNothing<T>;
  double sum = 0, weighted = 0;

  // Makes the sums relative to a new highest logit; returns what has been added to every d.
  double rise(T to, T inverse_temperature) {
    if (!(to > highest)) return 0;
    double drop = 0;
    if (sum > 0) {
      drop = (static_cast<double>(highest) - to) * inverse_temperature;
      const double scale = std::exp(drop);
      weighted = scale * (weighted + drop * sum);
      sum *= scale;
    }
    highest = to;
    return drop;
  }

  // A row of −inf so far sums nothing; NaN must still come through.
  T base() const { return highest == kNothing<T> ? T(0) : highest; }

  template <bool with_entropy, typename scalar_t>
  void add(const T* x, int64_t n, T inverse_temperature, const scalar_t* next) {
    rise(block_max(x, n), inverse_temperature);
    const T origin = base();
    T sums[kLanes] = {}, weighted_sums[kLanes] = {};
    const auto add_one = [&](T logit, int64_t lane) {
      const T d = (logit - origin) * inverse_temperature, e = fast_exp(d);
      sums[lane] += e;
      if (with_entropy) weighted_sums[lane] += e * bounded(d);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      prefetch_lanes(next + i);
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) add_one(x[i + lane], lane);
    }
#pragma omp simd
    for (int64_t lane = 0; lane < n - i; ++lane) add_one(x[i + lane], lane);
    sum += lane_sum(sums);
    if (with_entropy) weighted += lane_sum(weighted_sums);
  }

  bool empty() const { return sum == 0; }

  double lse(T inverse_temperature) const {
    return empty() ? kNothing<double> : static_cast<double>(highest) * inverse_temperature + std::log(sum);
  }

  TokenStats<T> stats(T logit, T inverse_temperature, bool with_entropy) const {
    TokenStats<T> row;
    row.lse = static_cast<T>(lse(inverse_temperature));
    // Relative to the highest logit: near 1e4 an fp32 logsumexp is off by 5e-4.
    const double log_sum = std::log(sum), d = (static_cast<double>(logit) - highest) * inverse_temperature;
    row.logprob = logit == kNothing<T> ? logit : static_cast<T>(d - log_sum);
    if (with_entropy && !empty()) row.entropy = static_cast<T>(log_sum - weighted / sum);
    return row;
  }
};

template <typename T, typename scalar_t>
TokenStats<T> token_stats(const scalar_t* row, int64_t vocabulary, int64_t token, const Scaling<T>& scaling,
                          bool with_entropy) {
  RowSums<T> sums;
  const T inverse = scaling.inverse_temperature;
  for_blocks(row, vocabulary, scaling.softcap, [&](int64_t, int64_t n, const T* block, const scalar_t* next) {
    with_entropy ? sums.template add<true>(block, n, inverse, next) : sums.template add<false>(block, n, inverse, next);
  });
  return sums.stats(capped(static_cast<T>(row[token]), scaling.softcap), inverse, with_entropy);
}

// ∂L/∂z = p · weight away from the token.
template <bool with_entropy, typename T>
T gradient_weight(T log_p, T entropy, const TokenGrads<T>& grads) {
  return with_entropy ? -grads.logprob - grads.entropy * (log_p + entropy) : -grads.logprob;
}

// Writes p · weight(log p, i) / temperature of each logit i, and `at_token` / temperature more at the token. `target` may
// be the row itself, or lie over it in a narrower dtype: a block is written after it has been read.
template <typename T, typename scalar_t, typename out_t, typename F>
void write_gradient(const scalar_t* row, int64_t vocabulary, int64_t token, T lse, T at_token,
                    const Scaling<T>& scaling, out_t* target, F weight) {
  const T inverse = scaling.inverse_temperature, softcap = scaling.softcap;
  const auto of_logit = [=](T u, int64_t i, T more) {
    const T log_p = u * inverse - lse, p = fast_exp(log_p), product = p * weight(log_p, i);
    const T dz = (p == 0 ? T(0) : product) + more;  // 0 · ∞ would be NaN
    if (softcap == 0) return dz * inverse;
    const T tanh = u / softcap;
    return u == kNothing<T> ? T(0) : dz * inverse * (1 - tanh * tanh);
  };
  const T chosen = capped(static_cast<T>(row[token]), softcap);
  const T special = chosen == kNothing<T> ? T(0) : of_logit(chosen, token, at_token);
  for_blocks(row, vocabulary, softcap, [=](int64_t start, int64_t n, const T* block, const scalar_t*) {
    if constexpr (std::is_same_v<T, out_t>) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) target[start + i] = of_logit(block[i], start + i, T(0));
    } else {
      T wide[kBlock];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) wide[i] = of_logit(block[i], start + i, T(0));
      narrow(wide, n, target + start);
    }
  });
  target[token] = static_cast<out_t>(special);
}

// The gradient of a row's logits. A row without an upstream gradient or without any probability is not read.
template <typename T, typename scalar_t, typename out_t>
void token_gradient(const scalar_t* row, int64_t vocabulary, int64_t token, const TokenStats<T>& stats,
                    const TokenGrads<T>& grads, const Scaling<T>& scaling, out_t* target) {
  if (grads.zero() || stats.lse == kNothing<T>) {
    std::fill(target, target + vocabulary, out_t(0));
  } else if (grads.entropy == 0) {
    write_gradient(row, vocabulary, token, stats.lse, grads.logprob, scaling, target,
                   [=](T log_p, int64_t) { return gradient_weight<false>(log_p, T(0), grads); });
  } else {
    write_gradient(row, vocabulary, token, stats.lse, grads.logprob, scaling, target,
                   [=](T log_p, int64_t) { return gradient_weight<true>(log_p, stats.entropy, grads); });
  }
}

}  // namespace rlhf_kernels
