// CUDA on a CPU, for tests: as much of the language and of the runtime as csrc/cuda uses, so that a C++ compiler builds
// the .cu files as they stand and every test of an op can run on its CUDA kernels where there is no GPU.
//
// A thread of a block is a fiber, which runs until it meets a barrier or a shuffle. So a missing barrier shows as a
// wrong result, in one of the two orders of CUDA_EMULATOR_ORDER=forward|reverse, and a barrier that not all threads
// reach shows as an error. Blocks run one after the other, those of a cooperative launch on system threads of their
// own. What it cannot show: speed, and races between blocks or within the steps of a warp.
#pragma once

#include <torch/library.h>
#include <ucontext.h>

#include <barrier>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <tuple>
#include <vector>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) _TORCH_LIBRARY_IMPL(library, CPU, m, C10_UID)
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;  // set before a fiber runs on

template <typename T>
T __ldcs(const T* place) {
  return *place;
}

template <typename T>
void __stcs(T* place, T value) {
  *place = value;
}

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --------------------------------------------------------------------------------------------------- the runtime API

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaDevAttrMultiProcessorCount = 16, cudaDevAttrL2CacheSize = 38;
constexpr int cudaLaunchAttributeCooperative = 2;

struct cudaLaunchAttribute {
  int id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

// Few multiprocessors of one block each, so that a block of a cooperative launch has more than one row.
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 3, cudaSuccess; }

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}

// ------------------------------------------------------------------------------------------------ fibers and barriers

namespace cuda_emulator {

constexpr size_t kStack = 1 << 17;
constexpr unsigned kWarpSize = 32;

// Those who arrive wait until all have.
struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;

  bool arrive(unsigned expected) {
    if (++arrived < expected) return false;
    arrived = 0;
    ++generation;
    return true;
  }
};

struct Fiber {
  ucontext_t context;
  const Barrier* waits_for = nullptr;
  uint64_t generation = 0;
  unsigned exchanges = 0;
  bool done = false;

  bool ready() const { return !done && (!waits_for || waits_for->generation != generation); }
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][kWarpSize];  // of this exchange and of the one before, which some lanes may still read
};

struct Block {
  const std::function<void()>& kernel;
  std::barrier<>* grid;
  unsigned alive;  // threads that have not returned
  std::vector<Fiber> fibers{alive};
  std::vector<Warp> warps{(alive + kWarpSize - 1) / kWarpSize};
  Barrier barrier{};
  unsigned current = 0;
  ucontext_t scheduler{};
  std::exception_ptr failure{};
};

inline thread_local Block* block = nullptr;
inline thread_local std::vector<std::unique_ptr<char[]>> stacks;  // kept: fresh memory costs more than a kernel

inline Fiber& fiber() { return block->fibers[block->current]; }

inline void wait_for(Barrier& barrier, unsigned expected) {
  Fiber& self = fiber();
  self.waits_for = &barrier;
  self.generation = barrier.generation;
  if (barrier.arrive(expected)) return;
  swapcontext(&self.context, &block->scheduler);
}

inline void run_fiber() {
  try {
    block->kernel();
  } catch (...) {
    block->failure = std::current_exception();
  }
  fiber().done = true;
  --block->alive;
  if (block->barrier.arrived > 0 && block->barrier.arrived == block->alive) {
    block->barrier.arrived = 0;
    ++block->barrier.generation;
  }
}

inline void prepare(ucontext_t& context, char* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = &block->scheduler;
  makecontext(&context, run_fiber, 0);
}

inline void run_block(unsigned threads, std::barrier<>* grid, const std::function<void()>& kernel) {
  const char* order = std::getenv("CUDA_EMULATOR_ORDER");
  const bool reverse = order && std::string_view(order) == "reverse";
  Block here{kernel, grid, threads};
  block = &here;
  while (stacks.size() < threads) stacks.push_back(std::make_unique_for_overwrite<char[]>(kStack));
  for (unsigned i = 0; i < threads; ++i) prepare(here.fibers[i].context, stacks[i].get());
  while (here.alive > 0) {
    bool progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      here.current = reverse ? threads - 1 - i : i;
      if (!fiber().ready()) continue;
      progress = true;
      threadIdx = {here.current, 0, 0};
      swapcontext(&here.scheduler, &fiber().context);
      if (here.failure) std::rethrow_exception(here.failure);
    }
    if (!progress) throw std::runtime_error("CUDA emulator: some threads wait at a barrier that others do not reach");
  }
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  if (mask != 0xffffffffu) throw std::runtime_error("CUDA emulator: only whole warps exchange values");
  const unsigned lane = block->current % kWarpSize;
  Warp& warp = block->warps[block->current / kWarpSize];
  uint64_t* slots = warp.slots[fiber().exchanges++ % 2];
  std::memcpy(&slots[lane], &value, sizeof(T));
  wait_for(warp.barrier, kWarpSize);
  std::memcpy(&value, &slots[source < kWarpSize ? source : lane], sizeof(T));
  return value;
}

}  // namespace cuda_emulator

inline void __syncthreads() { cuda_emulator::wait_for(cuda_emulator::block->barrier, cuda_emulator::block->alive); }

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  return cuda_emulator::exchange(mask, value, cuda_emulator::block->current % 32 + offset);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned offset) {
  return cuda_emulator::exchange(mask, value, cuda_emulator::block->current % 32 ^ offset);
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  const std::function<void()> call = [&] { kernel(Params(args)...); };
  const unsigned blocks = config->gridDim.x * config->gridDim.y;
  std::exception_ptr failure;
  const auto run = [&](unsigned i, std::barrier<>* grid) {
    blockDim = config->blockDim;
    gridDim = config->gridDim;
    blockIdx = {i % gridDim.x, i / gridDim.x, 0};
    try {
      cuda_emulator::run_block(blockDim.x, grid, call);
    } catch (...) {
      failure = std::current_exception();
    }
    if (grid) grid->arrive_and_drop();
  };
  if (config->numAttrs > 0 && config->attrs->val.cooperative) {
    std::barrier<> grid(blocks);
    std::vector<std::jthread> threads;  // each with thread-local variables, the block's shared memory, of its own
    for (unsigned i = 0; i < blocks; ++i) threads.emplace_back(run, i, &grid);
  } else {
    for (unsigned i = 0; i < blocks && !failure; ++i) run(i, nullptr);
  }
  if (failure) std::rethrow_exception(failure);
  return cudaSuccess;
}
