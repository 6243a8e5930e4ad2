// Reward-model losses. Sums are gathered over blocks of a fixed size or over prompts, and added in fp64 in order.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
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

// Weighted sums over some of the pairs.
struct PairTotals {
  double loss = 0, right = 0, margin = 0, better = 0, worse = 0;
};

template <typename T>
struct Pairs {
  const T* scores;
  const int64_t *chosen, *rejected;
  const T* margin;        // may be null
  const double* weights;  // of each pair, or one for all
  bool one_weight;
  T center_coef;
};

// Up to kBlock pairs from `begin` on; the derivatives by the chosen and the rejected score if there is room for them.
template <typename T>
PairTotals pair_block(const Pairs<T>& in, int64_t begin, int64_t n, T* by_chosen, T* by_rejected) {
  T better[kPadded], worse[kPadded], leads[kPadded], terms[kPadded], push[kPadded], center[kPadded];
  for (int64_t i = 0; i < n; ++i) {
    better[i] = in.scores[in.chosen[begin + i]];
    worse[i] = in.scores[in.rejected[begin + i]];
  }
  for (int64_t i = 0; i < n; ++i) leads[i] = better[i] - worse[i];
  for (int64_t i = 0; in.margin && i < n; ++i) leads[i] -= in.margin[begin + i];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T lead = leads[i], sum = better[i] + worse[i];
    const T e = fast_exp(lead < 0 ? lead : -lead), lower = 1 / (1 + e);  // of −|lead|: e · lower is a sigmoid too
    terms[i] = (lead < 0 ? -lead : T(0)) + fast_log1p(e) + in.center_coef * sum * sum;
    push[i] = lead < 0 ? -lower : -e * lower;
    center[i] = 2 * in.center_coef * sum;
  }
  const double* weights = in.weights + (in.one_weight ? 0 : begin);
  double loss = 0, right = 0, margins = 0, of_better = 0, of_worse = 0;
#pragma omp simd reduction(+ : loss, right, margins, of_better, of_worse)
  for (int64_t i = 0; i < n; ++i) {
    const double weight = weights[in.one_weight ? 0 : i], a = better[i], b = worse[i];
    loss += weight * terms[i];
    right += a > b ? weight : 0.0;
    margins += weight * (a - b);
    of_better += weight * a;
    of_worse += weight * b;
  }
  const PairTotals sums{loss, right, margins, of_better, of_worse};
  for (int64_t i = 0; by_chosen && i < n; ++i) {
    const T weight = static_cast<T>(weights[in.one_weight ? 0 : i]);
    by_chosen[begin + i] = weight * (center[i] + push[i]);
    by_rejected[begin + i] = weight * (center[i] - push[i]);
  }
  return sums;
}

Loss rm_pairwise_loss_fwd_cpu(const at::Tensor& scores, const at::Tensor& chosen, const at::Tensor& rejected,
                              const std::optional<at::Tensor>& prompts, const std::optional<at::Tensor>& margin,
                              double center_coef, bool with_grad) {
  const char* op = "rm_pairwise_loss";
  check_same_shape(op, "rejected", rejected, chosen.sizes());
  if (prompts) check_same_shape(op, "prompts", *prompts, chosen.sizes());
  if (margin) check_same_shape(op, "margin", *margin, chosen.sizes());
  const auto type = compute_type(scores);
  const at::Tensor s = scores.to(type).contiguous(), margins = margin ? margin->to(type).contiguous() : at::Tensor();
  const at::Tensor better = chosen.to(at::kLong).contiguous(), worse = rejected.to(at::kLong).contiguous();
  const auto *a = better.const_data_ptr<int64_t>(), *b = worse.const_data_ptr<int64_t>();
  const int64_t pairs = chosen.numel(), responses = scores.numel();
  for (const auto& [name, indices] : {std::pair("chosen", a), std::pair("rejected", b)}) {
    for (int64_t i = 0; i < pairs; ++i) {
      TORCH_CHECK_INDEX(indices[i] >= 0 && indices[i] < responses, op, ": ", name, " must lie between 0 and ",
                        responses - 1, ", got ", indices[i]);
    }
  }
  // Of a mean over pairs, or within each prompt and then over prompts.
  Doubles weights(1, 1.0 / std::max<double>(static_cast<double>(pairs), 1));
  if (prompts) {
    const Groups groups = groups_of(integers(*prompts));
    weights.resize(pairs);
    for (int64_t i = 0; i < pairs; ++i) {
      weights[i] = 1.0 / static_cast<double>(groups.sizes[groups.of[i]] * static_cast<int64_t>(groups.sizes.size()));
    }
  }
  std::vector<PairTotals> blocks((pairs + kBlock - 1) / kBlock);
  Doubles gradient(with_grad ? responses : 0, 0.0);
  AT_DISPATCH_FLOATING_TYPES(type, "rm_pairwise_loss_fwd", [&] {
    const Pairs<scalar_t> in{s.const_data_ptr<scalar_t>(), a, b, margin ? margins.const_data_ptr<scalar_t>() : nullptr,
                             weights.data(), !prompts, static_cast<scalar_t>(center_coef)};
    std::vector<scalar_t> derivatives(with_grad ? 2 * pairs : 0);
    auto *by_chosen = with_grad ? derivatives.data() : nullptr, *by_rejected = by_chosen + (with_grad ? pairs : 0);
    at::parallel_for(0, static_cast<int64_t>(blocks.size()), 16, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        blocks[k] = pair_block(in, k * kBlock, std::min(kBlock, pairs - k * kBlock), by_chosen, by_rejected);
      }
    });
    for (int64_t i = 0; with_grad && i < pairs; ++i) {
      gradient[a[i]] += by_chosen[i];
      gradient[b[i]] += by_rejected[i];
    }
  });
  double loss = 0;
  std::array<double, 4> stats{};
  for (const PairTotals& block : blocks) {
    loss += block.loss;
    stats[0] += block.right;
    stats[1] += block.margin;
    stats[2] += block.better;
    stats[3] += block.worse;
  }
  return result_of(scores, loss, stats, with_grad ? &gradient : nullptr);
}

