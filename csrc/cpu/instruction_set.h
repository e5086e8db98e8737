// Which vector instructions this processor has. Kernels are compiled once for each set below and
// chosen at run time, so that one binary is fast everywhere without -march=native.
#pragma once

#include <cstdint>

// CLEXT_BASELINE: for the first set alone, a third of the work of a compiler.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(CLEXT_BASELINE)
#define CLEXT_X86_DISPATCH 1
#define CLEXT_TARGET_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define CLEXT_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), min_vector_width(512)))
#else
#define CLEXT_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#endif

namespace clext {

enum class InstructionSet { Baseline, Avx2, Avx512 };

// The widest vector of an instruction set, and how many rows by how many a tile of sums may have so
// that it stays in registers: there are 32 of them, or else 16.
template <InstructionSet>
struct VectorUnit {
  static constexpr int64_t kBytes = 16;
  static constexpr int kTile = 3;
};
template <>
struct VectorUnit<InstructionSet::Avx2> {
  static constexpr int64_t kBytes = 32;
  static constexpr int kTile = 3;
};
template <>
struct VectorUnit<InstructionSet::Avx512> {
  static constexpr int64_t kBytes = 64;
  static constexpr int kTile = 4;
};

inline InstructionSet detect_instruction_set() {
#if defined(CLEXT_X86_DISPATCH)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return InstructionSet::Avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::Avx2;
#endif
  return InstructionSet::Baseline;
}

inline InstructionSet instruction_set() {
  static const InstructionSet detected = detect_instruction_set();
  return detected;
}

// Of one kernel, compiled for each set, the one for this processor.
template <class Kernel>
Kernel for_instruction_set(Kernel baseline, Kernel avx2, Kernel avx512) {
  switch (instruction_set()) {
    case InstructionSet::Avx512:
      return avx512;
    case InstructionSet::Avx2:
      return avx2;
    case InstructionSet::Baseline:
      break;
  }
  return baseline;
}

inline const char* instruction_set_name() {
  switch (instruction_set()) {
    case InstructionSet::Avx512:
      return "avx512";
    case InstructionSet::Avx2:
      return "avx2";
    case InstructionSet::Baseline:
      break;
  }
  return "baseline";
}

}  // namespace clext
