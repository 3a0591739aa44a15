// Element types, and the choice of an instruction set at run time.
//
// A kernel file `x.cpp` keeps its inner loops in `x_kernels.h` and compiles them once for each instruction set:
//
//     #include "simd.h"
//     #define PQK_KERNELS "x_kernels.h"
//     #include "for_each_isa.h"
//
// which puts the code into the namespaces pqk::baseline, pqk::avx2 and pqk::avx512. PQK_DISPATCH(f, ...) calls the best
// one that this CPU has. Kernels are plain loops, which compilers vectorise for any target (NEON too), or vectors as
// wide as a register: of wider ones GCC 12 makes scalar code wherever they are compared, and keeps their sums in memory.
// (Its target_clones lowers vector types before it makes the clones, which loses vectorisation altogether.)
#pragma once
#include <cstdint>
#include <cstring>

namespace pqk {

// The element types of weights and gradients.
enum class Type : int { f32, bf16, f16 };

inline int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

enum class Isa : int { baseline, avx2, avx512 };

// The best instruction set of this CPU, or the one that the environment variable PQK_FAST_ISA names, if it has that.
Isa isa();
const char* name_of(Isa);

}  // namespace pqk

#if defined(__x86_64__) && defined(__GNUC__)
#define PQK_X86 1
#define PQK_DISPATCH(function, ...)                                        \
  (::pqk::isa() == ::pqk::Isa::avx512 ? ::pqk::avx512::function(__VA_ARGS__) \
   : ::pqk::isa() == ::pqk::Isa::avx2 ? ::pqk::avx2::function(__VA_ARGS__)   \
                                      : ::pqk::baseline::function(__VA_ARGS__))
#include <immintrin.h>
#else
#define PQK_DISPATCH(function, ...) ::pqk::baseline::function(__VA_ARGS__)
#endif