// log Σ exp of numbers that come one by one, with one exponential each.
struct LogSum {
  double highest = -INFINITY, sum = 0;

  void add(double x) {
    if (x >= highest) {
      sum = 1 + (sum > 0 || sum != sum ? sum * std::exp(highest - x) : 0);
      highest = x;
    } else {
      sum += std::exp(x - highest);  // NaN shows
    }
  }

  double value() const { return highest + std::log(sum); }
};

// A prompt's responses by rank, and what they bring.
struct Ranking {
  double loss = 0;
  int64_t pairs = 0, right = 0, first = 0, top = 0;  // first: of the best rank, above another; top: with the highest score

  // `order` holds the responses by rank. Equal ranks are not compared with each other.
  void add(const Doubles& s, const std::vector<int64_t>& rank, const std::vector<int64_t>& order, double* gradient,
           double weight) {
    const auto n = static_cast<int64_t>(order.size());
    Doubles lse(n);
    LogSum below;  // over the responses of a worse rank
    for (int64_t end = n; end > 0;) {
      int64_t begin = end - 1;
      while (begin > 0 && rank[order[begin - 1]] == rank[order[begin]]) --begin;
      LogSum with_these = below;
      for (int64_t k = begin; k < end; ++k) {
        const double x = s[order[k]];
        LogSum own = below;
        own.add(x);
        lse[k] = own.value();
        loss += lse[k] - x;
        pairs += n - end;
        for (int64_t worse = end; worse < n; ++worse) right += x > s[order[worse]];
        if (begin == 0 && end < n) {
          ++first;
          top += std::none_of(order.begin(), order.end(), [&](int64_t i) { return s[i] > x; });
        }
        if (end - begin == 1) {
          with_these = own;
        } else {
          with_these.add(x);
        }
      }
      below = with_these;
      end = begin;
    }
    if (!gradient) return;
    LogSum above;  // of −lse, over the responses of a better rank
    for (int64_t begin = 0, end; begin < n; begin = end) {
      for (end = begin; end < n && rank[order[end]] == rank[order[begin]]; ++end) {
        const double x = s[order[end]];
        double sum = std::exp(x - lse[end]) - 1;
        if (begin > 0) sum += above.sum * std::exp(x + above.highest);
        gradient[order[end]] = weight * sum;
      }
      for (int64_t k = begin; k < end; ++k) above.add(-lse[k]);
    }
  }
};

