// A residual sum and the norm that reads it, row by row.
#pragma once

#include <cstdint>

namespace dijiang {

// y = (s - mean(s)) / sqrt(variance(s) + epsilon) * weight + bias, s = a + b. RMS norms leave the mean out.
struct Norm {
  int64_t rows, width;
  bool centred;
  float epsilon;
  const float* a;       // [rows, width]
  const float* b;
  const float* weight;  // [width]
  const float* bias;    // [width], null: none
  float* output;        // [rows, width]: y
  float* sum;           // [rows, width]: s
};

}  // namespace dijiang
