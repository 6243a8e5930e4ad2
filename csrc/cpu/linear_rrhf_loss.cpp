// RRHF from hidden states and the head. Whole prompts stand in a chunk where they fit, so that the gradient is known while
// the chunk's logits are there: three products. Otherwise the logits are made twice.
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <unordered_set>

#include "linear.h"
#include "ops.h"

namespace rlhf_kernels {
namespace {

// Blocks of `group_size` equal ids, each id in one block.
void check_groups(const at::Tensor& prompts, int64_t group_size) {
  const at::Tensor ids = prompts.to(at::kLong).contiguous();
  const auto* id = ids.const_data_ptr<int64_t>();
  std::unordered_set<int64_t> seen;
  bool whole = true;
  for (int64_t i = 0; i < ids.numel(); ++i) {
    whole = whole && (i % group_size ? id[i] == id[i - 1] : seen.insert(id[i]).second);
  }
  TORCH_CHECK_VALUE(whole, "linear_rrhf_loss: prompts must be blocks of group_size ", group_size,
                    " equal ids, each id in one block, got ", at::IntArrayRef(id, std::min<int64_t>(ids.numel(), 16)));
}

// Rows of the live ones at which chunks may be cut between prompts; none where a prompt does not fit.
std::vector<int64_t> cuts(const LiveRows& live, int64_t most, std::optional<int64_t> group_size) {
  const int64_t columns = live.shape[1], group = group_size.value_or(live.shape[0]) * columns;
  const auto* place = live.places.const_data_ptr<int64_t>();
  std::vector<int64_t> starts{0};
  int64_t end = 0;
  while (end < live.count()) {
    const int64_t start = starts.back();
    while (end < live.count()) {  // one more prompt
      const int64_t prompt = place[end] / group;
      int64_t next = end;
      while (next < live.count() && place[next] / group == prompt) ++next;
      if (next - start > most) break;
      end = next;
    }
    if (end == start) return {};
    starts.push_back(end);
  }
  return starts;
}

// rrhf_loss of so many responses: loss, statistics and ∂loss/∂logprobs.
Tensor3 rrhf_loss(const at::Tensor& logprobs, const at::Tensor& scores, const at::Tensor& prompts,
                  const at::Tensor& mask, const std::array<double, 3>& coefs, bool with_grad) {
  using Signature = Tensor3(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double, double,
                            double, bool);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rlhf_kernels_native::rrhf_loss_fwd", "")
                             .typed<Signature>();
  return op.call(logprobs, scores, prompts, mask, coefs[0], coefs[1], coefs[2], with_grad);
}

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Result linear_rrhf_loss_fwd_cpu(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens,
                                const at::Tensor& scores, const at::Tensor& prompts, const at::Tensor& mask,
                                const std::optional<at::Tensor>& bias, double temperature, double rank_coef,
                                double sft_coef, double length_power, std::array<bool, 3> needs,
                                std::optional<int64_t> group_size, std::optional<int64_t> memory_budget) {
  if (group_size) check_groups(prompts, *group_size);
  const LiveRows live("linear_rrhf_loss", hidden, weight, tokens, mask, std::nullopt);
  const std::array<double, 3> coefs{rank_coef, sft_coef, length_power};
  const at::Tensor valid = mask.logical_and(tokens.ge(0));
  const bool with_grad = needs[0] || needs[1] || needs[2];
  Head head(weight, bias);
  const auto starts = cuts(live, head.rows_that_fit(memory_budget), group_size);
  if (starts.empty() || !with_grad) {
    const auto [logprobs, entropy, lse, unit, logits] = linear_logprobs_fwd_cpu(
        hidden, weight, tokens, mask, bias, temperature, std::nullopt, false, false, memory_budget, std::nullopt, false);
    const auto [loss, stats, dlogprobs] = rrhf_loss(logprobs, scores, prompts, valid, coefs, with_grad);
    if (!with_grad) {
      return std::tuple_cat(std::make_tuple(loss, stats),
                            LinearGrads(live, head, hidden, weight, bias, needs, true).result());
    }
    return std::tuple_cat(
        std::make_tuple(loss, stats),
        linear_logprobs_bwd_cpu(hidden, weight, tokens, mask, bias, lse, entropy, dlogprobs, std::nullopt, temperature,
                                std::nullopt, needs, memory_budget, std::nullopt, std::nullopt));
  }
  const int64_t columns = live.shape[1], group = group_size.value_or(live.shape[0]);
  const at::Tensor logprobs = at::zeros({live.count()}, hidden.options().dtype(head.type));
  const auto number_of_prompts = [](const Tensor3& result) {
    return std::max(std::get<1>(result)[3].item<double>(), 1.0);
  };
  const double prompts_counted =
      number_of_prompts(rrhf_loss(live.scatter(logprobs), scores, prompts, valid, coefs, false));
  LinearGrads grads(live, head, hidden, weight, bias, needs, starts.size() <= 2);
  AT_DISPATCH_FLOATING_TYPES(head.type, "linear_rrhf_loss_fwd", [&] {
    const auto scaling = scaling_of<scalar_t>(temperature, std::nullopt);
    const auto *token = live.tokens.const_data_ptr<int64_t>(), *place = live.places.const_data_ptr<int64_t>();
    auto* out = logprobs.mutable_data_ptr<scalar_t>();
    for (size_t chunk = 0; chunk + 1 < starts.size(); ++chunk) {
      const int64_t start = starts[chunk], n = starts[chunk + 1] - start;
      std::vector<TokenStats<scalar_t>> rows(n);
      const at::Tensor logits = head.logits(live.hidden.narrow(0, start, n));
      head.for_rows<scalar_t>(logits, [&](int64_t i, scalar_t* row) {
        rows[i] = token_stats(row, head.vocabulary, token[start + i], scaling, false);
        out[start + i] = rows[i].logprob;
      });
      // The chunk's responses, alone: their prompts are whole. Its mean over prompts becomes a part of that over all.
      const int64_t first = place[start] / columns / group * group;
      const int64_t last = (place[start + n - 1] / columns / group + 1) * group;
      const auto part = [&](const at::Tensor& x) { return x.slice(0, first, last); };
      const auto result =
          rrhf_loss(part(live.scatter(logprobs)), part(scores), part(prompts), part(valid), coefs, true);
      const at::Tensor dlogprobs = std::get<2>(result).to(head.type).contiguous();
      const auto* d = dlogprobs.const_data_ptr<scalar_t>();
      const auto share = static_cast<scalar_t>(number_of_prompts(result) / prompts_counted);
      std::vector<char> kept(n);
      head.for_rows<scalar_t>(logits, [&](int64_t i, scalar_t* row) {
        const TokenGrads<scalar_t> upstream{d[place[start + i] - first * columns] * share, 0};
        kept[i] = !upstream.zero();
        if (kept[i]) head.write_gradient(row, token[start + i], rows[i], upstream, scaling, row);
      });
      grads.add(start, head.gradient(logits), &kept);
    }
  });
  const auto result = rrhf_loss(live.scatter(logprobs), scores, prompts, valid, coefs, false);
  return std::tuple_cat(std::make_tuple(std::get<0>(result), std::get<1>(result)), grads.result());
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) { m.impl("linear_rrhf_loss_fwd", linear_rrhf_loss_fwd_cpu); }

}  // namespace rlhf_kernels