Loss rm_listwise_loss_fwd_cpu(const at::Tensor& scores, const at::Tensor& ranks, const at::Tensor& prompts,
                              bool with_grad) {
  check_same_shape("rm_listwise_loss", "ranks", ranks, scores.sizes());
  check_same_shape("rm_listwise_loss", "prompts", prompts, scores.sizes());
  const Doubles s = doubles(scores);
  const auto rank = integers(ranks);
  const Groups groups = groups_of(integers(prompts));
  const auto n = static_cast<int64_t>(s.size()), number = static_cast<int64_t>(groups.sizes.size());
  std::vector<std::vector<int64_t>> members(number);
  for (int64_t i = 0; i < n; ++i) members[groups.of[i]].push_back(i);
  std::vector<Ranking> rankings(number);
  Doubles gradient(with_grad ? n : 0);
  const double count = std::max<double>(static_cast<double>(number), 1);
  at::parallel_for(0, number, std::max<int64_t>(1, 4096 * number / std::max<int64_t>(n, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      std::stable_sort(members[p].begin(), members[p].end(), [&](int64_t i, int64_t j) { return rank[i] < rank[j]; });
      rankings[p].add(s, rank, members[p], with_grad ? gradient.data() : nullptr, 1 / count);
    }
  });
  double loss = 0, pairs = 0, right = 0, first = 0, top = 0;
  for (const Ranking& one : rankings) {
    loss += one.loss;
    pairs += static_cast<double>(one.pairs);
    right += static_cast<double>(one.right);
    first += static_cast<double>(one.first);
    top += static_cast<double>(one.top);
  }
  const std::array<double, 2> stats{right / std::max(pairs, 1.0), top / std::max(first, 1.0)};
  return result_of(scores, loss / count, stats, with_grad ? &gradient : nullptr);
}

// Moments of scores and targets together, merged without cancellation.
struct Comoments {
  double errors = 0;  // Σ (x − y)²
  Moments x, y;
  double products = 0;  // Σ (x − mean) · (y − mean)

  void merge(const Comoments& other) {
    errors += other.errors;
    products += other.products;
    if (x.count > 0 && other.x.count > 0) {
      products += (other.x.mean - x.mean) * (other.y.mean - y.mean) * x.count * other.x.count / (x.count + other.x.count);
    }
    x.merge(other.x);
    y.merge(other.y);
  }
};

// f(i, lane) for the i < n, each kLanes a vector loop: independent sums hide the latency of an addition.
template <typename F>
void in_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) f(i + lane, lane);
  }
#pragma omp simd
  for (int64_t lane = 0; lane < n - i; ++lane) f(i + lane, lane);
}

// Of up to kBlock pairs, which stay in the L1 cache between the loops, relative to the first, so that equal values have
// no spread. Writes factor · (x − y) where there is room.
template <typename T>
Comoments comoments_of(const T* x, const T* y, int64_t n, T factor, T* gradient) {
  const T x0 = x[0], y0 = y[0];
  T errors[kLanes] = {}, xs[kLanes] = {}, ys[kLanes] = {};
  in_lanes(n, [&](int64_t i, int64_t lane) {
    const T error = x[i] - y[i];
    errors[lane] += error * error;
    xs[lane] += x[i] - x0;
    ys[lane] += y[i] - y0;
  });
  const auto count = static_cast<double>(n);
  Comoments result;
  result.errors = lane_sum(errors);
  result.x.count = result.y.count = count;
  result.x.mean = x0 + lane_sum(xs) / count;
  result.y.mean = y0 + lane_sum(ys) / count;
  const T mx = static_cast<T>(result.x.mean), my = static_cast<T>(result.y.mean);
  T xx[kLanes] = {}, yy[kLanes] = {}, xy[kLanes] = {};
  in_lanes(n, [&](int64_t i, int64_t lane) {
    const T a = x[i] - mx, b = y[i] - my;
    xx[lane] += a * a;
    yy[lane] += b * b;
    xy[lane] += a * b;
  });
  result.x.squares = lane_sum(xx);
  result.y.squares = lane_sum(yy);
  result.products = lane_sum(xy);
  if (gradient) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) gradient[i] = factor * (x[i] - y[i]);
  }
  return result;
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
    auto* d = with_grad ? gradient.mutable_data_ptr<scalar_t>() : nullptr;
    const double count = std::max<double>(static_cast<double>(n), 1);
    const auto factor = static_cast<scalar_t>(2 / count);
    constexpr int64_t chunk = 16 * kBlock;
    std::vector<Comoments> chunks((n + chunk - 1) / chunk);
    at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first * chunk; i < std::min(last * chunk, n); i += kBlock) {
        chunks[i / chunk].merge(
            comoments_of(s + i, target + i, std::min(kBlock, n - i), factor, d ? d + i : nullptr));
      }
    });
    Comoments all;
    for (const Comoments& each : chunks) all.merge(each);
    const double spread = std::sqrt(all.x.squares * all.y.squares);
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(all.errors / count);
    stats.mutable_data_ptr<scalar_t>()[0] = static_cast<scalar_t>(spread > 0 ? all.products / spread : 0);
    stats.mutable_data_ptr<scalar_t>()[1] = static_cast<scalar_t>(all.x.mean - all.y.mean);
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
