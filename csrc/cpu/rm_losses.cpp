// Reward-model losses. A batch has as many numbers here as a rollout has in one row, so all sums are in fp64 and in order;
// only the comparisons of responses with each other run in parallel.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <unordered_map>
#include <vector>

#include "common.h"
#include "numbers.h"
#include "simd.h"

namespace rlhf_kernels {
namespace {

using Loss = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Doubles = std::vector<double>;

template <size_t N>
Loss result_of(const at::Tensor& scores, double loss, const std::array<double, N>& stats, const Doubles* gradient) {
  const auto options = scores.options().dtype(compute_type(scores));
  return {tensor_of(&loss, {}, options), tensor_of(stats.data(), {static_cast<int64_t>(N)}, options),
          gradient ? tensor_of(gradient->data(), scores.sizes(), scores.options()) : at::empty({0}, scores.options())};
}

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))) + (x - x); }  // NaN shows

double sigmoid(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }

std::unordered_map<int64_t, int64_t> counts_of(const std::vector<int64_t>& ids) {
  std::unordered_map<int64_t, int64_t> counts;
  for (const int64_t id : ids) ++counts[id];
  return counts;
}

Loss rm_pairwise_loss_fwd_cpu(const at::Tensor& scores, const at::Tensor& chosen, const at::Tensor& rejected,
                              const std::optional<at::Tensor>& prompts, const std::optional<at::Tensor>& margin,
                              double center_coef, bool with_grad) {
  const char* op = "rm_pairwise_loss";
  check_same_shape(op, "rejected", rejected, chosen.sizes());
  if (prompts) check_same_shape(op, "prompts", *prompts, chosen.sizes());
  if (margin) check_same_shape(op, "margin", *margin, chosen.sizes());
  const Doubles s = doubles(scores), margins = margin ? doubles(*margin) : Doubles();
  const auto better = integers(chosen), worse = integers(rejected), ids = prompts ? integers(*prompts) : better;
  const auto responses = static_cast<int64_t>(s.size());
  const auto in_prompt = prompts ? counts_of(ids) : std::unordered_map<int64_t, int64_t>();
  Doubles gradient(with_grad ? s.size() : 0, 0.0);
  double loss = 0;
  std::array<double, 4> stats{};
  for (size_t i = 0; i < better.size(); ++i) {
    for (const auto& [name, index] : {std::pair("chosen", better[i]), std::pair("rejected", worse[i])}) {
      TORCH_CHECK_INDEX(index >= 0 && index < responses, op, ": ", name, " must lie between 0 and ", responses - 1,
                        ", got ", index);
    }
    const double a = s[better[i]], b = s[worse[i]], required = a - b - (margin ? margins[i] : 0.0);
    // Of a mean over pairs, or within each prompt and then over prompts.
    const double weight = 1.0 / (prompts ? static_cast<double>(in_prompt.at(ids[i]) * in_prompt.size())
                                         : static_cast<double>(better.size()));
    loss += weight * (softplus(-required) + center_coef * (a + b) * (a + b));
    stats[0] += weight * (a > b);
    stats[1] += weight * (a - b);
    stats[2] += weight * a;
    stats[3] += weight * b;
    if (!with_grad) continue;
    const double push = -sigmoid(-required) * weight, center = 2 * center_coef * (a + b) * weight;
    gradient[better[i]] += push + center;
    gradient[worse[i]] += center - push;
  }
  return result_of(scores, loss, stats, with_grad ? &gradient : nullptr);
}

Loss rm_listwise_loss_fwd_cpu(const at::Tensor& scores, const at::Tensor& ranks, const at::Tensor& prompts,
                              bool with_grad) {
  check_same_shape("rm_listwise_loss", "ranks", ranks, scores.sizes());
  check_same_shape("rm_listwise_loss", "prompts", prompts, scores.sizes());
  const Doubles s = doubles(scores);
  const auto rank = integers(ranks), ids = integers(prompts);
  const auto n = static_cast<int64_t>(s.size());
  struct Response {
    double lse = 0;  // of its own score and those ranked below it
    int64_t pairs = 0, right = 0;
    bool first = false, highest = true;  // of its prompt, by rank and by score
  };
  std::vector<Response> all(n);
  std::unordered_map<int64_t, std::vector<int64_t>> members;
  for (int64_t i = 0; i < n; ++i) members[ids[i]].push_back(i);
  const int64_t grain = std::max<int64_t>(1, 16384 * static_cast<int64_t>(members.size()) / std::max<int64_t>(n * n, 1));
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Response& one = all[i];
      const auto& rivals = members.at(ids[i]);
      double highest = s[i], sum = 0;
      bool beaten = false;
      for (const int64_t j : rivals) {
        if (rank[i] < rank[j] && s[j] > highest) highest = s[j];
      }
      for (const int64_t j : rivals) {
        const bool beats = rank[i] < rank[j];
        if (beats || j == i) sum += std::exp(s[j] - highest);
        one.pairs += beats;
        one.right += beats && s[i] > s[j];
        if (rank[j] < rank[i]) beaten = true;
        if (s[j] > s[i]) one.highest = false;
      }
      one.lse = highest + std::log(sum);
      one.first = one.pairs > 0 && !beaten;
    }
  });
  const double count = std::max<double>(static_cast<double>(members.size()), 1);
  double loss = 0, pairs = 0, right = 0, first = 0, top = 0;
  for (int64_t i = 0; i < n; ++i) {
    loss += all[i].lse - s[i];
    pairs += all[i].pairs;
    right += all[i].right;
    first += all[i].first;
    top += all[i].first && all[i].highest;
  }
  Doubles gradient(with_grad ? n : 0);
  at::parallel_for(0, with_grad ? n : 0, grain, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      double sum = -1;
      for (const int64_t i : members.at(ids[j])) {
        if (i == j || rank[i] < rank[j]) sum += std::exp(s[j] - all[i].lse);
      }
      gradient[j] = sum / count;
    }
  });
  const std::array<double, 2> stats{right / std::max(pairs, 1.0), top / std::max(first, 1.0)};
  return result_of(scores, loss / count, stats, with_grad ? &gradient : nullptr);
}

