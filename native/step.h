// One layer's recurrence over T tokens, from the projections to what goes into the output projection.
//
// [B, T] tokens of S sequences, H query heads, G key/value heads, head size K, d = H K, F channels of an MLP beside
// it. Read row after row, the tokens belong to one sequence after the other: T to each of B = S, or as `starts` says.
// All arrays are float32 in C order. Equations: docs/adr/0010-native-operator.md.
#pragma once

#include <cstdint>

namespace dijiang {

constexpr int64_t kLongestHead = 512;

// Every activation: its name and the number that graphs store, which never changes. 0: no MLP.
#define DIJIANG_ACTIVATIONS(ROW) \
  ROW(relu, 1)                   \
  ROW(silu, 2)                   \
  ROW(gelu, 3)                   \
  ROW(gelu_tanh, 4)

// Inlined without exception: a copy that one instruction set compiled must not be linked into another.
#define DIJIANG_INLINE inline __attribute__((always_inline))

DIJIANG_INLINE bool is_activation(int64_t asked) {
#define IS(name, number) asked == number ||
  return DIJIANG_ACTIVATIONS(IS) false;
#undef IS
}

struct Step {
  int64_t batch, tokens, sequences, heads, groups, size, rotary, mlp;
  int64_t activation;        // a number of DIJIANG_ACTIVATIONS, or 0
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
  const int64_t* starts;     // [S + 1] rows where the tokens of each sequence begin, null: T to each
  float* state;              // [S, G, K, K], changed in place
  float* output;             // [B, T, d | F]

  DIJIANG_INLINE int64_t width() const { return heads * size; }
  DIJIANG_INLINE int64_t packed_width() const { return (2 * heads + 2 * groups) * size + mlp; }
  DIJIANG_INLINE int64_t output_width() const { return width() + mlp; }
  // Calls of attend and of finish, which may run at once among themselves.
  DIJIANG_INLINE int64_t units() const { return sequences * groups; }
  DIJIANG_INLINE int64_t rows() const { return batch * tokens; }
  // The first row of a sequence; of S: the end of all rows.
  DIJIANG_INLINE int64_t first_row(int64_t sequence) const { return starts ? starts[sequence] : sequence * tokens; }
};

struct MatMul;  // matmul.h
struct Norm;    // norm.h
struct Gptq;    // gptq.h

// The same functions for one instruction set. All sets give the same bits.
struct Kernels {
  const char* name;
  // One key/value head of one sequence: rotary embedding, feature map, recurrence; and of few rows its share
  // of the MLP's activation.
  void (*attend)(const Step& step, int64_t unit);
  // One token: group norm over its heads, times silu(gate); and of many rows the MLP's activation.
  void (*finish)(const Step& step, int64_t row);
  // y[i] = f(x[i]) of the activation with this number.
  void (*activate)(int64_t number, const float* x, float* y, int64_t n);
  // out[i] = a[i] b[i] + c[i], rounded once.
  void (*multiply_add)(const float* a, const float* b, const float* c, float* out, int64_t n);
  // A residual sum and its norm, one row.
  void (*add_norm)(const Norm& n, int64_t row);
  // The input of a matmul: codes, scales and sums of one row.
  void (*round)(const MatMul& m, int64_t row);
  // All rows of one unit of its outputs.
  void (*multiply)(const MatMul& m, int64_t unit);
  // Outputs of one tile of 16, rounded; room: (inputs + block) x 16 numbers.
  void (*gptq)(const Gptq& g, int64_t tile, float* room);
};

// Those of this processor family are linked.
extern const Kernels kPlain, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAmx, kNeon, kDotprod, kI8mm, kWasm;

}  // namespace dijiang
