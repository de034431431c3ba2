// CUDA device code on the host, for tests without a GPU: every thread of a block is a fiber, and the points where a GPU's
// threads meet (__syncthreads, warp instructions) are where a fiber waits for the others. One block after another, so
// __shared__ is one static buffer. Only what the kernels of this folder use is here. Slow and exact: the arithmetic and the
// indexing are those of the device source, rounding instructions in software.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
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

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
using cudaStream_t = void*;

namespace ditscale::shim {

enum class State { running, at_warp, at_block, done };

// Entered once through its context, then switched by jumps, which unlike swapcontext make no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  bool started = false;
  State state = State::running;
  unsigned meetings = 0;  // warp instructions so far: their buffers alternate
};

// What the lanes of a warp bring to the instruction they meet at, and what it gives them. Two of each: a lane that goes on
// comes to the next meeting at most before the others have taken their results of this one.
struct Warp {
  uint32_t offered[2][32][8];
  float result[2][32][4];
  bool computed[2];
};

// What all threads of the running block see.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  jmp_buf scheduler;
  unsigned current = 0;
  std::function<void()> body;
  std::vector<char> shared;  // dynamic shared memory
};

inline Block* running = nullptr;
inline dim3 grid_index, thread_index, block_size;

// What a kernel does that a GPU forbids or pays for (host_warp.h), and the multiply-adds that its matrix instructions make.
struct Counts {
  int64_t races = 0, conflicts = 0, misaligned = 0, multiply_adds = 0;
};
inline Counts counts;
inline unsigned epoch = 0;  // block barriers so far in this launch
inline bool backwards = false;  // warps run from the last to the first: tests try both orders

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host_shim: %s\n", what);
  std::abort();
}

inline void entry() {
  running->body();
  running->fibers[running->current].state = State::done;
  _longjmp(running->scheduler, 1);
}

inline void wait_as(State state) {
  Fiber& me = running->fibers[running->current];
  me.state = state;
  if (_setjmp(me.at) == 0) _longjmp(running->scheduler, 1);
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

// Runs a warp until its lanes stand at the block's barrier or have ended.
inline void run_warp(Block& b, unsigned first, unsigned last) {
  for (bool again = true; again;) {
    again = false;
    bool elsewhere = false;
    for (unsigned t = first; t < last; ++t) {
      if (b.fibers[t].state == State::running) resume(b, t);
      again = again || b.fibers[t].state == State::at_warp;
      elsewhere = elsewhere || b.fibers[t].state == State::at_block;
    }
    if (again && elsewhere) fail("some lanes of a warp wait for each other, some at the barrier of the block");
    for (unsigned t = first; again && t < last; ++t) {
      if (b.fibers[t].state == State::at_warp) b.fibers[t].state = State::running;
    }
  }
}

inline char* dynamic_shared() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(running->shared.data()) + 15) / 16 * 16);
}

constexpr size_t STACK = 64 * 1024;

inline void launch(dim3 grid, dim3 block, size_t shared, std::function<void()> body) {
  Block b;
  b.body = std::move(body);
  b.fibers.resize(block.x);
  b.warps.resize((block.x + 31) / 32);
  b.shared.resize(shared + 16);
  for (Fiber& f : b.fibers) f.stack.reset(new char[STACK]);
  running = &b;
  block_size = block;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      grid_index = dim3(x, y);
      std::memset(b.shared.data(), 0xFF, b.shared.size());  // NaN in every storage
      ++epoch;
      for (Fiber& f : b.fibers) {
        f.started = false;
        f.state = State::running;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, entry, 0);
      }
      for (bool live = true; live;) {
        live = false;
        const unsigned warps = static_cast<unsigned>(b.warps.size());
        for (unsigned w = 0; w < warps; ++w) {
          const unsigned warp = backwards ? warps - 1 - w : w, last = warp * 32 + 32;
          run_warp(b, warp * 32, last < block.x ? last : block.x);
        }
        for (Fiber& f : b.fibers) {
          if (f.state != State::at_block) continue;
          f.state = State::running;
          live = true;
        }
        ++epoch;
      }
    }
  }
  running = nullptr;
}

// One instruction of a warp: every lane offers, all meet, `compute(warp, turn)` runs once, every lane takes from its turn.
struct Meeting {
  Warp& warp;
  unsigned lane, turn;
};
template <class Offer, class Compute>
Meeting meet(const Offer& offer, const Compute& compute) {
  const unsigned me = running->current;
  Meeting m{running->warps[me / 32], me % 32, running->fibers[me].meetings++ & 1u};
  offer(m.warp.offered[m.turn][m.lane]);
  m.warp.computed[m.turn] = false;
  wait_as(State::at_warp);
  if (!m.warp.computed[m.turn]) {
    compute(m.warp, m.turn);
    m.warp.computed[m.turn] = true;
  }
  return m;
}

}  // namespace ditscale::shim

#define threadIdx (::ditscale::shim::thread_index)
#define blockIdx (::ditscale::shim::grid_index)
#define blockDim (::ditscale::shim::block_size)

inline void __syncwarp() {
  ditscale::shim::wait_as(ditscale::shim::State::at_warp);
}
inline void __syncthreads() {
  ditscale::shim::wait_as(ditscale::shim::State::at_block);
}

inline float __shfl_xor_sync(uint32_t, float value, int mask) {
  using namespace ditscale::shim;
  const Meeting m = meet([&](uint32_t* slot) { std::memcpy(slot, &value, 4); }, [](Warp&, unsigned) {});
  float got;
  std::memcpy(&got, m.warp.offered[m.turn][m.lane ^ static_cast<unsigned>(mask)], 4);
  return got;
}

template <class V>
void __stwb(V* to, V value) {
  *to = value;
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
