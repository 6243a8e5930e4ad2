// Reward-model losses. A batch has as many numbers here as a rollout has in one row, so all sums are in fp64 and in order;
// only the comparisons of every response with every other run in parallel.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <unordered_map>
#include <vector>

#include "common.h"
#include "numbers.h"

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
  const double count = std::max<double>(static_cast<double>(counts_of(ids).size()), 1);
  struct Response {
    double lse = 0;  // of its own score and those ranked below it
    int64_t pairs = 0, right = 0;
    bool first = false, highest = true;  // of its prompt, by rank and by score
  };
  std::vector<Response> all(n);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(n, 1));
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Response& one = all[i];
      double highest = s[i], sum = 0;
      bool beaten = false;
      for (int64_t j = 0; j < n; ++j) {
        if (ids[j] == ids[i] && rank[i] < rank[j] && s[j] > highest) highest = s[j];
      }
      for (int64_t j = 0; j < n; ++j) {
        if (ids[j] != ids[i]) continue;
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
      for (int64_t i = 0; i < n; ++i) {
        if (i == j || (ids[i] == ids[j] && rank[i] < rank[j])) sum += std::exp(s[j] - all[i].lse);
      }
      gradient[j] = sum / count;
    }
  });
  const std::array<double, 2> stats{right / std::max(pairs, 1.0), top / std::max(first, 1.0)};
  return result_of(scores, loss / count, stats, with_grad ? &gradient : nullptr);
}

Loss rm_regression_loss_fwd_cpu(const at::Tensor& scores, const at::Tensor& targets, bool with_grad) {
  check_same_shape("rm_regression_loss", "targets", targets, scores.sizes());
  const Doubles s = doubles(scores), target = doubles(targets);
  const double count = std::max<double>(static_cast<double>(s.size()), 1);
  double loss = 0, bias = 0, mean_s = 0, mean_target = 0;
  Doubles gradient(with_grad ? s.size() : 0);
  for (size_t i = 0; i < s.size(); ++i) {
    const double error = s[i] - target[i];
    loss += error * error;
    bias += error;
    mean_s += (s[i] - s[0]) / count;  // equal values have no spread
    mean_target += (target[i] - target[0]) / count;
    if (with_grad) gradient[i] = 2 * error / count;
  }
  double xx = 0, yy = 0, xy = 0;
  for (size_t i = 0; i < s.size(); ++i) {
    const double x = s[i] - s[0] - mean_s, y = target[i] - target[0] - mean_target;
    xx += x * x;
    yy += y * y;
    xy += x * y;
  }
  const double spread = std::sqrt(xx * yy);
  const std::array<double, 2> stats{spread > 0 ? xy / spread : 0, bias / count};
  return result_of(scores, loss / count, stats, with_grad ? &gradient : nullptr);
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("rm_pairwise_loss_fwd", rm_pairwise_loss_fwd_cpu);
  m.impl("rm_listwise_loss_fwd", rm_listwise_loss_fwd_cpu);
  m.impl("rm_regression_loss_fwd", rm_regression_loss_fwd_cpu);
}

}  // namespace rlhf_kernels
