// Credit from the reward model's tokens to the policy's by the bytes that they share: one thread a sequence, one token of
// the reward model after the other.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common.h"

namespace rlhf_kernels {
namespace {

struct Span {
  int64_t start, end;  // end < 0: padding
};

// Where credit goes that no token of the policy covers: the last token of no length, or else the last; −1 if there is none.
int64_t home_of(const Span* policy, int64_t count) {
  int64_t last = -1;
  for (int64_t p = count - 1; p >= 0; --p) {
    if (policy[p].end < 0) continue;
    if (policy[p].start == policy[p].end) return p;
    if (last < 0) last = p;
  }
  return last;
}

// The tokens of a policy up to the last that is none of padding, if they stand in the order of the text; −1 if they do
// not, as after a shuffle or with padding on the left.
int64_t in_order(const Span* policy, int64_t count) {
  while (count > 0 && policy[count - 1].end < 0) --count;
  for (int64_t p = 0; p < count; ++p) {
    if (policy[p].end < 0) return -1;
    if (p > 0 && (policy[p].start < policy[p - 1].start || policy[p].end < policy[p - 1].end)) return -1;
  }
  return count;
}

template <typename scalar_t, typename T>
void align_row(const scalar_t* credit, const Span* tokens, int64_t count, const Span* policy, int64_t policy_count,
               std::vector<double>& sums, T* out) {
  std::fill(sums.begin(), sums.end(), 0.0);
  const int64_t home = home_of(policy, policy_count), ordered = in_order(policy, policy_count);
  for (int64_t r = 0; r < count; ++r) {
    const auto [start, end] = tokens[r];
    if (end < 0) continue;
    // A token that begins in the prompt brings only the part that lies in the response.
    const double inside = end > start ? static_cast<double>(std::max<int64_t>(end - std::max<int64_t>(start, 0), 0)) /
                                            static_cast<double>(end - start)
                                      : 1.0;
    if (inside == 0) continue;
    const double share = static_cast<double>(credit[r]) * inside;
    const auto overlap = [&](int64_t p) {
      const int64_t common = std::min(end, policy[p].end) - std::max(start, policy[p].start);
      return policy[p].end < 0 ? 0 : std::max<int64_t>(common, 0);
    };
    // In order, the tokens that share bytes with this one are neighbours.
    int64_t first = 0, last = policy_count;
    if (ordered >= 0) {
      const auto ends_before = [&](const Span& span) { return span.end <= start; };
      const auto begins_before = [&](const Span& span) { return span.start < end; };
      first = std::partition_point(policy, policy + ordered, ends_before) - policy;
      last = std::partition_point(policy + first, policy + ordered, begins_before) - policy;
    }
    int64_t covered = 0;
    for (int64_t p = first; p < last; ++p) covered += overlap(p);
    if (covered == 0) {
      if (home >= 0) sums[home] += share;
      continue;
    }
    for (int64_t p = first; p < last; ++p) {
      if (const int64_t common = overlap(p)) sums[p] += share * static_cast<double>(common) / static_cast<double>(covered);
    }
  }
  for (int64_t p = 0; p < policy_count; ++p) out[p] = static_cast<T>(sums[p]);
}

at::Tensor align_credit_cpu(const at::Tensor& credit, const at::Tensor& rm_spans, const at::Tensor& policy_spans) {
  const int64_t batch = credit.size(0), count = credit.size(1), policy_count = policy_spans.size(1);
  check_same_shape("align_credit", "rm_spans", rm_spans, {batch, count, 2});
  check_same_shape("align_credit", "policy_spans", policy_spans, {batch, policy_count, 2});
  const at::Tensor values = credit.contiguous(), from = rm_spans.to(at::kLong).contiguous();
  const at::Tensor to = policy_spans.to(at::kLong).contiguous();
  at::Tensor out = at::empty({batch, policy_count}, credit.options().dtype(compute_type(credit)));
  const auto* tokens = reinterpret_cast<const Span*>(from.const_data_ptr<int64_t>());
  const auto* policy = reinterpret_cast<const Span*>(to.const_data_ptr<int64_t>());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, credit.scalar_type(), "align_credit", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto* c = values.const_data_ptr<scalar_t>();
    auto* result = out.mutable_data_ptr<T>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> sums(policy_count);
      for (int64_t b = begin; b < end; ++b) {
        align_row(c + b * count, tokens + b * count, count, policy + b * policy_count, policy_count, sums,
                  result + b * policy_count);
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) { m.impl("align_credit", align_credit_cpu); }

}  // namespace rlhf_kernels
