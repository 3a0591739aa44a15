// Compiles PQK_KERNELS, after simd_inline.h, once for each instruction set: see simd.h. PQK_ISA is 0 (baseline),
// 2 (AVX2, FMA) or 512 (AVX-512: F, BW, DQ, VL). Standard headers must be included before this one.
#define PQK_ISA 0
namespace pqk::baseline {
namespace {
#include "simd_inline.h"
}
#include PQK_KERNELS
}  // namespace pqk::baseline
#undef PQK_ISA

#ifdef PQK_X86

#define PQK_ISA 2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace pqk::avx2 {
namespace {
#include "simd_inline.h"
}
#include PQK_KERNELS
}  // namespace pqk::avx2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef PQK_ISA

#define PQK_ISA 512
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace pqk::avx512 {
namespace {
#include "simd_inline.h"
}
#include PQK_KERNELS
}  // namespace pqk::avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef PQK_ISA

#endif
#undef PQK_KERNELS
