#include "products.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <memory>
#include <vector>

#include "simd.h"

namespace rlhf_kernels {
namespace {

using at::native::cpublas::brgemm;

constexpr int64_t kRows = 128, kColumns = 256;  // of a tile
constexpr int64_t kDepth = 512;                 // of an fp32 one: its operands stay in the cache

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// out[j][i] = in[i][j], in squares that fit the registers.
void transpose(const uint32_t* in, int64_t stride_in, int64_t rows, int64_t columns, uint32_t* out,
               int64_t stride_out) {
  constexpr int64_t kSquare = 16;
  for (int64_t i = 0; i < rows; i += kSquare) {
    for (int64_t j = 0; j < columns; j += kSquare) {
      const uint32_t* from = in + i * stride_in + j;
      uint32_t* to = out + j * stride_out + i;
      if (i + kSquare <= rows && j + kSquare <= columns) {
        uint32_t square[kSquare][kSquare];
        for (int64_t a = 0; a < kSquare; ++a) {
          for (int64_t b = 0; b < kSquare; ++b) square[b][a] = from[a * stride_in + b];
        }
        for (int64_t b = 0; b < kSquare; ++b) std::copy(square[b], square[b] + kSquare, to + b * stride_out);
      } else {
        for (int64_t a = 0; a < std::min(kSquare, rows - i); ++a) {
          for (int64_t b = 0; b < std::min(kSquare, columns - j); ++b) to[b * stride_out + a] = from[a * stride_in + b];
        }
      }
    }
  }
}

// Rows 2k and 2k + 1 of [rows, columns] side by side, the layout of a right operand; an odd last row beside zeros.
void interleave(const at::BFloat16* in, int64_t stride, int64_t rows, int64_t columns, uint32_t* out) {
  const auto* bits = reinterpret_cast<const uint16_t*>(in);
  for (int64_t k = 0; k < rows; k += 2) {
    const uint16_t *even = bits + k * stride, *odd = even + stride;
    uint32_t* pairs = out + k / 2 * columns;
    if (k + 1 < rows) {
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) pairs[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
    } else {
      std::copy(even, even + columns, pairs);
    }
  }
}

const at::BFloat16* pairs_of(const std::unique_ptr<uint32_t[]>& packed, int64_t offset = 0) {
  return reinterpret_cast<const at::BFloat16*>(packed.get() + offset);
}

// Whether a small product of ones comes out right; torch says that it cannot by an exception.
template <typename T>
bool multiplies() {
  const std::vector<T> ones(32 * 32, T(1.0f));
  std::vector<float> sums(32 * 32);
  try {
    brgemm(32, 32, 32, 32, 32, 32, false, ones.data(), ones.data(), sums.data());
    at::native::cpublas::brgemm_release();
  } catch (const c10::Error&) {
    return false;
  }
  return sums.front() == 32 && sums.back() == 32;
}

#if defined(__x86_64__)
// AVX-512 has instructions for bf16 (five times the speed of fp32), but torch packs for AMX alone and so denies them.
bool has_avx512_bf16() { return __builtin_cpu_supports("avx512bf16"); }
bool mkl_lacks_avx512() { return __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel"); }
#else
bool has_avx512_bf16() { return false; }
bool mkl_lacks_avx512() { return false; }
#endif

// f(start, size) of the blocks of n, of which the last may be smaller, in parallel.
template <typename F>
void for_blocks(int64_t n, int64_t size, F f) {
  at::parallel_for(0, blocks(n, size), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first * size; i < std::min(last * size, n); i += size) f(i, std::min(size, n - i));
    at::native::cpublas::brgemm_release();
  });
}

// c[rows, columns] (+)= a[rows, depth] · b[depth, columns], a slice of the depth at a time.
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t stride_a, const float* b,
              int64_t stride_b, float* c, int64_t stride_c, bool add) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  for (int64_t k = 0; k < depth; k += kDepth) {
    brgemm(rows, columns, std::min(kDepth, depth - k), stride_a, stride_b, stride_c, add || k > 0, a + k,
           b + k * stride_b, c);
  }
#else
  TORCH_INTERNAL_ASSERT(false);  // has_fp32_products says no
#endif
}

}  // namespace

bool has_bf16_products(int64_t width) {
  static const bool there =
      at::native::cpublas::could_pack(at::kBFloat16) || (has_avx512_bf16() && multiplies<at::BFloat16>());
  return width % 2 == 0 && width > 0 && there;
}

bool has_fp32_products(int64_t width) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  static const bool there = mkl_lacks_avx512() && multiplies<float>();
  return width > 0 && there;
#else
  return false;
#endif
}

