// Which instruction set runs. Each family of kernels is compiled for all of them, as FAMILY_portable, FAMILY_avx2, FAMILY_avx512.
#pragma once

namespace ditscale::cpu {

enum class Isa { portable, avx2, avx512 };

// The best this processor has, decided once. DITSCALE_CPU_ISA=portable|avx2|avx512 asks for less.
Isa isa();

}  // namespace ditscale::cpu

// A family's kernels for it.
#if defined(__x86_64__)
#define DS_BY_ISA(family)                                                   \
  (::ditscale::cpu::isa() == ::ditscale::cpu::Isa::avx512 ? family##_avx512 \
   : ::ditscale::cpu::isa() == ::ditscale::cpu::Isa::avx2 ? family##_avx2   \
                                                          : family##_portable)
#else
#define DS_BY_ISA(family) (family##_portable)
#endif
