// The inputs of a `RecurrentStep`, on a CPU and on a GPU: their places, and whether their sizes go together.
#pragma once

#include "operators.h"
#include "step.h"

namespace dijiang {

enum Input { kPacked, kProjection, kLogDecay, kMask, kState, kWeight, kBias, kCos, kSin, kScales, kCount };

// What a node says of itself.
struct StepAttributes {
  int64_t heads = 0, groups = 0, activation = 0;
  float epsilon = 0.0f;

  ort::Status* read(const ort::Api& api, const ort::Info* info) {
    CHECK(api.attribute(info, "num_heads", &heads));
    CHECK(api.attribute(info, "kv_num_heads", &groups));
    CHECK(api.attribute(info, "activation", &activation));
    if (activation && !is_activation(activation))
      return api.fail("RecurrentStep: unknown activation; this library is older than the graph; install a newer dijiang");
    if (groups < 1 || heads < groups || heads % groups)
      return api.fail("RecurrentStep: num_heads and kv_num_heads do not go together");
    return api.attribute(info, "epsilon", &epsilon);
  }
};

constexpr int64_t kMostChannels = int64_t{1} << 40;

// The sizes of `step`, and `data` of `inputs` inputs, the first kCount of which are those of Input. A graph may come
// from anybody: nothing outside of its tensors is read.
template <class AnyStep>
ort::Status* read_inputs(const ort::Api& api, const ort::Context* context, const StepAttributes& node, AnyStep& step,
                         float** data, size_t inputs, int64_t state[4]) {
  for (size_t i = 0; i < inputs; i++) CHECK(data_of(api, context, i, &data[i]));
  int64_t packed[3], angles[3] = {0, 0, 0};
  constexpr const char* kRank = "RecurrentStep: rank";
  CHECK(dims_of(api, context, kPacked, packed, 3, kRank));
  CHECK(dims_of(api, context, kState, state, 4, kRank));
  if (data[kCos]) CHECK(dims_of(api, context, kCos, angles, 3, kRank));
  const int64_t heads = node.heads, groups = node.groups, size = state[2], rows = packed[0] * packed[1];
  // No more heads than channels, neither of them beyond any memory, and no larger ones than there is room for: then no
  // product here overflows.
  // Whether there is a state for each sequence, is for the caller to say.
  if (heads > packed[2] || packed[2] > kMostChannels || size < 1 || size > kLongestHead || state[1] != groups ||
      state[3] != size)
    return api.fail("RecurrentStep: shapes of packed and state");
  const int64_t mlp = packed[2] - (2 * heads + 2 * groups) * size;
  if (mlp < 0 || (mlp > 0 && !node.activation)) return api.fail("RecurrentStep: shapes of packed and state");
  if (2 * angles[2] > size || !data[kCos] != !data[kSin]) return api.fail("RecurrentStep: rotary angles");
  const struct {
    size_t input;
    int64_t numbers;
  } sizes[] = {
      {kProjection, size * size}, {kLogDecay, rows * groups},  {kMask, rows},
      {kWeight, heads * size},    {kBias, heads * size},       {kCos, rows * angles[2]},
      {kSin, rows * angles[2]},   {kScales, rows * (heads + groups)}, {kCount, packed[2]},
  };
  for (const auto& [input, numbers] : sizes)
    if (input < inputs && (input < kCos || data[input]))
      CHECK(expect_count(api, context, input, numbers, "RecurrentStep: sizes of its inputs"));
  step.batch = packed[0], step.tokens = packed[1];
  step.heads = heads, step.groups = groups, step.size = size, step.rotary = 2 * angles[2];
  step.mlp = mlp, step.activation = node.activation, step.epsilon = node.epsilon;
  return nullptr;
}

}  // namespace dijiang
