// The attention of one query per sequence. First launch: scores, each key read once for the (up to eight) query heads
// that share it, and the softmax sums of a stretch of columns. Second launch: the mean over heads of the probabilities.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "softmax.cuh"

namespace rlhf_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kKeys = 4;         // neighbouring keys that a group of lanes has on their way at a time
constexpr int kBlocks = 1024;    // the columns are split until there are about this many blocks
constexpr int kHeadsAtOnce = 64; // of the second launch

// A tensor [B, H, D] (stride 0 for a missing T) or [B, H, T, D].
template <typename scalar_t>
struct Heads {
  const scalar_t* data;
  int64_t batch_stride, head_stride, column_stride, stride;

  explicit Heads(const at::Tensor& tensor)
      : data(tensor.const_data_ptr<scalar_t>()),
        batch_stride(tensor.stride(0)),
        head_stride(tensor.stride(1)),
        column_stride(tensor.dim() == 4 ? tensor.stride(2) : 0),
        stride(tensor.stride(-1)) {}

  bool aligned() const {
    constexpr int64_t vector = 16 / sizeof(scalar_t);
    return stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch_stride % vector == 0 &&
           head_stride % vector == 0 && column_stride % vector == 0;
  }

  __device__ const scalar_t* at(int64_t b, int64_t head, int64_t column) const {
    return data + b * batch_stride + head * head_stride + column * column_stride;
  }
};

template <typename scalar_t>
struct Problem {
  Heads<scalar_t> query, key;
  MaskPlane mask;
  int64_t key_heads, group, length, dim, window, columns_per_split;  // window 0: everything
  double scale, softcap;                                             // softcap 0: none
};

// VECTOR: the 16 bytes from element `d` on are one load.
template <bool VECTOR, int N, typename scalar_t, typename T>
__device__ __forceinline__ void load_elements(const scalar_t* row, int64_t d, int64_t dim, int64_t stride, T (&out)[N]) {
  if constexpr (VECTOR) {
    const auto found = *reinterpret_cast<const Vector<scalar_t>*>(row + d);
    for (int i = 0; i < N; ++i) out[i] = static_cast<T>(found.items[i]);
  } else {
    for (int i = 0; i < N; ++i) out[i] = d + i < dim ? static_cast<T>(row[(d + i) * stride]) : T(0);
  }
}

// Sums `values` over LANES neighbouring lanes; afterwards a lane holds the sums of `owned` of them, from the returned
// index on, in its first places. Halving what is exchanged at each step takes N shuffles instead of N · log₂ LANES.
template <int LANES, int N, typename T>
__device__ __forceinline__ int reduce_scatter(T (&values)[N], int lane) {
  int first = 0, held = N;
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) {
    if (held == 1) {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
      continue;
    }
    held /= 2;
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (i >= held) break;
      const T sent = upper ? values[i] : values[i + held];
      const T kept = upper ? values[i + held] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, offset);
    }
    if (upper) first += held;
  }
  return first;
}

template <int HEADS, typename T>
struct HeadSums {
  Sums<T> of[HEADS];
};

