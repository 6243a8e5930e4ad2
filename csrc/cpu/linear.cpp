#include "linear.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "products.h"

namespace rlhf_kernels {
namespace {

// Bytes of logits at a time. ∂weight of a single chunk needs no fp32 sum beside the result: that saves more than it
// costs to hold more logits.
constexpr int64_t kBudget = 64 << 20, kBudgetBf16 = 256 << 20;

// Moves the rows with `kept` up over the others; returns how many there are.
int64_t move_up(const at::Tensor& rows, const std::vector<char>& kept) {
  const int64_t columns = rows.size(1), size = rows.element_size(), stride = rows.stride(0) * size;
  auto* bytes = static_cast<char*>(rows.mutable_data_ptr());
  std::vector<int64_t> from;
  for (int64_t i = 0; i < rows.size(0); ++i) {
    if (kept[i]) from.push_back(i);
  }
  const int64_t first = std::find(kept.begin(), kept.end(), 0) - kept.begin();
  at::parallel_for(0, columns, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t to = first; to < static_cast<int64_t>(from.size()); ++to) {
      std::copy(bytes + from[to] * stride + begin * size, bytes + from[to] * stride + end * size,
                bytes + to * stride + begin * size);
    }
  });
  return static_cast<int64_t>(from.size());
}

}  // namespace

LiveRows::LiveRows(const char* op, const at::Tensor& hidden_in, const at::Tensor& weight, const at::Tensor& tokens_in,
                   const std::optional<at::Tensor>& mask, std::optional<int64_t> max_tokens)
    : shape(tokens_in.sizes().vec()) {
  check_same_shape(op, "tokens", tokens_in, hidden_in.sizes().slice(0, hidden_in.dim() - 1));
  if (mask) check_same_shape(op, "mask", *mask, tokens_in.sizes());
  const at::Tensor all = tokens_in.to(at::kLong).reshape({-1}), flags = mask ? mask->reshape({-1}) : at::Tensor();
  const auto* token = all.const_data_ptr<int64_t>();
  const auto* counts = mask ? flags.const_data_ptr<bool>() : nullptr;
  std::vector<int64_t> found;
  for (int64_t i = 0; i < all.numel(); ++i) {
    if (token[i] < 0 || (counts && !counts[i])) continue;
    check_token(op, token[i], weight.size(0));
    found.push_back(i);
  }
  const auto count = static_cast<int64_t>(found.size());
  TORCH_CHECK_VALUE(!max_tokens || count <= *max_tokens, op, ": max_tokens must be at least ", count,
                    ", the tokens that count, got ", max_tokens.value_or(0));
  places = at::empty({count}, all.options());
  std::copy(found.begin(), found.end(), places.mutable_data_ptr<int64_t>());
  const at::Tensor rows = hidden_in.reshape({-1, hidden_in.size(-1)});
  hidden = count == rows.size(0) ? rows.contiguous() : rows.index_select(0, places);
  tokens = all.index_select(0, places);
}

at::Tensor LiveRows::gather(const at::Tensor& x, at::ScalarType type) const {
  return x.reshape({-1}).index_select(0, places).to(type);
}

at::Tensor LiveRows::scatter(const at::Tensor& compact) const {
  return at::zeros(shape, compact.options()).view({-1}).index_copy_(0, places, compact).view(shape);
}

Head::Head(const at::Tensor& weight_in, const std::optional<at::Tensor>& bias)
    : vocabulary(weight_in.size(0)),
      bf16(weight_in.scalar_type() == at::kBFloat16 && has_bf16_products(weight_in.size(1))),
      fp32(!bf16 && compute_type(weight_in) == at::kFloat && has_fp32_products(weight_in.size(1))),
      weight(bf16 || fp32 ? weight_in.to(bf16 ? at::kBFloat16 : at::kFloat).contiguous()
                          : weight_in.to(compute_type(weight_in))),
      type(compute_type(weight_in)),
      bias_(bias && !bf16 ? bias->to(type) : bias) {}

int64_t Head::rows_that_fit(std::optional<int64_t> memory_budget) const {
  const auto row_bytes = vocabulary * static_cast<int64_t>(c10::elementSize(type));
  return std::max<int64_t>(memory_budget.value_or(bf16 ? kBudgetBf16 : kBudget) / row_bytes, 1);
}

