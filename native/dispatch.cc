#include "dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(DIJIANG_AARCH64) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace dijiang {
namespace {

struct Set {
  const Kernels* kernels;
  bool (*here)();
};

// Best first. CMake says which processor family is compiled.
const Set kSets[] = {
#ifdef DIJIANG_X86_64
    {&kAvx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
     }},
    {&kAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
#ifdef DIJIANG_AARCH64
    {&kNeon,
     [] {
#ifdef __linux__
       return (getauxval(AT_HWCAP) & (1 << 1) /* HWCAP_ASIMD */) != 0;
#else
       return true;
#endif
     }},
#endif
    {&kPlain, [] { return true; }},
};

// Of all families, so that a set of another one is told from a misspelt name.
const char* const kNames[] = {"avx512", "avx2", "neon", "plain"};

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
