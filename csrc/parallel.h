// Threads for the kernels. They are torch's own: library.cpp defines run_parallel, and so may a test that has no torch.
#pragma once
#include <cstdint>

namespace pqk {

using RangeBody = void (*)(const void* context, int64_t begin, int64_t end);

// Calls body on ranges that cover [0, n), none shorter than `grain` but the last, on several threads if n > grain.
void run_parallel(int64_t n, int64_t grain, RangeBody body, const void* context);

template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  run_parallel(
      n, grain, [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      &body);
}

}  // namespace pqk