std::vector<int64_t> Head::chunks(int64_t rows, std::optional<int64_t> memory_budget) const {
  const int64_t most = rows_that_fit(memory_budget);
  const int64_t number = std::max<int64_t>((rows + most - 1) / most, 1), size = (rows + number - 1) / number;
  const int64_t step = std::max<int64_t>(std::min((size + 31) / 32 * 32, most), 1);
  std::vector<int64_t> starts;
  for (int64_t start = 0; start < rows; start += step) starts.push_back(start);
  starts.push_back(rows);
  return starts;
}

at::Tensor Head::buffer(int64_t rows) {
  if (!buffer_.defined() || buffer_.size(0) < rows) buffer_ = at::empty({rows, vocabulary}, weight.options().dtype(type));
  return buffer_.narrow(0, 0, rows);
}

at::Tensor Head::logits(const at::Tensor& hidden, const at::Tensor& given) {
  at::Tensor out = given.defined() ? given : buffer(hidden.size(0));
  if (bf16) {
    bf16_logits(hidden, weight, bias_, out);
  } else if (tiled(hidden.size(0))) {
    fp32_logits(hidden.to(type), weight, bias_, out);
  } else if (bias_) {
    at::addmm_out(out, *bias_, hidden.to(type), weight.t());
  } else {
    at::mm_out(out, hidden.to(type), weight.t());
  }
  return out;
}

at::Tensor Head::gradient(const at::Tensor& logits) const {
  return bf16 ? logits.view(at::kBFloat16).narrow(1, 0, vocabulary) : logits;
}

LinearGrads::LinearGrads(const LiveRows& live, const Head& head, const at::Tensor& hidden, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, std::array<bool, 3> needs, bool one_chunk)
    : live_(live), head_(head), needs_(needs), weight_type_(weight.scalar_type()) {
  const auto empty = [](bool needed, at::IntArrayRef sizes, const at::TensorOptions& options) {
    return at::empty(needed ? sizes : at::IntArrayRef{0}, options);
  };
  bias_type_ = bias ? bias->scalar_type() : hidden.scalar_type();
  dhidden_ = empty(needs[0], hidden.sizes(), hidden.options()).zero_();
  const auto sum_type = head.bf16 && one_chunk ? at::kBFloat16 : head.type;
  dweight_ = empty(needs[1], weight.sizes(), weight.options().dtype(sum_type));
  dbias_ = empty(needs[2], {weight.size(0)}, weight.options().dtype(head.type)).zero_();
}

void LinearGrads::add(int64_t start, const at::Tensor& all_dlogits, const std::vector<char>* kept) {
  at::Tensor dlogits = all_dlogits, places = live_.places.narrow(0, start, dlogits.size(0));
  at::Tensor hidden = live_.hidden.narrow(0, start, dlogits.size(0));
  if (kept && std::find(kept->begin(), kept->end(), 0) != kept->end()) {
    const at::Tensor index =
        at::from_blob(const_cast<char*>(kept->data()), {dlogits.size(0)}, at::kBool).nonzero().view({-1});
    dlogits = dlogits.narrow(0, 0, move_up(dlogits, *kept));
    places = places.index_select(0, index);
    hidden = hidden.index_select(0, index);
  }
  if (dlogits.size(0) == 0) return;
  if (needs_[0]) {
    const at::Tensor product = head_.tiled(dlogits.size(0)) ? fp32_hidden_gradient(dlogits, head_.weight)
                                                            : at::mm(dlogits, head_.weight);
    dhidden_.view({-1, dhidden_.size(-1)}).index_copy_(0, places, product.to(dhidden_.scalar_type()));
  }
  if (needs_[1]) {
    if (dlogits.scalar_type() != dweight_.scalar_type()) {
      add_bf16_weight_gradient(dlogits, hidden, started_, dweight_);
    } else if (head_.tiled(dlogits.size(0))) {
      add_fp32_weight_gradient(dlogits, hidden.to(at::kFloat), started_, dweight_);
    } else if (started_) {
      at::addmm_out(dweight_, dweight_, dlogits.t(), hidden.to(dlogits.scalar_type()));
    } else {
      at::mm_out(dweight_, dlogits.t(), hidden.to(dlogits.scalar_type()));
    }
    started_ = true;
  }
  if (needs_[2]) dbias_.add_(dlogits.sum(0, false, head_.type));
}

Tensor3 LinearGrads::result() {
  if (!started_) dweight_.zero_();
  return {dhidden_, dweight_.to(weight_type_), dbias_.to(bias_type_)};
}

}  // namespace rlhf_kernels
