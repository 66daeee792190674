// One layer's recurrence over T tokens, from the projections to what goes into the output projection.
//
// B sequences, H query heads, G key/value heads, head size K, d = H K, F channels of an MLP beside it.
// All arrays are float32 in C order. Equations: docs/adr/0010-native-operator.md.
#pragma once

#include <cstdint>

namespace dijiang {

constexpr int64_t kLongestHead = 512;

enum Activation : int64_t { kNone = 0, kRelu = 1, kSilu = 2, kGelu = 3, kGeluTanh = 4 };

struct Step {
  int64_t batch, tokens, heads, groups, size, rotary, mlp;
  Activation activation;
  float epsilon;
  const float* packed;       // [B, T, (H + G) K | G K | d | F]: q and k, v, gate, MLP-up
  const float* cos;          // [B, T, rotary / 2], null: no rotary embedding
  const float* sin;
  const float* projection;   // [K, K]
  const float* scales;       // [B, T, H + G] of the features, null: 1
  const float* log_decay;    // [B, T, G]
  const float* mask;         // [B, T], 0: padding
  const float* weight;       // [d] of the group norm
  const float* bias;         // [d]
  float* state;              // [B, G, K, K], changed in place
  float* output;             // [B, T, d | F]

  int64_t width() const { return heads * size; }
  int64_t packed_width() const { return (2 * heads + 2 * groups) * size + mlp; }
  int64_t output_width() const { return width() + mlp; }
  // Calls of attend and of finish, which may run at once among themselves.
  int64_t units() const { return batch * groups; }
  int64_t rows() const { return batch * tokens; }
};

// One key/value head of one sequence: rotary embedding, feature map, recurrence; and its share of the
// MLP's activation.
void attend(const Step& step, int64_t unit);

// One token: group norm over its heads, times silu(gate).
void finish(const Step& step, int64_t row);

}  // namespace dijiang