// Of n pairs of a score and its target, relative to (x₀, y₀): Σ error², Σ x, Σ y, Σ x², Σ y², Σ x·y. Block by block, and
// the blocks in order.
template <typename T>
std::array<double, 6> pair_sums(const T* x, const T* y, int64_t n, T x0, T y0) {
  std::vector<std::array<double, 6>> blocks((n + kBlock - 1) / kBlock);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 16, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, n);
      T errors = 0, xs = 0, ys = 0, xx = 0, yy = 0, xy = 0;
#pragma omp simd reduction(+ : errors, xs, ys, xx, yy, xy)
      for (int64_t i = begin; i < end; ++i) {
        const T error = x[i] - y[i], a = x[i] - x0, b = y[i] - y0;
        errors += error * error;
        xs += a;
        ys += b;
        xx += a * a;
        yy += b * b;
        xy += a * b;
      }
      blocks[block] = {errors, xs, ys, xx, yy, xy};
    }
  });
  std::array<double, 6> sums{};
  for (const auto& block : blocks) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += block[i];
  }
  return sums;
}

Loss rm_regression_loss_fwd_cpu(const at::Tensor& scores, const at::Tensor& targets, bool with_grad) {
  check_same_shape("rm_regression_loss", "targets", targets, scores.sizes());
  const auto type = compute_type(scores);
  const at::Tensor wide = scores.to(type).contiguous(), wide_targets = targets.to(type).contiguous();
  at::Tensor loss = at::empty({}, wide.options()), stats = at::empty({2}, wide.options());
  at::Tensor gradient = at::empty(with_grad ? scores.sizes() : at::IntArrayRef{0}, wide.options());
  const int64_t n = scores.numel();
  AT_DISPATCH_FLOATING_TYPES(type, "rm_regression_loss_fwd", [&] {
    const auto *s = wide.const_data_ptr<scalar_t>(), *target = wide_targets.const_data_ptr<scalar_t>();
    const double count = std::max<double>(static_cast<double>(n), 1);
    // Relative to the first ones, so that equal values have no spread; then to the means, so that nothing cancels.
    const scalar_t first = n ? s[0] : scalar_t(0), first_target = n ? target[0] : scalar_t(0);
    const auto about = pair_sums(s, target, n, first, first_target);
    const double mean = first + about[1] / count, mean_target = first_target + about[2] / count;
    const auto centered = pair_sums(s, target, n, static_cast<scalar_t>(mean), static_cast<scalar_t>(mean_target));
    const double xx = centered[3], yy = centered[4], xy = centered[5], squares = about[0];
    const double bias = mean - mean_target, spread = std::sqrt(xx * yy);
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(squares / count);
    stats.mutable_data_ptr<scalar_t>()[0] = static_cast<scalar_t>(spread > 0 ? xy / spread : 0);
    stats.mutable_data_ptr<scalar_t>()[1] = static_cast<scalar_t>(bias);
    if (!with_grad) return;
    auto* d = gradient.mutable_data_ptr<scalar_t>();
    const auto factor = static_cast<scalar_t>(2 / count);
    for (int64_t i = 0; i < n; ++i) d[i] = factor * (s[i] - target[i]);
  });
  return {loss, stats, gradient.to(scores.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("rm_pairwise_loss_fwd", rm_pairwise_loss_fwd_cpu);
  m.impl("rm_listwise_loss_fwd", rm_listwise_loss_fwd_cpu);
  m.impl("rm_regression_loss_fwd", rm_regression_loss_fwd_cpu);
}

}  // namespace rlhf_kernels
