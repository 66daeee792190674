// The norm, written once and compiled by each file of isa/, as step_kernel.h.
#pragma once

#include "norm.h"
#include "step_kernel.h"

namespace dijiang {
namespace {

void add_norm(const Norm& n, int64_t row) {
  const int64_t width = n.width, at = row * width;
  const float* __restrict a = n.a + at;
  const float* __restrict b = n.b + at;
  float* __restrict sum = n.sum + at;
  float* __restrict y = n.output + at;
  for (int64_t i = 0; i < width; i++) sum[i] = a[i] + b[i];
  const float mean = n.centred ? reduce(add, add, 0.0f, sum, width) / width : 0.0f;
  for (int64_t i = 0; i < width; i++) y[i] = sum[i] - mean;
  const float squares = reduce(add_square, add, 0.0f, y, width);
  const float inverse = 1.0f / __builtin_sqrtf(squares / width + n.epsilon);
  if (n.bias)
    for (int64_t i = 0; i < width; i++) y[i] = fused(y[i] * inverse, n.weight[i], n.bias[i]);
  else
    for (int64_t i = 0; i < width; i++) y[i] = y[i] * inverse * n.weight[i];
}

}  // namespace
}  // namespace dijiang
