#include "simd.h"

#include <cstdlib>

namespace pqk {

static Isa best() {
#ifdef PQK_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

const char* name_of(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

static Isa choose() {
  const Isa most = best();
  if (const char* wanted = std::getenv("PQK_FAST_ISA"))
    for (int i = 0; i <= static_cast<int>(most); ++i)
      if (std::strcmp(wanted, name_of(static_cast<Isa>(i))) == 0) return static_cast<Isa>(i);
  return most;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace pqk
