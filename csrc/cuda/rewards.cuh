// The rewards of one tile of a row, from its score, the KL to the reference, and the shares of the attention.
#pragma once

#include "device.cuh"

namespace rlhf_kernels {

template <typename T>
struct RewardInputs {
  Plane<T> scores, logprobs, ref_logprobs, attention;
  MaskPlane mask;
  int64_t batch, length;
  bool per_token;  // scores: one for each token, rather than one to spread
  T kl_coef, beta;
  KlEstimator estimator;

  RewardInputs(const char* op, const at::Tensor& scores_in, const at::Tensor& logprobs_in, const at::Tensor& ref_in,
               const std::optional<at::Tensor>& attention_in, const at::Tensor& mask_in, const at::Tensor* tokens,
               double kl_coef_in, double beta_in, std::string_view estimator_name)
      : scores(scores_in),
        logprobs(logprobs_in),
        ref_logprobs(ref_in),
        attention(attention_in),
        mask(mask_in, tokens),
        batch(logprobs_in.size(0)),
        length(logprobs_in.size(1)),
        per_token(scores_in.dim() == 2),
        kl_coef(static_cast<T>(kl_coef_in)),
        beta(static_cast<T>(beta_in)),
        estimator(kl_estimator(op, estimator_name)) {
    check_same_shape(op, "scores", scores_in, logprobs_in.sizes().slice(0, per_token ? 2 : 1));
    check_same_shape(op, "ref_logprobs", ref_in, logprobs_in.sizes());
    check_same_shape(op, "mask", mask_in, logprobs_in.sizes());
    if (attention_in) check_same_shape(op, "attention", *attention_in, logprobs_in.sizes());
  }
};

// What the kernels need to know of a whole row before they can pay its first token.
template <typename T>
struct RowCredit {
  T mass;  // Σ attention over the places that count
  int count, last;
};

template <int THREADS, typename T>
__device__ RowCredit<T> row_credit(const RewardInputs<T>& in, int64_t row) {
  RowCredit<T> mine{0, 0, -1};
  for (int64_t column = threadIdx.x * kItems; column < in.length; column += THREADS * kItems) {
    bool keep[kItems];
    T share[kItems] = {};
    in.mask.load(row, column, in.length, keep);
    if (in.attention.data) in.attention.load(row, column, in.length, keep, share);
    for (int i = 0; i < kItems; ++i) {
      mine.mass += share[i];
      mine.count += keep[i];
      if (keep[i]) mine.last = static_cast<int>(column) + i;
    }
  }
  return block_reduce<THREADS>(mine, [](const RowCredit<T>& a, const RowCredit<T>& b) {
    return RowCredit<T>{a.mass + b.mass, a.count + b.count, a.last > b.last ? a.last : b.last};
  });
}

// What a tile reads; apart from the sums above, so that the loads are on their way while those are taken.
template <typename T>
struct RewardTile {
  T logprobs[kItems], ref_logprobs[kItems], attention[kItems];
  bool keep[kItems];

  __device__ void load(const RewardInputs<T>& in, int64_t row, int64_t column) {
    in.mask.load(row, column, in.length, keep);
    in.logprobs.load(row, column, in.length, keep, logprobs);
    in.ref_logprobs.load(row, column, in.length, keep, ref_logprobs);
    if (in.attention.data) in.attention.load(row, column, in.length, keep, attention);
  }

  // Rewards and KL estimates, 0 where masked.
  __device__ void pay(const RewardInputs<T>& in, int64_t place, T score, const RowCredit<T>& row, int64_t column,
                      T (&rewards)[kItems], T (&kl)[kItems]) const {
    const bool uniform = !(row.mass >= T(1e-12) && row.mass <= std::numeric_limits<T>::max());
    for (int i = 0; i < kItems; ++i) {
      rewards[i] = kl[i] = 0;
      if (!keep[i]) continue;
      kl[i] = kl_estimate(log_difference(logprobs[i], ref_logprobs[i]), in.estimator);
      T credit = in.per_token ? in.scores.at(place, column + i) : column + i == row.last ? score : T(0);
      if (in.attention.data) {
        const T share = uniform ? T(1) / row.count : attention[i] / row.mass;
        credit = (1 - in.beta) * credit + in.beta * share * score;
      }
      rewards[i] = credit - in.kl_coef * kl[i];
    }
  }
};

}  // namespace rlhf_kernels
