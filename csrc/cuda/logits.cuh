// One row of logits: its softmax sums, and the gradient of its log-probability and entropy. Thread i of a block owns the
// columns 16 bytes · i, 16 bytes · (i + THREADS), …, wherever the row lies in memory, so a row gives the same bits alone
// and in any batch. A row that does not start at a multiple of 16 bytes is read element by element.
#pragma once

#include "softmax.cuh"

namespace rlhf_kernels {

// Row i of logits [..., V] whose leading dimensions are two strides apart.
template <typename scalar_t>
struct LogitRows {
  static constexpr int items = 16 / sizeof(scalar_t);

  const scalar_t* data;
  int64_t inner, outer_stride, inner_stride, vocabulary;

  // `logits`, in whose memory the rows stay, has two leading dimensions and a last stride of 1: see `as_rows`.
  explicit LogitRows(const at::Tensor& logits)
      : data(logits.const_data_ptr<scalar_t>()),
        inner(std::max<int64_t>(logits.size(1), 1)),
        outer_stride(logits.stride(0)),
        inner_stride(logits.stride(1)),
        vocabulary(logits.size(2)) {}

  __device__ const scalar_t* row(int64_t i) const {
    return data + i / inner * outer_stride + i % inner * inner_stride;
  }
};

// [..., V] as [outer, inner, V]; a copy only where the strides leave no other way.
inline at::Tensor as_rows(const at::Tensor& logits) {
  const at::Tensor dense = logits.stride(-1) == 1 || logits.size(-1) <= 1 ? logits : logits.contiguous();
  const int64_t inner = logits.dim() > 1 ? logits.size(-2) : 1;
  const int64_t outer = logits.numel() ? logits.numel() / (inner * logits.size(-1)) : 0;
  return dense.reshape({outer, logits.numel() ? inner : 0, logits.size(-1)});
}

// Which rows count, and the token of each.
template <typename scalar_t>
struct LogitProblem {
  LogitRows<scalar_t> logits;
  const int64_t* tokens;
  const bool* mask;  // may be null

  __device__ bool counts(int64_t i) const { return tokens[i] >= 0 && (!mask || mask[i]); }
};

// The tensors behind a LogitProblem, kept alive until its kernel has been launched.
struct LogitInputs {
  LogitInputs(const char* op, const at::Tensor& logits_in, const at::Tensor& tokens_in, const std::optional<at::Tensor>& mask_in)
      : guard(logits_in.device()),
        logits(as_rows(logits_in)),
        tokens(tokens_in.to(at::kLong).contiguous()),
        mask(mask_in ? mask_in->contiguous() : at::Tensor()) {
    check_same_shape(op, "tokens", tokens_in, logits_in.sizes().slice(0, logits_in.dim() - 1));
    if (mask_in) check_same_shape(op, "mask", *mask_in, tokens_in.sizes());
  }

  template <typename scalar_t>
  LogitProblem<scalar_t> problem() const {
    return {LogitRows<scalar_t>(logits), tokens.const_data_ptr<int64_t>(),
            mask.defined() ? mask.const_data_ptr<bool>() : nullptr};
  }

