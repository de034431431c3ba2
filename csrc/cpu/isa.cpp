// Which instruction set runs, decided once per process.
#include "adaln_rows.h"

#include <cstdlib>
#include <cstring>

namespace ditscale::cpu {

const AdalnTable& adaln_table() {
  static const AdalnTable& chosen = []() -> const AdalnTable& {
#if defined(__x86_64__)
    const char* ask = std::getenv("DITSCALE_CPU_ISA");
    const bool any = ask == nullptr || ask[0] == '\0';
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && (any || std::strcmp(ask, "avx512") == 0)) return adaln_avx512;
    if (avx2 && (any || std::strcmp(ask, "avx512") == 0 || std::strcmp(ask, "avx2") == 0)) return adaln_avx2;
#endif
    return adaln_portable;
  }();
  return chosen;
}

}  // namespace ditscale::cpu
