// Critic-free advantages: each response against the mean of its group, whatever the order of the ids.
#include <torch/library.h>

#include <string_view>
#include <vector>

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
  const Groups ids = groups_of(integers(groups));
  std::vector<Group> all(ids.sizes.size());
  const auto each_scored = [&](auto f) {
    for (size_t i = 0; i < s.size(); ++i) {
      if (s[i] == s[i]) f(i, all[ids.of[i]]);
    }
  };
  each_scored([&](size_t i, Group& group) {
    if (group.count++ == 0) group.first = s[i];
    group.mean += s[i] - group.first;
  });
  for (Group& group : all) group.mean /= std::max(group.count, 1.0);
  std::vector<double> advantages(s.size(), 0.0);
  each_scored([&](size_t i, Group& group) {
    advantages[i] = s[i] - group.first - group.mean;
    group.squares += advantages[i] * advantages[i];
  });
  if (kind != "dr_grpo") {
    std::vector<double> factors;
    for (const Group& group : all) {
      const double others = std::max(group.count - 1, 1.0), deviation = std::sqrt(group.squares / others);
      // Where only rounding is left of the deviation, noise must not become an advantage of one.
      const bool noise = deviation < 1e-6 * std::max(std::abs(group.first + group.mean), 1.0);
      factors.push_back(kind == "rloo" ? group.count / others : noise ? 0.0 : 1 / (deviation + 1e-4));
    }
    each_scored([&](size_t i, Group&) { advantages[i] *= factors[ids.of[i]]; });
  }
  return tensor_of(advantages.data(), scores.sizes(), scores.options().dtype(compute_type(scores)));
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) { m.impl("group_advantages", group_advantages_cpu); }

}  // namespace rlhf_kernels
