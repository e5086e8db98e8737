// A loop by several threads.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#define CLEXT_THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define CLEXT_THREAD_SANITIZER 1
#endif
#endif

#if defined(CLEXT_THREAD_SANITIZER)
#include <thread>
#include <vector>
#endif

namespace clext {
namespace cpu {

// run(i) for each i below `count`, by so many threads.
template <class Run>
void in_parallel(int64_t count, int threads, const Run& run) {
#if defined(CLEXT_THREAD_SANITIZER)
  // The sanitizer does not see how the threads of OpenMP wait for each other, and would report all
  // that they share. Of these it sees everything. Each has its share, whoever is free: a race is
  // found in every run, and no counter puts one run before the next.
  const auto work = [&](int first) {
    for (int64_t i = first; i < count; i += threads) run(i);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();
#else
#if defined(_OPENMP)
  if (count == threads) {
    // To each its own, the same in each call: what it works on may still be in its cache.
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) run(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
#else
  static_cast<void>(threads);
#endif
  for (int64_t i = 0; i < count; ++i) run(i);
#endif
}

}  // namespace cpu
}  // namespace clext