template <typename scalar_t, typename T, int HEADS, int LANES, bool VECTOR>
__global__ void __launch_bounds__(kThreads, 2)
    attention_scores_kernel(Problem<scalar_t> in, T* __restrict__ scores, Sums<T>* __restrict__ sums) {
  constexpr int items = 16 / sizeof(scalar_t), values = kKeys * HEADS, groups = kThreads / LANES;
  constexpr int owned = values > LANES ? values / LANES : 1, copies = values > LANES ? 1 : LANES / values;
  const int64_t b = blockIdx.x / in.key_heads, key_head = blockIdx.x % in.key_heads, split = blockIdx.y;
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const int64_t end = (split + 1) * in.columns_per_split < in.length ? (split + 1) * in.columns_per_split : in.length;
  int64_t first = 0;
  if (in.window > 0) {  // the query's own column is the last that it may look at
    int last = -1;
    for (int64_t t = threadIdx.x; t < in.length; t += kThreads) last = in.mask.at(b, t) ? static_cast<int>(t) : last;
    first = block_reduce<kThreads>(last, [](int x, int y) { return x > y ? x : y; }) + 1 - in.window;
  }
  for (int64_t head = 0; head < in.group; head += HEADS) {
    Sums<T> mine[owned];
    for (Sums<T>& each : mine) each = Sums<T>::none();
    int index = 0;
    for (int64_t start = split * in.columns_per_split; start < end; start += groups * kKeys) {
      const int64_t column = start + group * kKeys;
      bool keep[kKeys];
      for (int k = 0; k < kKeys; ++k) {
        keep[k] = column + k < end && column + k >= first && in.mask.at(b, column + k);
      }
      T products[values] = {};
      for (int64_t d = lane * items; d < in.dim; d += LANES * items) {
        T key[kKeys][items];
#pragma unroll
        for (int k = 0; k < kKeys; ++k) {
          if (keep[k]) {
            load_elements<VECTOR>(in.key.at(b, key_head, column + k), d, in.dim, in.key.stride, key[k]);
          } else {
            for (int i = 0; i < items; ++i) key[k][i] = 0;
          }
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
          if (head + h >= in.group) continue;
          T query[items];
          load_elements<VECTOR>(in.query.at(b, key_head * in.group + head + h, 0), d, in.dim, in.query.stride, query);
#pragma unroll
          for (int k = 0; k < kKeys; ++k) {
            for (int i = 0; i < items; ++i) products[k * HEADS + h] += key[k][i] * query[i];
          }
        }
      }
      index = reduce_scatter<LANES>(products, lane);
      if (lane % copies != 0) continue;
#pragma unroll
      for (int i = 0; i < owned; ++i) {
        const int k = (index + i) / HEADS, h = (index + i) % HEADS;
        if (column + k >= end || head + h >= in.group) continue;
        bool kept = false;
        for (int j = 0; j < kKeys; ++j) kept = j == k ? keep[j] : kept;  // no array indexed at run time
        T score = static_cast<T>(in.scale) * products[i];
        if (in.softcap > 0) score = static_cast<T>(in.softcap) * std::tanh(score / static_cast<T>(in.softcap));
        if (!kept) score = -std::numeric_limits<T>::infinity();
        scores[(blockIdx.x * in.group + head + h) * in.length + column + k] = score;
        mine[i] = merged(mine[i], Sums<T>{score, kept ? T(1) : T(0), 0});
      }
    }
    HeadSums<HEADS, T> all;
    for (int h = 0; h < HEADS; ++h) {
      all.of[h] = Sums<T>::none();
      for (int i = 0; i < owned; ++i) {
        if ((index + i) % HEADS == h) all.of[h] = merged(all.of[h], mine[i]);
      }
    }
    all = block_reduce<kThreads>(all, [](const HeadSums<HEADS, T>& x, const HeadSums<HEADS, T>& y) {
      HeadSums<HEADS, T> both;
      for (int h = 0; h < HEADS; ++h) both.of[h] = merged(x.of[h], y.of[h]);
      return both;
    });
    for (int h = 0; h < HEADS; ++h) {
      if (threadIdx.x == 0 && head + h < in.group) {
        sums[(blockIdx.x * in.group + head + h) * gridDim.y + split] = all.of[h];
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    attention_mean_kernel(const T* __restrict__ scores, const Sums<T>* __restrict__ sums, Plane<T> sink, int64_t heads,
                          int64_t length, int64_t splits, T* __restrict__ row) {
  __shared__ T highest[kHeadsAtOnce], inverse[kHeadsAtOnce];
  const int64_t b = blockIdx.y, column = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  T total = 0;
  for (int64_t start = 0; start < heads; start += kHeadsAtOnce) {
    const int64_t count = heads - start < kHeadsAtOnce ? heads - start : kHeadsAtOnce;
    __syncthreads();
    if (threadIdx.x < count) {
      const int64_t head = start + threadIdx.x;
      Sums<T> all = sink.data ? Sums<T>{sink.at(head, 0), 1, 0} : Sums<T>::none();
      for (int64_t i = 0; i < splits; ++i) all = merged(all, sums[(b * heads + head) * splits + i]);
      highest[threadIdx.x] = finite_or_zero(all.highest);
      inverse[threadIdx.x] = all.sum > 0 ? 1 / all.sum : (all.sum == 0 ? T(0) : all.sum);
    }
    __syncthreads();
    if (column >= length) continue;
    for (int64_t i = 0; i < count; ++i) {
      total += exponential(scores[(b * heads + start + i) * length + column] - highest[i]) * inverse[i];
    }
  }
  if (column < length) row[b * length + column] = total / heads;
}

// f(integral_constant) for the smallest of the numbers that is at least n, or the last.
template <int Number, int... Rest, typename F>
void with_at_least(int64_t n, F f) {
  if constexpr (sizeof...(Rest) > 0) {
    if (n > Number) return with_at_least<Rest...>(n, f);
  }
  f(std::integral_constant<int, Number>());
}

at::Tensor attention_row_cuda(const at::Tensor& query, const at::Tensor& key, const at::Tensor& key_mask,
                              const std::optional<at::Tensor>& sink, double scale, std::optional<double> softcap,
                              std::optional<int64_t> window) {
  const int64_t batch = query.size(0), heads = query.size(1), dim = query.size(2);
  const int64_t key_heads = key.size(1), length = key.size(2);
  TORCH_CHECK_VALUE(key_heads > 0 && heads % key_heads == 0, "attention_row: key must have a number of heads that divides ",
                    heads, ", got ", key_heads);
  check_same_shape("attention_row", "key", key, {batch, key_heads, length, dim});
  check_same_shape("attention_row", "key_mask", key_mask, {batch, length});
  const c10::cuda::CUDAGuard guard(query.device());
  const auto options = query.options().dtype(compute_type(query));
  const int64_t tile = kThreads / 8 * kKeys, tiles = (length + tile - 1) / tile;
  const int64_t wanted = std::clamp<int64_t>(kBlocks / std::max<int64_t>(batch * key_heads, 1), 1, std::max<int64_t>(tiles, 1));
  const int64_t per_split = (tiles + wanted - 1) / wanted * tile;
  const int64_t splits = length ? (length + per_split - 1) / per_split : 0;
  at::Tensor row = at::empty({batch, length}, options), scores = at::empty({batch, heads, length}, options);
  at::Tensor sums = at::empty({batch, heads, splits, 3}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, key.scalar_type(), "attention_row", [&] {
    using T = at::opmath_type<scalar_t>;
    const Problem<scalar_t> in{Heads<scalar_t>(query), Heads<scalar_t>(key), MaskPlane(key_mask), key_heads,
                               heads / key_heads,      length,               dim,                 window.value_or(0),
                               per_split,              scale,                softcap.value_or(0)};
    auto* const found = scores.mutable_data_ptr<T>();
    auto* const partial = reinterpret_cast<Sums<T>*>(sums.mutable_data_ptr<T>());
    constexpr int items = 16 / sizeof(scalar_t);
    const dim3 blocks(batch * key_heads, splits);
    with_at_least<1, 4, 8>(in.group, [&](auto group) {
      if (!in.query.aligned() || !in.key.aligned() || dim % items != 0) {
        launch(attention_scores_kernel<scalar_t, T, group, kWarp, false>, blocks, kThreads, false, in, found, partial);
        return;
      }
      with_at_least<8, 16, 32>(dim / items, [&](auto lanes) {
        launch(attention_scores_kernel<scalar_t, T, group, lanes, true>, blocks, kThreads, false, in, found, partial);
      });
    });
    launch(attention_mean_kernel<T>, dim3((length + kThreads - 1) / kThreads, batch), kThreads, false, found, partial,
           Plane<T>(sink), heads, length, splits, row.mutable_data_ptr<T>());
  });
  return row;
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_kernels_native, CUDA, m) { m.impl("attention_row", attention_row_cuda); }

}  // namespace rlhf_kernels