void bf16_logits(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                 const at::Tensor& out) {
  const int64_t n = hidden.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  const auto* x = hidden.const_data_ptr<at::BFloat16>();
  const auto* w = weight.const_data_ptr<at::BFloat16>();
  const at::Tensor offsets = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const float* b = bias ? offsets.const_data_ptr<float>() : nullptr;
  auto* logits = out.mutable_data_ptr<float>();
  at::parallel_for(0, blocks(vocabulary, kColumns), 1, [&](int64_t begin, int64_t end) {
    const auto packed = std::make_unique<uint32_t[]>(kColumns * width / 2);
    for (int64_t v = begin * kColumns; v < std::min(end * kColumns, vocabulary); v += kColumns) {
      const int64_t columns = std::min(kColumns, vocabulary - v);
      transpose(reinterpret_cast<const uint32_t*>(w + v * width), width / 2, columns, width / 2, packed.get(), columns);
      for (int64_t i = 0; i < n; i += kRows) {
        const int64_t rows = std::min(kRows, n - i);
        float* tile = logits + i * vocabulary + v;
        brgemm(rows, columns, width, width, columns, vocabulary, false, x + i * width, pairs_of(packed), tile);
        for (int64_t r = 0; b && r < rows; ++r) {
          for (int64_t c = 0; c < columns; ++c) tile[r * vocabulary + c] += b[v + c];
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

void add_bf16_weight_gradient(const at::Tensor& dlogits, const at::Tensor& hidden, bool add, const at::Tensor& out) {
  const int64_t n = hidden.size(0), width = hidden.size(1), vocabulary = dlogits.size(1);
  const int64_t pairs = 16 * blocks(n, 32);  // zeros up to what AMX takes at a time
  const auto* d = dlogits.const_data_ptr<at::BFloat16>();
  const auto* x = hidden.const_data_ptr<at::BFloat16>();
  auto* sums = out.mutable_data_ptr<float>();
  const auto packed = std::make_unique<uint32_t[]>(pairs * width);
  at::parallel_for(0, blocks(width, kColumns), 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin * kColumns; h < std::min(end * kColumns, width); h += kColumns) {
      interleave(x + h, width, n, std::min(kColumns, width - h), packed.get() + h * pairs);
    }
  });
  at::parallel_for(0, blocks(vocabulary, kRows), 1, [&](int64_t begin, int64_t end) {
    const auto beside = std::make_unique<uint32_t[]>(pairs * kRows), left = std::make_unique<uint32_t[]>(pairs * kRows);
    for (int64_t v = begin * kRows; v < std::min(end * kRows, vocabulary); v += kRows) {
      const int64_t rows = std::min(kRows, vocabulary - v);
      interleave(d + v, dlogits.stride(0), n, rows, beside.get());
      transpose(beside.get(), rows, blocks(n, 2), rows, left.get(), pairs);
      for (int64_t h = 0; h < width; h += kColumns) {
        const int64_t columns = std::min(kColumns, width - h);
        const auto* right = pairs_of(packed, h * pairs);
        brgemm(rows, columns, 2 * pairs, 2 * pairs, columns, width, add, pairs_of(left), right, sums + v * width + h);
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

void fp32_logits(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                 const at::Tensor& out) {
  const int64_t n = hidden.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  const auto *x = hidden.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  const at::Tensor offsets = bias ? bias->contiguous() : at::Tensor();
  const float* b = bias ? offsets.const_data_ptr<float>() : nullptr;
  auto* logits = out.mutable_data_ptr<float>();
  for_blocks(vocabulary, kColumns, [&](int64_t v, int64_t columns) {
    const auto right = std::make_unique<float[]>(columns * width);
    transpose(reinterpret_cast<const uint32_t*>(w + v * width), width, columns, width,
              reinterpret_cast<uint32_t*>(right.get()), columns);
    for (int64_t i = 0; i < n; i += kRows) {
      const int64_t rows = std::min(kRows, n - i);
      float* tile = logits + i * vocabulary + v;
      for (int64_t r = 0; b && r < rows; ++r) std::copy(b + v, b + v + columns, tile + r * vocabulary);
      multiply(rows, columns, width, x + i * width, width, right.get(), columns, tile, vocabulary, b != nullptr);
    }
  });
}

at::Tensor fp32_hidden_gradient(const at::Tensor& dlogits, const at::Tensor& weight) {
  const int64_t n = dlogits.size(0), vocabulary = dlogits.size(1), width = weight.size(1);
  const at::Tensor out = at::empty({n, width}, weight.options());
  const auto *d = dlogits.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  auto* result = out.mutable_data_ptr<float>();
  const int64_t down = blocks(n, kRows), across = blocks(width, kColumns);
  for_blocks(down * across, 1, [&](int64_t tile, int64_t) {
    const int64_t i = tile / across * kRows, h = tile % across * kColumns;
    multiply(std::min(kRows, n - i), std::min(kColumns, width - h), vocabulary, d + i * dlogits.stride(0),
             dlogits.stride(0), w + h, width, result + i * width + h, width, false);
  });
  return out;
}

void add_fp32_weight_gradient(const at::Tensor& dlogits, const at::Tensor& hidden, bool add, const at::Tensor& out) {
  const int64_t n = hidden.size(0), width = hidden.size(1), vocabulary = dlogits.size(1);
  const auto *d = dlogits.const_data_ptr<float>(), *x = hidden.const_data_ptr<float>();
  auto* sums = out.mutable_data_ptr<float>();
  for_blocks(vocabulary, kRows, [&](int64_t v, int64_t rows) {
    const auto left = std::make_unique<float[]>(rows * n);
    transpose(reinterpret_cast<const uint32_t*>(d + v), dlogits.stride(0), n, rows,
              reinterpret_cast<uint32_t*>(left.get()), n);
    for (int64_t h = 0; h < width; h += kColumns) {
      multiply(rows, std::min(kColumns, width - h), n, left.get(), n, x + h, width, sums + v * width + h, width, add);
    }
  });
}

}  // namespace rlhf_kernels
