// csrc/formulas.h as a C library: each formula over n numbers, the results one after the other.
#include "formulas.h"

using namespace rlhf_kernels;

template <typename T>
void kl(const T* difference, int kind, long n, T* out) {
  for (long i = 0; i < n; ++i) out[i] = kl_estimate(difference[i], static_cast<KlEstimator>(kind));
}

template <typename T>
void policy(const T* difference, const T* advantage, T low, T high, T dual_clip, long n, T* out) {
  for (long i = 0; i < n; ++i) {
    const auto term = policy_term(difference[i], advantage[i], low, high, dual_clip);
    const T row[] = {term.loss, term.derivative, term.log_ratio, term.ratio, T(term.above), T(term.below)};
    for (int j = 0; j < 6; ++j) out[j * n + i] = row[j];
  }
}

template <typename T>
void value(const T* value, const T* old_value, const T* target, T cliprange, long n, T* out) {
  for (long i = 0; i < n; ++i) {
    const auto term = value_term(value[i], old_value[i], target[i], cliprange);
    const T row[] = {term.loss, term.derivative, T(term.clipped)};
    for (int j = 0; j < 3; ++j) out[j * n + i] = row[j];
  }
}

template <typename T>
void difference(const T* a, const T* b, long n, T* out) {
  for (long i = 0; i < n; ++i) out[i] = log_difference(a[i], b[i]);
}

#define EXPORT(T, suffix)                                                                                   \
  extern "C" void kl_##suffix(const T* d, int kind, long n, T* out) { kl(d, kind, n, out); }                \
  extern "C" void policy_##suffix(const T* d, const T* a, T low, T high, T dual, long n, T* out) {          \
    policy(d, a, low, high, dual, n, out);                                                                  \
  }                                                                                                         \
  extern "C" void value_##suffix(const T* v, const T* o, const T* r, T clip, long n, T* out) {              \
    value(v, o, r, clip, n, out);                                                                           \
  }                                                                                                         \
  extern "C" void difference_##suffix(const T* a, const T* b, long n, T* out) { difference(a, b, n, out); }

EXPORT(float, float)
EXPORT(double, double)
