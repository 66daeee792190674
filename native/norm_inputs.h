// The inputs of an `AddNorm`, on a CPU and on a GPU: what a node says of itself, and whether their sizes go together.
#pragma once

#include "operators.h"

namespace dijiang {

struct NormAttributes {
  int64_t centred = 0;
  float epsilon = 0.0f;

  ort::Status* read(const ort::Api& api, const ort::Info* info) {
    CHECK(api.attribute(info, "centred", &centred));
    return api.attribute(info, "epsilon", &epsilon);
  }
};

// `data` of `inputs` inputs: a, b, weight, and where they are there the norm's bias and b's; and the shape of a.
inline ort::Status* read_norm_inputs(const ort::Api& api, const ort::Context* context, float** data, size_t inputs,
                                     int64_t shape[3]) {
  for (size_t i = 0; i < inputs; i++) CHECK(data_of(api, context, i, &data[i]));
  CHECK(dims_of(api, context, 0, shape, 3, "AddNorm: rank of the input, expected 3"));
  if (shape[2] < 1) return api.fail("AddNorm: no channels");
  const int64_t width = shape[2], all = shape[0] * shape[1] * width;
  for (size_t i = 1; i < inputs; i++)
    if (i < 3 || data[i]) CHECK(expect_count(api, context, i, i == 1 ? all : width, "AddNorm: sizes of its inputs"));
  return nullptr;
}

}  // namespace dijiang
