// GPTQ (arXiv 2210.17323): a weight rounded one input after the other; what one loses is taken up by those
// that follow. The twin in Python is `dijiang.graph.rounding.round_gptq_plain`.
#pragma once

#include <cstdint>

#include "step.h"

namespace dijiang {

constexpr int64_t kOutputsTogether = 16;

// As `dijiang.graph.rounding.ScaleType` numbers them.
enum class ScaleType : int64_t { kFloat32, kBfloat16, kFloat16 };

struct Gptq {
  int64_t outputs, inputs, block, bits;  // inputs: whole blocks
  const float* upper;       // [inputs, inputs], U^T U = (second moment of the inputs)^-1
  const float* importance;  // [inputs], the moment's diagonal
  float* left;              // [outputs, inputs]: the weight; then the errors, as `upper` carries them on
  uint8_t* codes;           // [outputs, inputs], offset by 2^(bits-1)
  float* scales;            // [outputs, inputs / block]
  ScaleType scale_type;     // what scales are rounded to; codes fit them
};

}  // namespace dijiang
