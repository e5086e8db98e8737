// As much of CUDA as csrc/cuda needs, on the host: a kernel compiled by a C++ compiler runs block
// by block, each thread of a block as a fiber that gives way at shuffles and barriers. So a machine
// without a GPU runs the real kernels, under the sanitizers too. That finds wrong indices and
// tails, misaligned accesses and barriers that not all threads reach; it does not find races.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __shared__ static  // blocks run one after the other
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  explicit dim3(unsigned x_ = 1) : x(x_) {}
  unsigned x, y = 1, z = 1;
};

using cudaStream_t = struct CudaOnHostStream*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

inline dim3 threadIdx;
inline dim3 blockIdx;

namespace cuda_on_host {

static constexpr unsigned kWarp = 32;
static constexpr size_t kStackBytes = 256 * 1024;  // kernel parameters alone may take 32 KB
static constexpr int kMaxRounds =
    100000;  // without an end: threads wait for one that does not come

inline int launches = 0;
inline cudaError_t last_error = cudaSuccess;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  int shuffles = 0;
  double slots[2];  // values offered to the warp, in turns
};

inline std::vector<Fiber> fibers;
inline unsigned thread_count = 0;
inline unsigned arrived = 0;
inline int generation = 0;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void give_way() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

inline void run_fiber() {
  const unsigned thread = threadIdx.x;
  body();
  fibers[thread].done = true;
  swapcontext(&fibers[thread].context, &scheduler);
}

inline void run_block() {
  for (unsigned t = 0; t < thread_count; ++t) {
    Fiber& fiber = fibers[t];
    fiber.done = false;
    fiber.shuffles = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, run_fiber, 0);
  }
  arrived = 0;
  bool running = true;
  for (int round = 0; running; ++round) {
    if (round == kMaxRounds) {
      std::printf("a barrier or shuffle was not reached by every thread\n");
      std::exit(1);
    }
    running = false;
    for (unsigned t = 0; t < thread_count; ++t) {
      if (fibers[t].done) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t].context);
      running = true;
    }
  }
}

template <class... P, size_t... I>
void run_grid(void (*kernel)(P...), unsigned blocks, void** arguments, std::index_sequence<I...>) {
  // Every thread gets arguments of its own, as on a device.
  body = [=] { kernel(*static_cast<std::remove_const_t<P>*>(arguments[I])...); };
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    run_block();
  }
}

}  // namespace cuda_on_host

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  using namespace cuda_on_host;
  if (grid.x == 0 || block.x == 0 || block.x > 1024) {
    return last_error = cudaErrorInvalidConfiguration;
  }
  ++launches;
  thread_count = block.x;
  if (fibers.size() < thread_count) fibers.resize(thread_count);
  run_grid(kernel, grid.x, arguments, std::index_sequence_for<P...>{});
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_on_host::last_error, cudaSuccess);
}

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }

inline void __syncthreads() {
  using namespace cuda_on_host;
  const int mine = generation;
  if (++arrived == thread_count) {
    arrived = 0;
    ++generation;
  }
  while (generation == mine) give_way();
}

namespace cuda_on_host {

// Offers a value to the warp, and takes the one that thread `from` offers.
inline double exchange(double value, unsigned from) {
  const unsigned thread = threadIdx.x;
  const unsigned warp = thread / kWarp * kWarp;
  const int turn = fibers[thread].shuffles++;
  fibers[thread].slots[turn % 2] = value;
  for (unsigned lane = warp; lane < warp + kWarp; ++lane) {
    while (fibers[lane].shuffles <= turn) give_way();
  }
  return from < warp + kWarp ? fibers[from].slots[turn % 2] : value;
}

}  // namespace cuda_on_host

inline double __shfl_down_sync(unsigned, double value, int distance) {
  return cuda_on_host::exchange(value, threadIdx.x + static_cast<unsigned>(distance));
}

template <class A>
A __shfl_xor_sync(unsigned, A value, int mask) {
  const unsigned from = threadIdx.x ^ static_cast<unsigned>(mask);
  return static_cast<A>(cuda_on_host::exchange(static_cast<double>(value), from));
}
