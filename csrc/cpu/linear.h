// What the ops over a head share: the rows that count moved together, the logits of a chunk of them at a time, and the
// gradients of the three inputs gathered chunk by chunk.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "softmax_rows.h"

namespace rlhf_kernels {

using Tensor3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

struct LiveRows {
  LiveRows(const char* op, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens,
           const std::optional<at::Tensor>& mask, std::optional<int64_t> max_tokens);

  int64_t count() const { return places.size(0); }

  // Per-token values in the order of the rows, and back in their places with zeros elsewhere.
  at::Tensor gather(const at::Tensor& x, at::ScalarType type) const;
  at::Tensor scatter(const at::Tensor& compact) const;

  at::Tensor places;  // [C] in the flattened shape of the tokens
  at::Tensor hidden;  // [C, H]
  at::Tensor tokens;  // [C] int64
  std::vector<int64_t> shape;
};

// The head, and the logits of up to `rows` rows in a buffer that is used again and again. The gradient takes the place
// of the logits, for bf16 products as bf16: it has the range of fp32, where fp16 would lose 6e-8 / token count.
class Head {
 public:
  Head(const at::Tensor& weight, const std::optional<at::Tensor>& bias);

  // Chunks of equal size whose logits fit the budget, as the rows where they start and the end of the last.
  std::vector<int64_t> chunks(int64_t rows, std::optional<int64_t> memory_budget) const;

  int64_t rows_that_fit(std::optional<int64_t> memory_budget) const;

  // Of the rows `hidden`, in the buffer or in a tensor that is given.
  at::Tensor logits(const at::Tensor& hidden, const at::Tensor& given = {});
  at::Tensor buffer(int64_t rows);
  at::Tensor gradient(const at::Tensor& logits) const;

  // Whether the fp32 products of so many rows are those of products.h; for fewer, packing costs more than it saves.
  bool tiled(int64_t rows) const { return fp32 && rows >= 16; }

  // Writes one row's gradient, over its logits or into a row of the buffer.
  template <typename T>
  void write_gradient(const T* logits, int64_t token, const TokenStats<T>& stats, const TokenGrads<T>& upstream,
                      const Scaling<T>& scaling, T* row) const {
    if (bf16) {
      token_gradient(logits, vocabulary, token, stats, upstream, scaling, reinterpret_cast<c10::BFloat16*>(row));
    } else {
      token_gradient(logits, vocabulary, token, stats, upstream, scaling, row);
    }
  }

  // f(i, row i) in parallel.
  template <typename T, typename F>
  void for_rows(const at::Tensor& logits, F f) const {
    T* first = logits.mutable_data_ptr<T>();
    at::parallel_for(0, logits.size(0), std::max<int64_t>(1, 32768 / vocabulary), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, first + i * vocabulary);
    });
  }

  int64_t vocabulary;
  bool bf16;           // the products take bf16 and give fp32
  bool fp32;           // products.h has faster ones than at::mm
  at::Tensor weight;   // in the dtype of the products
  at::ScalarType type;  // of the logits

 private:
  std::optional<at::Tensor> bias_;
  at::Tensor buffer_;
};

// Sums in fp32, rounded once.
class LinearGrads {
 public:
  LinearGrads(const LiveRows& live, const Head& head, const at::Tensor& hidden, const at::Tensor& weight,
              const std::optional<at::Tensor>& bias, std::array<bool, 3> needs, bool one_chunk);

  // The gradient of a chunk's logits; rows that are not `kept` are left out of the products, where it is given.
  void add(int64_t start, const at::Tensor& dlogits, const std::vector<char>* kept = nullptr);
  Tensor3 result();

 private:
  const LiveRows& live_;
  const Head& head_;
  std::array<bool, 3> needs_;
  at::Tensor dhidden_, dweight_, dbias_;
  at::ScalarType weight_type_, bias_type_;
  bool started_ = false;
};

}  // namespace rlhf_kernels
