// CUDA device code on the host, for tests without a GPU: every thread of a block is a fiber, and the points where a GPU's
// threads meet (__syncthreads, shuffles) are where a fiber waits for the others. One block after another, so __shared__ is
// one static buffer. Only what the kernels of this folder use is here. Slow and exact: the arithmetic and the indexing are
// those of the device source, rounding instructions in software.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
using cudaStream_t = void*;

namespace ditscale::shim {

// Entered once through its context, then switched by jumps, which unlike swapcontext make no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
};

// What all threads of the running block see. A fiber that waits records at which meeting it stands.
struct Block {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  unsigned current = 0;
  std::function<void()> body;
  std::vector<uint32_t> lanes;  // what each thread offers to a shuffle
};

inline Block* running = nullptr;
inline dim3 grid_index, thread_index, block_size, grid_size;

inline void entry() {
  running->body();
  running->fibers[running->current].done = true;
  _longjmp(running->scheduler, 1);
}

inline void yield() {
  const unsigned me = running->current;
  if (_setjmp(running->fibers[me].at) == 0) _longjmp(running->scheduler, 1);
}

// Runs fiber t to its next meeting point. Its own function: nothing here is kept in a register over the jump back.
inline void resume(Block& b, unsigned t) {
  b.current = t;
  thread_index = dim3(t);
  if (_setjmp(b.scheduler) != 0) return;
  Fiber& f = b.fibers[t];
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  setcontext(&f.context);
}

constexpr size_t STACK = 64 * 1024;

// Every live fiber runs to its next meeting point, then every one to the one after it: lockstep phases. That is stronger
// than a GPU promises, and the kernels' threads do meet all together.
inline void launch(dim3 grid, dim3 block, std::function<void()> body) {
  Block b;
  b.body = std::move(body);
  b.fibers.resize(block.x);
  b.lanes.assign(block.x + 32, 0);
  for (Fiber& f : b.fibers) f.stack.reset(new char[STACK]);
  running = &b;
  block_size = block;
  grid_size = grid;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      grid_index = dim3(x, y);
      for (Fiber& f : b.fibers) {
        f.started = f.done = false;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, entry, 0);
      }
      for (unsigned live = block.x; live > 0;) {
        live = 0;
        for (unsigned t = 0; t < block.x; ++t) {
          if (b.fibers[t].done) continue;
          resume(b, t);
          if (!b.fibers[t].done) ++live;
        }
      }
    }
  }
  running = nullptr;
}

}  // namespace ditscale::shim

#define threadIdx (::ditscale::shim::thread_index)
#define blockIdx (::ditscale::shim::grid_index)
#define blockDim (::ditscale::shim::block_size)
#define gridDim (::ditscale::shim::grid_size)

inline void __syncthreads() {
  ditscale::shim::yield();
}

inline float __shfl_xor_sync(uint32_t, float value, int mask) {
  using namespace ditscale::shim;
  const unsigned me = running->current;
  std::memcpy(&running->lanes[me], &value, 4);
  yield();  // all have offered
  float got;
  std::memcpy(&got, &running->lanes[(me & ~31u) | ((me ^ static_cast<unsigned>(mask)) & 31u)], 4);
  yield();  // all have read
  return got;
}

inline float __uint_as_float(uint32_t a) {
  float f;
  std::memcpy(&f, &a, 4);
  return f;
}
inline uint32_t __float_as_uint(float a) {
  uint32_t u;
  std::memcpy(&u, &a, 4);
  return u;
}
