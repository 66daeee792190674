#include "dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef DIJIANG_X86_64
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dijiang {
namespace {

struct Set {
  const Kernels* kernels;
  bool (*here)();
};

#ifdef DIJIANG_X86_64
bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && avx2();
}

bool avx512vnni() { return avx512() && __builtin_cpu_supports("avx512vnni"); }

// A bit of a register (0: EAX, 3: EDX) of CPUID leaf 7.
bool leaf7(unsigned part, int which, int bit) {
  unsigned found[4];
  return __get_cpuid_count(7, part, &found[0], &found[1], &found[2], &found[3]) && (found[which] >> bit & 1);
}

bool avxvnni() { return avx2() && leaf7(1, 0, 4); }

// Linux lends the tiles' 8 kB of registers to a process that asks.
bool amx() {
#ifdef __linux__
  constexpr long kAskForState = 0x1023, kTileData = 18;
  return avx512vnni() && leaf7(0, 3, 24) && leaf7(0, 3, 25) && !syscall(SYS_arch_prctl, kAskForState, kTileData);
#else
  return false;
#endif
}
#endif

#ifdef DIJIANG_AARCH64
// Bits of HWCAP.
constexpr unsigned long kAsimd = 1 << 1, kAsimdDp = 1 << 20;
// A bit of HWCAP2.
constexpr unsigned long kI8mmBit = 1 << 13;

bool has(unsigned long bit) {
#ifdef __linux__
  return (getauxval(AT_HWCAP) & bit) != 0;
#else
  return bit == kAsimd || bit == kAsimdDp;  // every Apple processor
#endif
}

bool i8mm() {
#ifdef __linux__
  return has(kAsimdDp) && (getauxval(AT_HWCAP2) & kI8mmBit) != 0;
#else
  return false;
#endif
}
#endif

// Best first. CMake says which processor family is compiled.
const Set kSets[] = {
#ifdef DIJIANG_X86_64
    {&kAmx, amx},       {&kAvx512Vnni, avx512vnni}, {&kAvx512, avx512},
    {&kAvxVnni, avxvnni}, {&kAvx2, avx2},
#endif
#ifdef DIJIANG_AARCH64
    {&kI8mm, i8mm},
    {&kDotprod, [] { return has(kAsimdDp); }},
    {&kNeon, [] { return has(kAsimd); }},
#endif
    {&kPlain, [] { return true; }},
};

// Of all families, so that a set of another one is told from a misspelt name.
const char* const kNames[] = {"amx",  "avx512vnni", "avx512", "avxvnni",
                              "avx2", "i8mm", "dotprod", "neon", "plain"};

struct Names {
  char text[64] = "";

  Names() {
#ifdef DIJIANG_X86_64
    __builtin_cpu_init();
#endif
    for (const Set& set : kSets) {
      if (!set.here()) continue;
      if (*text) std::strcat(text, " ");
      std::strcat(text, set.kernels->name);
    }
  }
};

Choice choose() {
  const char* names = isa_names();
  const char* asked = std::getenv("DIJIANG_ISA");
  for (const Set& set : kSets)
    if (set.here() && (!asked || !*asked || !std::strcmp(asked, set.kernels->name)))
      return {set.kernels, nullptr};
  bool known = false;
  for (const char* name : kNames) known |= !std::strcmp(asked, name);
  static char error[256];
  std::snprintf(error, sizeof error, "DIJIANG_ISA=%.40s is %s, expected one of: %s; set one of them or unset it",
                asked, known ? "an instruction set that this processor lacks" : "no instruction set", names);
  return {nullptr, error};
}

}  // namespace

const char* isa_names() {
  static const Names names;
  return names.text;
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace dijiang
