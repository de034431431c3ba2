#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace ditscale::cpu {
namespace {

Isa best() {
#if defined(__x86_64__)
  const char* ask = std::getenv("DITSCALE_CPU_ISA");
  const bool any = ask == nullptr || ask[0] == '\0';
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (any || std::strcmp(ask, "avx512") == 0)) return Isa::avx512;
  if (avx2 && (any || std::strcmp(ask, "avx512") == 0 || std::strcmp(ask, "avx2") == 0)) return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace

Isa isa() {
  static const Isa chosen = best();
  return chosen;
}

}  // namespace ditscale::cpu

extern "C" __attribute__((visibility("default"))) const char* ditscale_cpu_isa() {
  constexpr const char* names[] = {"portable", "avx2", "avx512"};
  return names[static_cast<int>(ditscale::cpu::isa())];
}
