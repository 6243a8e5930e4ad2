// Learning from marked tokens. Both rows of logits are read once for the sums, which give the loss; the gradient
// a · p − c · q, and something else at the token, is written while they are in the cache.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <optional>
#include <string_view>
#include <vector>

#include "common.h"
#include "pair_sums.h"

namespace rlhf_kernels {
namespace {

// log(1 − exp(x)) for x ≤ 0 without cancellation (Mächler 2012).
double log1mexp(double x) { return x > -0.6931471805599453 ? std::log(-std::expm1(x)) : std::log1p(-std::exp(x)); }

double log_add(double a, double b) {
  const double highest = std::max(a, b);
  return highest == -INFINITY ? highest : highest + std::log1p(std::exp(std::min(a, b) - highest));
}

struct Row {
  double loss = 0, policy = 0, reference = 0, at_token = 0;  // the loss; a and c; dz at the token
  double logprob = 0, lse = 0, ref_lse = 0, to_ref = 0, label = 0;
  bool valid = false;
};

// KL(π* ‖ π), where π* is the reference with the token's probability times exp(tilt), normalised.
void bandit(Row& row, double ref_logprob, double tilt) {
  const double log_total = log_add(log1mexp(ref_logprob), ref_logprob + tilt);
  const double target = std::exp(ref_logprob + tilt - log_total), difference = ref_logprob - row.logprob;
  const double q = std::exp(ref_logprob), at_token = q > 0 ? q * difference : 0;
  row.policy = 1;
  row.reference = std::exp(-log_total);
  row.loss = row.reference * (row.to_ref - at_token) - log_total;
  if (target > 0) row.loss += target * (difference + tilt);
  if (at_token == INFINITY) row.loss = INFINITY;  // a token that the policy cannot take
  row.at_token = std::exp(row.logprob) - target;
}

void unlikelihood(Row& row, double ref_logprob, double beta) {
  const double p = std::exp(row.logprob), bounded = std::min(row.logprob, -1e-6);
  if (row.label == 0) {
    row.loss = beta * row.to_ref;
    row.policy = row.reference = beta;
    row.at_token = beta * (p - std::exp(ref_logprob));
  } else {
    const double log_rest = log1mexp(bounded), odds = std::exp(bounded - log_rest);
    row.loss = row.label > 0 ? -row.label * row.logprob : row.label * log_rest;
    row.policy = row.label > 0 ? row.label : row.label * odds;
    row.at_token = -row.policy * (1 - p);
  }
}

template <typename T, typename scalar_t>
void write_row(const scalar_t* x, const scalar_t* y, int64_t vocabulary, int64_t token, const Row& row, double count,
               scalar_t* out) {
  const T lse = static_cast<T>(row.lse), ref_lse = static_cast<T>(row.ref_lse);
  const T a = static_cast<T>(row.policy / count), c = static_cast<T>(row.reference / count);
  const bool forbidden = static_cast<T>(x[token]) == kNothing<T>;
  for_blocks(x, vocabulary, T(0), [&](int64_t start, int64_t n, const T* block, const scalar_t*) {
    T buffer[kBlock], wide[kBlock];
    const T* reference = widened(y + start, n, buffer);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T dz = a * fast_exp(block[i] - lse) - c * fast_exp(reference[i] - ref_lse);
      wide[i] = block[i] == kNothing<T> ? T(0) : dz;
    }
    narrow(wide, n, out + start);
  });
  out[token] = static_cast<scalar_t>(forbidden ? T(0) : static_cast<T>(row.at_token / count));
}

// `dlogits` may be the logits themselves: a block is written after it has been read for the last time.
std::tuple<at::Tensor, at::Tensor> token_feedback_loss(const at::Tensor& logits, const at::Tensor& ref_logits,
                                                       const at::Tensor& tokens, const at::Tensor& labels, double beta,
                                                       std::string_view kind, std::optional<at::Tensor> dlogits) {
  constexpr const char* op = "token_feedback_loss";
  check_same_shape(op, "ref_logits", ref_logits, logits.sizes());
  check_same_shape(op, "tokens", tokens, logits.sizes().slice(0, logits.dim() - 1));
  check_same_shape(op, "labels", labels, tokens.sizes());
  const auto [policy, reference] = in_one_dtype(logits, ref_logits);
  const at::Tensor index = tokens.to(at::kLong).contiguous(), marks = labels.to(at::kDouble).contiguous();
  const auto* token = index.const_data_ptr<int64_t>();
  const int64_t rows = tokens.numel(), vocabulary = logits.size(-1);
  int64_t counted = 0;
  for (int64_t i = 0; i < rows; ++i) counted += token[i] >= 0;
  const double count = std::max<double>(static_cast<double>(counted), 1);
  const bool fits = dlogits && dlogits->scalar_type() == policy.scalar_type();
  const at::Tensor wide = dlogits && !fits ? at::empty(policy.sizes(), policy.options()) : at::Tensor();
  std::vector<Row> all(rows);
  std::atomic<int64_t> outside{-1};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, policy.scalar_type(), "token_feedback_loss_fwd", [&] {
    using T = at::opmath_type<scalar_t>;
    const Rows policy_rows(policy), ref_rows(reference);
    auto* gradient = dlogits ? (fits ? *dlogits : wide).mutable_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / vocabulary), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Row& row = all[i];
        scalar_t* out = gradient ? gradient + i * vocabulary : nullptr;
        if (token[i] >= vocabulary) outside = token[i];
        row.valid = token[i] >= 0 && token[i] < vocabulary;
        if (!row.valid) {
          if (out) std::fill(out, out + vocabulary, scalar_t(0));
          continue;
        }
        const auto *x = policy_rows.row<scalar_t>(i), *y = ref_rows.row<scalar_t>(i);
        PairSums<T> sums;
        sums.add_rows(y, x, vocabulary, T(1));
        const auto of_policy = sums.second.stats(static_cast<T>(x[token[i]]), T(1), false);
        const auto of_reference = sums.first.stats(static_cast<T>(y[token[i]]), T(1), false);
        row.logprob = of_policy.logprob;
        row.lse = of_policy.lse;
        row.ref_lse = of_reference.lse;
        row.to_ref = sums.kl();
        row.label = marks.const_data_ptr<double>()[i];
        kind == "bandit" ? bandit(row, of_reference.logprob, row.label / beta)
                         : unlikelihood(row, of_reference.logprob, beta);
        if (out) write_row<T>(x, y, vocabulary, token[i], row, count, out);
      }
    });
  });
  if (outside >= 0) check_token("token_logprobs", outside, vocabulary);
  if (wide.defined()) dlogits->copy_(wide);
  double loss = 0, to_ref = 0, good = 0, bad = 0, goods = 0, bads = 0;
  for (const Row& row : all) {
    if (!row.valid) continue;
    loss += row.loss;
    to_ref += row.to_ref;
    (row.label > 0 ? good : bad) += row.label != 0 ? row.logprob : 0.0;
    goods += row.label > 0;
    bads += row.label < 0;
  }
  const auto options = logits.options().dtype(compute_type(logits));
  at::Tensor loss_out = at::empty({}, options), stats = at::empty({4}, options);
  const std::array<double, 4> values{good / std::max(goods, 1.0), bad / std::max(bads, 1.0), to_ref / count,
                                     static_cast<double>(counted)};
  AT_DISPATCH_FLOATING_TYPES(stats.scalar_type(), "token_feedback_loss_stats", [&] {
    *loss_out.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(loss / count);
    for (size_t i = 0; i < values.size(); ++i) stats.mutable_data_ptr<scalar_t>()[i] = static_cast<scalar_t>(values[i]);
  });
  return {loss_out, stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> token_feedback_loss_fwd_cpu(
    const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& tokens, const at::Tensor& labels,
    double beta, std::string_view kind, bool with_grad) {
  const at::Tensor dlogits = at::empty(with_grad ? logits.sizes() : at::IntArrayRef{0}, logits.options());
  const auto [loss, stats] = token_feedback_loss(logits, ref_logits, tokens, labels, beta, kind,
                                                 with_grad ? std::optional(dlogits) : std::nullopt);
  return {loss, stats, dlogits};
}

std::tuple<at::Tensor, at::Tensor> token_feedback_loss_fwd_out_cpu(const at::Tensor& logits,
                                                                   const at::Tensor& ref_logits,
                                                                   const at::Tensor& tokens, const at::Tensor& labels,
                                                                   double beta, std::string_view kind,
                                                                   at::Tensor& dlogits) {
  return token_feedback_loss(logits, ref_logits, tokens, labels, beta, kind, dlogits);
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("token_feedback_loss_fwd", token_feedback_loss_fwd_cpu);
  m.impl("token_feedback_loss_fwd_out", token_feedback_loss_fwd_out_cpu);
}

}  // namespace rlhf_kernels
