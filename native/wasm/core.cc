// The operators of the domain `dijiang` for a browser: the kernels that ONNX Runtime is given, on one thread. web/nodes.js
// calls them, after it compared the shapes.
#include "../matmul.h"
#include "../norm.h"
#include "../step.h"
#include "exported.h"

using namespace dijiang;

// out[i] = a[i] b[i] + c[i], rounded once: what all instruction sets build on.
EXPORT void multiply_add(int n, const float* a, const float* b, const float* c, float* out) {
  kWasm.multiply_add(a, b, c, out, n);
}

// Whether this engine does so. With plain SIMD each does; what a relaxed multiply-add is, an engine says.
EXPORT int fuses() {
  volatile float one = 1.0f + 1.0f / 4096, less = -1.0f - 1.0f / 2048;  // (1 + e)^2 - 1 - 2 e = e^2
  const float a = one, c = less;
  float out;
  multiply_add(1, &a, &a, &c, &out);
  return out == 1.0f / 4096 / 4096;
}

#define SIZES int inputs, int outputs, int bits, int block, int rotation, int scale_bytes
#define PACKED(data) {inputs, outputs, bits, block, rotation, scale_bytes, data}

// Bytes of a packed weight; 0: the sizes do not go together.
EXPORT uint32_t packed_bytes(SIZES) {
  const Packed weights = PACKED(nullptr);
  return weights.sound() ? weights.tiles() * weights.tile_bytes() : 0;
}

// Packs the tiles of outputs [first, first + count), of which alone codes and scales are there; `first` begins a tile.
// 0: a scale is 0 or no finite number.
EXPORT int pack(SIZES, uint8_t* data, int first, int count, const uint8_t* codes, const uint8_t* scales) {
  Packed weights = PACKED(data);
  weights.data += first / kColumns * weights.tile_bytes();
  weights.outputs = count;
  for (int64_t tile = 0; tile < weights.tiles(); tile++)
    if (!pack_tile(weights, tile, codes, scales)) return 0;
  return 1;
}

// Bytes that `multiply_packed` works in.
EXPORT uint32_t packed_room(SIZES, int rows) {
  const Packed weights = PACKED(nullptr);
  MatMul m{};
  m.weights = &weights, m.rows = rows;
  return m.room();
}

EXPORT void multiply_packed(SIZES, uint8_t* data, int rows, const float* input, const float* bias, float* output,
                            uint8_t* room) {
  const Packed weights = PACKED(data);
  MatMul m{};
  m.weights = &weights, m.rows = rows, m.input = input, m.bias = bias, m.output = output;
  m.use(room);
  for (int64_t row = 0; row < m.rows; row++) kWasm.round(m, row);
  for (int64_t unit = 0; unit < m.units(); unit++) kWasm.multiply(m, unit);
}

EXPORT int is_known_activation(int number) { return is_activation(number); }

// The state is changed in place.
EXPORT void recurrent_step(int batch, int tokens, int heads, int groups, int size, int rotary, int mlp, int activation,
                           float epsilon, const float* packed, const float* projection, const float* log_decay,
                           const float* mask, float* state, const float* weight, const float* bias, const float* cos,
                           const float* sin, const float* scales, float* output) {
  Step s{};
  s.batch = s.sequences = batch, s.tokens = tokens, s.heads = heads, s.groups = groups, s.size = size;
  s.rotary = rotary, s.mlp = mlp;
  s.activation = activation, s.epsilon = epsilon, s.packed = packed, s.projection = projection;
  s.log_decay = log_decay, s.mask = mask, s.state = state, s.weight = weight, s.bias = bias;
  s.cos = cos, s.sin = sin, s.scales = scales, s.output = output;
  for (int64_t unit = 0; unit < s.units(); unit++) kWasm.attend(s, unit);
  for (int64_t row = 0; row < s.rows(); row++) kWasm.finish(s, row);
}

EXPORT int longest_head() { return kLongestHead; }

EXPORT void add_norm(int rows, int width, int centred, float epsilon, const float* a, const float* b,
                     const float* weight, const float* bias, float* output, float* sum) {
  const Norm n{rows, width, centred != 0, epsilon, a, b, weight, bias, output, sum};
  for (int64_t row = 0; row < n.rows; row++) kWasm.add_norm(n, row);
}

// A norm of rows without a residual: `zeros` and `sum` are one row.
EXPORT void norm(int rows, int width, int centred, float epsilon, const float* x, const float* weight, const float* bias,
                 float* output, const float* zeros, float* sum) {
  for (int64_t row = 0; row < rows; row++)
    add_norm(1, width, centred, epsilon, x + row * width, zeros, weight, bias, output + row * width, sum);
}

// y[i] = f(x[i]) of the activation with this number.
EXPORT void activation(int n, int number, const float* x, float* y) { kWasm.activate(number, x, y, n); }
