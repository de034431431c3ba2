// What warps do together, on the host: fragments from shared memory, matrix products, asynchronous copies. The layouts of
// fragments are those of the PTX manual (mma.m16n8k16, m16n8k8, m16n8k4, ldmatrix). A watch over shared memory counts what a
// GPU would not report: bytes read that another warp writes between the same two barriers, copies read before they were waited
// for, addresses that are not aligned, and fragments whose eight rows do not lie in different banks.
#pragma once

#include "host_shim.h"

#include <unordered_map>

namespace ditscale::shim {

// Per 16 bytes of shared memory: who wrote and read it last, and whether a copy to it is on its way.
struct Mark {
  unsigned written = 0, read = 0;  // epochs
  int writer = -1, reader = -1;    // warps; reader -2: several
  bool pending = false;
};
struct Copy {
  char* to;
  char bytes[16];
};
struct Watch {
  std::unordered_map<uintptr_t, Mark> marks;
  std::vector<std::vector<Copy>> open;                     // by thread: copies since the last commit
  std::vector<std::vector<std::vector<Copy>>> committed;   // by thread: groups not yet waited for
  const Block* block = nullptr;
  dim3 index{~0u, ~0u};
};
inline Watch watch;

inline Watch& watching() {
  const bool same = watch.block == running && watch.index.x == grid_index.x && watch.index.y == grid_index.y;
  if (!same) {
    watch.marks.clear();
    watch.open.assign(running->fibers.size(), {});
    watch.committed.assign(running->fibers.size(), {});
    watch.block = running;
    watch.index = grid_index;
  }
  return watch;
}
inline int this_warp() {
  return static_cast<int>(running->current / 32);
}

inline void note_read(const void* p, size_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) / 16, last = (reinterpret_cast<uintptr_t>(p) + bytes - 1) / 16;
  for (uintptr_t at = first; at <= last; ++at) {
    Mark& m = watching().marks[at];
    if (m.pending || (m.written == epoch && m.writer != this_warp())) ++counts.races;
    m.reader = m.read == epoch && m.reader != this_warp() ? -2 : this_warp();
    m.read = epoch;
  }
}
inline void note_write(const void* p, size_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) / 16, last = (reinterpret_cast<uintptr_t>(p) + bytes - 1) / 16;
  for (uintptr_t at = first; at <= last; ++at) {
    Mark& m = watching().marks[at];
    const bool read = m.read == epoch && m.reader != this_warp(), written = m.written == epoch && m.writer != this_warp();
    if (m.pending || read || (written && bytes % 16 == 0)) ++counts.races;
    m.written = epoch;
    m.writer = this_warp();
  }
}

inline void begin_copy(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) ++counts.misaligned;
  note_write(to, 16);
  watching().marks[reinterpret_cast<uintptr_t>(to) / 16].pending = true;
  Copy c{static_cast<char*>(to), {}};
  if (valid) std::memcpy(c.bytes, from, 16);
  watch.open[running->current].push_back(c);
}
inline void commit_copies() {
  auto& mine = watching().committed[running->current];
  mine.push_back(std::move(watch.open[running->current]));
  watch.open[running->current].clear();
}
// Copies arrive as late as they may: when they are waited for.
inline void wait_copies(size_t left) {
  auto& mine = watching().committed[running->current];
  while (mine.size() > left) {
    for (const Copy& c : mine.front()) {
      std::memcpy(c.to, c.bytes, 16);
      Mark& m = watch.marks[reinterpret_cast<uintptr_t>(c.to) / 16];
      m.pending = false;
      m.written = epoch;
      m.writer = this_warp();
    }
    mine.erase(mine.begin());
  }
}

// Matrix i of ldmatrix has its rows at the addresses of lanes 8 i to 8 i + 7.
template <int COUNT>
void load_matrices(uint32_t* r, const void* row, bool transposed) {
  const Meeting m = meet(
      [&](uint32_t* slot) { std::memcpy(slot, &row, sizeof row); },
      [](Warp& warp, unsigned turn) {
        for (int i = 0; i < COUNT; ++i) {
          unsigned banks = 0;
          for (int k = 0; k < 8; ++k) {
            const char* p;
            std::memcpy(&p, warp.offered[turn][8 * i + k], sizeof p);
            banks |= 1u << (reinterpret_cast<uintptr_t>(p) / 16 % 8);
            if (reinterpret_cast<uintptr_t>(p) % 16) ++counts.misaligned;
            note_read(p, 16);
          }
          if (banks != 0xFF) ++counts.conflicts;
        }
      });
  const auto at = [&](int i, unsigned k) {
    const char* p;
    std::memcpy(&p, m.warp.offered[m.turn][8 * i + static_cast<int>(k)], sizeof p);
    return p;
  };
  for (int i = 0; i < COUNT; ++i) {
    if (!transposed) {
      std::memcpy(&r[i], at(i, m.lane / 4) + m.lane % 4 * 4, 4);
    } else {
      uint16_t pair[2];
      for (unsigned k = 0; k < 2; ++k) std::memcpy(&pair[k], at(i, m.lane % 4 * 2 + k) + m.lane / 4 * 2, 2);
      std::memcpy(&r[i], pair, 4);
    }
  }
}

// To float32 towards zero, as tensor cores round their sums (arXiv:2203.03341).
inline float cut_off(double exact) {
  const float f = static_cast<float>(exact);
  return std::fabs(static_cast<double>(f)) > std::fabs(exact) ? std::nextafterf(f, 0.f) : f;
}

// d[16, 8] += a[16, k] b[k, 8]; `element` takes element i of a register. A lane's registers of a are rows lane / 4 and
// lane / 4 + 8, of columns that begin at lane % 4 elements-a-register; further registers are one quad of registers on.
template <int K, int PER_REGISTER, class Element>
void product(float (&d)[4], const uint32_t* a, const uint32_t* b, const Element& element) {
  constexpr int QUADS = K / (4 * PER_REGISTER);
  static_assert(QUADS == 1 || QUADS == 2, "one or two quads of registers");
  float mine[4] = {d[0], d[1], d[2], d[3]};
  struct Offered {
    uint32_t a[4], b[2];
  };
  const Meeting m = meet(
      [&](uint32_t* slot) {
        Offered o{};
        std::memcpy(o.a, a, sizeof(uint32_t) * 2 * QUADS);
        std::memcpy(o.b, b, sizeof(uint32_t) * QUADS);
        std::memcpy(slot, &o, sizeof o);
      },
      [&](Warp& warp, unsigned turn) {
        counts.multiply_adds += 16 * 8 * K;
        double left[16][K], right[K][8];
        for (int lane = 0; lane < 32; ++lane) {
          Offered o;
          std::memcpy(&o, warp.offered[turn][lane], sizeof o);
          for (int q = 0; q < QUADS; ++q) {
            for (int e = 0; e < PER_REGISTER; ++e) {
              const int k = (q * 4 + lane % 4) * PER_REGISTER + e;
              left[lane / 4][k] = element(o.a[2 * q], e);
              left[lane / 4 + 8][k] = element(o.a[2 * q + 1], e);
              right[k][lane / 4] = element(o.b[q], e);
            }
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            double sum = 0;
            for (int k = 0; k < K; ++k) sum += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
            std::memcpy(&warp.offered[turn][lane][2 * i], &sum, sizeof sum);
          }
        }
      });
  for (int i = 0; i < 4; ++i) {
    double sum;
    std::memcpy(&sum, &m.warp.offered[m.turn][m.lane][2 * i], sizeof sum);
    d[i] = cut_off(mine[i] + sum);
  }
}

}  // namespace ditscale::shim
