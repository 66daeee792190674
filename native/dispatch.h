// Which instruction set is used here: the best that the processor has, or what DIJIANG_ISA asks for.
#pragma once

#include "step.h"

namespace dijiang {

struct Choice {
  const Kernels* kernels;  // null: DIJIANG_ISA asks for what cannot be had
  const char* error;       // then why, in one line
};

// Made at the first call, for the life of the process.
const Choice& choice();

// The sets that this processor runs, best first, with spaces between.
const char* isa_names();

}  // namespace dijiang
