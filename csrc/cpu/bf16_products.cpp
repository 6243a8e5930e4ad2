#include "bf16_products.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <memory>
#include <vector>

#include "simd.h"

namespace rlhf_kernels {
namespace {

using at::native::cpublas::brgemm;

constexpr int64_t kRows = 128, kColumns = 256;  // of a tile

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

// AVX-512 has instructions for such products too (five times the speed of fp32), but then torch does not pack for them:
// one small product is tried.
bool has_avx512_products() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  const std::vector<at::BFloat16> ones(32 * 32, at::BFloat16(1.0f));
  std::vector<float> sums(32 * 32);
  try {
    brgemm(32, 32, 32, 32, 32, 32, false, ones.data(), ones.data(), sums.data());
    at::native::cpublas::brgemm_release();
  } catch (const c10::Error&) {
    return false;
  }
  return sums.front() == 32 && sums.back() == 32;
#else
  return false;
#endif
}

}  // namespace

bool has_bf16_products(int64_t width) {
  static const bool there = at::native::cpublas::could_pack(at::kBFloat16) || has_avx512_products();
  return width % 2 == 0 && width > 0 && there;
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

}  // namespace rlhf_kernels
