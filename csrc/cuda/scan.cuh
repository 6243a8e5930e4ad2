// The reverse scan of generalised advantage estimation over one tile of a row.
#pragma once

#include "device.cuh"

namespace rlhf_kernels {

// What a stretch of a row does to (value, advantage) of the next counting place on its right:
//   value → seen ? last_value : value;   advantage → decay · advantage + weight · value + offset
template <typename T>
struct GaeMap {
  T decay, weight, offset, value;
  int seen;

  static __device__ GaeMap identity() { return {1, 0, 0, 0, 0}; }

  // A place that counts: A = r + γ·V_next − V + γλ·A_next.
  static __device__ GaeMap place(T reward, T value, T gamma, T lam) {
    return {gamma * lam, gamma, reward - value, value, 1};
  }
};

// First `right`, then `left`, which lies before it in the row. A place that is stepped over must not be multiplied in:
// 0 · ∞ would be NaN.
template <typename T>
__device__ __forceinline__ GaeMap<T> then(const GaeMap<T>& right, const GaeMap<T>& left) {
  if (!left.seen) return right;
  if (!right.seen) return left;
  return {left.decay * right.decay, left.decay * right.weight,
          left.decay * right.offset + left.weight * right.value + left.offset, left.value, 1};
}

template <typename T>
struct GaeCarry {
  T value, advantage;

  __device__ GaeCarry through(const GaeMap<T>& map) const {
    if (!map.seen) return *this;
    return {map.value, map.decay * advantage + map.weight * value + map.offset};
  }
};

// Advantages of the block's tile (thread i owns the kItems places from i · kItems on), 0 where not `keep`; `carry` comes
// from the tile on the right and becomes what the tile on the left needs.
template <int THREADS, typename T>
__device__ void scan_tile(const T (&rewards)[kItems], const T (&values)[kItems], const bool (&keep)[kItems], T gamma,
                          T lam, GaeCarry<T>& carry, T (&advantages)[kItems]) {
  constexpr int warps = THREADS / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  GaeMap<T> mine = GaeMap<T>::identity();
  for (int i = kItems - 1; i >= 0; --i) {
    if (keep[i]) mine = then(mine, GaeMap<T>::place(rewards[i], values[i], gamma, lam));
  }
  GaeMap<T> whole = mine;  // of this thread and those after it in the warp
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const GaeMap<T> after = from_lane_after(whole, offset);
    if (lane + offset < kWarp) whole = then(after, whole);
  }
  GaeMap<T> right = from_lane_after(whole, 1);
  if (lane == kWarp - 1) right = GaeMap<T>::identity();
  __shared__ GaeMap<T> of_warp[warps];
  __syncthreads();  // some may still read the tile before
  if (lane == 0) of_warp[warp] = whole;
  __syncthreads();
  GaeCarry<T> here = carry;
  for (int w = warps - 1; w >= 0; --w) {
    if (w == warp) here = carry;
    carry = carry.through(of_warp[w]);
  }
  here = here.through(right);
  for (int i = kItems - 1; i >= 0; --i) {
    advantages[i] = 0;
    if (!keep[i]) continue;
    here = here.through(GaeMap<T>::place(rewards[i], values[i], gamma, lam));
    advantages[i] = here.advantage;
  }
}

}  // namespace rlhf_kernels
