// Critic-free advantages: each response against the mean of its group, whatever the order of the ids.
#include <torch/library.h>

#include <string_view>
#include <unordered_map>

#include "common.h"
#include "numbers.h"

namespace rlhf_kernels {
namespace {

struct Group {
  double count = 0, first = 0, mean = 0, squares = 0;  // mean: above the first score, so that equal scores have no spread
};

at::Tensor group_advantages_cpu(const at::Tensor& scores, const at::Tensor& groups, std::string_view kind) {
  check_same_shape("group_advantages", "groups", groups, scores.sizes());
  const auto s = doubles(scores);
  const auto ids = integers(groups);
  std::unordered_map<int64_t, Group> all;
  for (size_t i = 0; i < s.size(); ++i) {
    if (s[i] != s[i]) continue;  // not scored
    Group& group = all[ids[i]];
    if (group.count++ == 0) group.first = s[i];
    group.mean += s[i] - group.first;
  }
  for (auto& [id, group] : all) group.mean /= group.count;
  std::vector<double> advantages(s.size(), 0.0);
  for (size_t i = 0; i < s.size(); ++i) {
    if (s[i] != s[i]) continue;
    Group& group = all[ids[i]];
    advantages[i] = s[i] - group.first - group.mean;
    group.squares += advantages[i] * advantages[i];
  }
  for (size_t i = 0; i < s.size(); ++i) {
    if (s[i] != s[i]) continue;
    const Group& group = all[ids[i]];
    const double others = std::max(group.count - 1, 1.0);
    if (kind == "rloo") {
      advantages[i] *= group.count / others;
    } else if (kind == "grpo") {
      const double deviation = std::sqrt(group.squares / others), size = std::abs(group.first + group.mean);
      // Where only rounding is left of the deviation, noise must not become an advantage of one.
      advantages[i] = deviation < 1e-6 * std::max(size, 1.0) ? 0.0 : advantages[i] / (deviation + 1e-4);
    }
  }
  return tensor_of(advantages.data(), scores.sizes(), scores.options().dtype(compute_type(scores)));
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) { m.impl("group_advantages", group_advantages_cpu); }

}  // namespace rlhf_kernels