  c10::cuda::CUDAGuard guard;
  at::Tensor logits, tokens, mask;
};

template <typename scalar_t>
__device__ __forceinline__ bool on_vectors(const scalar_t* row) {
  return reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

// The elements from `column` on in the arithmetic type; `beyond` past the end of the row. LAST: nobody needs them again,
// so they may leave the cache first.
template <bool LAST, typename scalar_t, typename T, int N>
__device__ __forceinline__ void load_logits(const scalar_t* row, bool vectors, int64_t column, int64_t vocabulary,
                                            T beyond, T (&out)[N]) {
  if (vectors && column + N <= vocabulary) {
    const auto* place = reinterpret_cast<const uint4*>(row + column);
    const uint4 bits = LAST ? __ldcs(place) : *place;
    Vector<scalar_t> found;
    memcpy(&found, &bits, sizeof(bits));
    for (int i = 0; i < N; ++i) out[i] = static_cast<T>(found.items[i]);
  } else {
    for (int i = 0; i < N; ++i) out[i] = column + i < vocabulary ? static_cast<T>(row[column + i]) : beyond;
  }
}

template <typename scalar_t, typename T, int N>
__device__ __forceinline__ void store_logits(scalar_t* row, bool vectors, int64_t column, int64_t vocabulary,
                                             const T (&values)[N]) {
  if (vectors && column + N <= vocabulary) {
    Vector<scalar_t> narrow;
    for (int i = 0; i < N; ++i) narrow.items[i] = static_cast<scalar_t>(values[i]);
    uint4 bits;
    memcpy(&bits, &narrow, sizeof(bits));
    __stcs(reinterpret_cast<uint4*>(row + column), bits);  // it should not push logits out of the cache
  } else {
    for (int i = 0; i < N; ++i) {
      if (column + i < vocabulary) row[column + i] = static_cast<scalar_t>(values[i]);
    }
  }
}

template <typename T>
struct Softmax {
  T inverse_temperature, softcap;  // 0: none

  // A logit as the softmax sees it; tanh would turn a forbidden token's −∞ into −softcap.
  __device__ __forceinline__ T scaled(T x) const {
    if (softcap > 0 && x != -std::numeric_limits<T>::infinity()) x = softcap * std::tanh(x / softcap);
    return x * inverse_temperature;
  }
};

template <typename T>
inline Softmax<T> softmax_of(double temperature, std::optional<double> softcap) {
  return {static_cast<T>(1 / temperature), static_cast<T>(softcap.value_or(0))};
}

// Of the whole row, in all threads. AGAIN: it is read a second time soon.
template <int THREADS, bool ENTROPY, bool AGAIN, typename T, typename scalar_t>
__device__ Sums<T> row_sums(const scalar_t* row, int64_t vocabulary, const Softmax<T>& softmax) {
  constexpr int items = LogitRows<scalar_t>::items;
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  const bool vectors = on_vectors(row);
  Sums<T> mine = Sums<T>::none();
#pragma unroll 4
  for (int64_t column = threadIdx.x * items; column < vocabulary; column += THREADS * items) {
    T z[items];
    load_logits<!AGAIN>(row, vectors, column, vocabulary, nothing, z);
    T highest = nothing;
    for (int i = 0; i < items; ++i) {
      z[i] = softmax.scaled(z[i]);
      highest = z[i] > highest ? z[i] : highest;
    }
    if (highest > mine.highest) mine = merged(mine, Sums<T>{highest, 0, 0});
    const T base = finite_or_zero(mine.highest);
    T sum = 0, weighted = 0;
    for (int i = 0; i < items; ++i) {
      const T shifted = z[i] - base, e = exponential(shifted);
      sum += e;
      if (ENTROPY) weighted += e > 0 ? e * shifted : T(0);  // 0 · −∞ would be NaN
    }
    mine.sum += sum;
    mine.weighted += weighted;
  }
  return block_reduce<THREADS>(mine, [](const Sums<T>& a, const Sums<T>& b) { return merged(a, b); });
}

template <typename T>
struct RowResult {
  T logprob, entropy, lse;
};

// From the sums of the row and the scaled logit of its token. Relative to the highest: near 1e4 an fp32 logsumexp is off
// by 5e-4. A token outside of the vocabulary shows as NaN, since a kernel cannot raise.
template <typename T>
__device__ __forceinline__ RowResult<T> row_result(const Sums<T>& sums, T chosen, bool outside) {
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  const T log_total = std::log(sums.sum), highest = finite_or_zero(sums.highest);
  RowResult<T> result;
  result.logprob = chosen == nothing ? chosen : chosen - highest - log_total;
  if (outside) result.logprob = std::numeric_limits<T>::quiet_NaN();
  result.entropy = sums.sum == 0 ? T(0) : log_total - sums.weighted / sums.sum;
  result.lse = highest + log_total;
  return result;
}

template <typename T>
struct RowGradient {
  T logprob, entropy;  // ∂L by either
};

// ∂L/∂logits at the columns [begin, end) of a row, both multiples of what a thread owns; `target` may be the row itself.
template <int THREADS, typename T, typename scalar_t>
__device__ void write_gradient(const scalar_t* row, int64_t begin, int64_t end, int64_t vocabulary, int64_t token,
                               const Softmax<T>& softmax, T lse, T entropy, RowGradient<T> gradient, scalar_t* target) {
  constexpr int items = LogitRows<scalar_t>::items;
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  const bool vectors = on_vectors(row), target_vectors = on_vectors(target);
  const T base = finite_or_zero(lse);
#pragma unroll 2
  for (int64_t column = begin + threadIdx.x * items; column < end; column += THREADS * items) {
    T x[items];
    load_logits<true>(row, vectors, column, vocabulary, nothing, x);
    for (int i = 0; i < items; ++i) {
      const T z = softmax.scaled(x[i]), logp = z - base, p = exponential(logp);
      T dz = (column + i == token ? gradient.logprob : T(0)) - gradient.logprob * p;
      if (gradient.entropy != 0) dz -= gradient.entropy * (p > 0 ? p * (logp + entropy) : T(0));
      T du = dz * softmax.inverse_temperature;
      if (softmax.softcap > 0) {
        const T capped = z / softmax.inverse_temperature / softmax.softcap;
        du *= 1 - capped * capped;
      }
      x[i] = x[i] == nothing ? T(0) : du;
    }
    store_logits(target, target_vectors, column, vocabulary, x);
  }
}

template <int THREADS, typename scalar_t>
__device__ void write_zeros(int64_t begin, int64_t end, int64_t vocabulary, scalar_t* target) {
  constexpr int items = LogitRows<scalar_t>::items;
  const float zeros[items] = {};
  const bool vectors = on_vectors(target);
  for (int64_t column = begin + threadIdx.x * items; column < end; column += THREADS * items) {
    store_logits(target, vectors, column, vocabulary, zeros);
  }
}

}  // namespace rlhf_kernels
