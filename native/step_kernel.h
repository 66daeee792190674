// The step, written once and compiled by each file of isa/ with the flags of its instruction set.
//
// Loops are plain: the compiler makes vector code of them. Elements are independent, and a reduction has
// the same lanes in the same order everywhere, so the width of a register changes no bit.
#pragma once

#include "arithmetic.h"
#include "step.h"

namespace dijiang {
namespace {

// Sums kept side by side, so that a reduction fills the widest vector register.
constexpr int kLanes = 16;

// Lane l takes x[l], x[l + 16], ...; then halves are joined until one is left.
template <class Take, class Join>
DIJIANG_INLINE float reduce(Take take, Join join, float start, const float* x, int64_t n) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; l++) lanes[l] = start;
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int l = 0; l < kLanes; l++) lanes[l] = take(lanes[l], x[i + l]);
  for (int l = 0; l < kLanes; l++)
    if (whole + l < n) lanes[l] = take(lanes[l], x[whole + l]);
  for (int l = 0; l < 8; l++) lanes[l] = join(lanes[l], lanes[l + 8]);
  for (int l = 0; l < 4; l++) lanes[l] = join(lanes[l], lanes[l + 4]);
  return join(join(lanes[0], lanes[2]), join(lanes[1], lanes[3]));
}

// Columns [from, from + V kWide) of y[r] = x[r]^T M, R vectors at once. Sums stay in registers.
template <int R, int V>
DIJIANG_INLINE void multiply_columns(const float* __restrict matrix, int64_t size, int64_t from,
                                     const float* const* x, float* const* y) {
  Wide sums[R][V] = {};
  for (int64_t i = 0; i < size; i++)
    for (int v = 0; v < V; v++) {
      const Wide line = wide(matrix + i * size + from + v * kWide);
      for (int r = 0; r < R; r++) sums[r][v] = fused(x[r][i], line, sums[r][v]);
    }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(y[r] + from + v * kWide, sums[r][v]);
}

// y[r] = x[r]^T M, M [size, size].
template <int R>
DIJIANG_INLINE void multiply_matrix(const float* __restrict matrix, int64_t size, const float* const* x,
                                    float* const* y) {
  constexpr int several = R > 2 ? 2 : 4;
  int64_t from = 0;
  for (; from + several * kWide <= size; from += several * kWide) multiply_columns<R, several>(matrix, size, from, x, y);
  for (; from + kWide <= size; from += kWide) multiply_columns<R, 1>(matrix, size, from, x, y);
  for (int r = 0; r < R; r++) {
    for (int64_t j = from; j < size; j++) y[r][j] = 0.0f;
    for (int64_t i = 0; i < size; i++)
      for (int64_t j = from; j < size; j++) y[r][j] = fused(x[r][i], matrix[i * size + j], y[r][j]);
  }
}

// One head of one token, and what its features are multiplied by.
struct Head {
  const float* x;
  int64_t row;
  float scale;
};

// Heads whose features are made together, so that the projection is read once for all of them.
constexpr int kHeadsTogether = 4;

// features = softmax(rotated(x) P) * scale, of R heads. `fixed`: the head size where the compiler may know it.
template <int fixed, int R>
DIJIANG_INLINE void feature_map(const Step& s, const Head* heads, float (*features)[fixed ? fixed : kLongestHead]) {
  constexpr int64_t room = fixed ? fixed : kLongestHead;
  const int64_t size = fixed ? fixed : s.size, half = s.rotary / 2;
  float rotated[R][room];
  const float* from[R];
  float* to[R];
  for (int r = 0; r < R; r++) {
    const float* __restrict x = heads[r].x;
    float* __restrict z = rotated[r];
    for (int64_t i = 0; i < half; i++) {
      const float c = s.cos[heads[r].row * half + i], n = s.sin[heads[r].row * half + i];
      z[i] = fused(x[i], c, -(x[half + i] * n));
      z[half + i] = fused(x[half + i], c, x[i] * n);
    }
    for (int64_t i = 2 * half; i < size; i++) z[i] = x[i];
    from[r] = z, to[r] = features[r];
  }
  multiply_matrix<R>(s.projection, size, from, to);
  for (int r = 0; r < R; r++) {
    float* __restrict y = features[r];
    const float top = reduce(larger, larger, y[0], y, size);
    for (int64_t j = 0; j < size; j++) y[j] = exponential(y[j] - top);
    const float factor = heads[r].scale / reduce(add, add, 0.0f, y, size);
    for (int64_t j = 0; j < size; j++) y[j] *= factor;
  }
}

// Columns [from, from + V kWide) of S = decay S + k v^T and of o = q^T S, in one reading of S.
template <int V>
DIJIANG_INLINE void advance_columns(float* __restrict state, int64_t size, int64_t from, float decay,
                                    const float* k, const float* v, const float* q, float* out) {
  Wide values[V], sums[V] = {};
  for (int c = 0; c < V; c++) values[c] = wide(v + from + c * kWide);
  for (int64_t i = 0; i < size; i++)
    for (int c = 0; c < V; c++) {
      float* line = state + i * size + from + c * kWide;
      const Wide updated = fused(k[i], values[c], wide(line) * decay);
      store(line, updated);
      sums[c] = fused(q[i], updated, sums[c]);
    }
  for (int c = 0; c < V; c++) store(out + from + c * kWide, sums[c]);
}

DIJIANG_INLINE void advance(float* __restrict state, int64_t size, float decay, const float* k, const float* v,
                            const float* q, float* out) {
  int64_t from = 0;
  for (; from + 4 * kWide <= size; from += 4 * kWide) advance_columns<4>(state, size, from, decay, k, v, q, out);
  for (; from + kWide <= size; from += kWide) advance_columns<1>(state, size, from, decay, k, v, q, out);
  for (int64_t j = from; j < size; j++) {
    float sum = 0.0f;
    for (int64_t i = 0; i < size; i++) {
      float& at = state[i * size + j];
      at = fused(k[i], v[j], decay * at);
      sum = fused(q[i], at, sum);
    }
    out[j] = sum;
  }
}

// o = q^T S, in the order of `advance`.
DIJIANG_INLINE void read_out(const float* state, int64_t size, const float* q, float* out) {
  multiply_matrix<1>(state, size, &q, &out);
}

// The heads of a token that share a state: its key, then its queries. Token after token.
template <int fixed>
DIJIANG_INLINE void attend_head(const Step& s, int64_t unit) {
  constexpr int64_t room = fixed ? fixed : kLongestHead;
  const int64_t size = fixed ? fixed : s.size, sharing = s.heads / s.groups, parts = 1 + sharing;
  const int64_t sequence = unit / s.groups, group = unit % s.groups;
  const int64_t start = s.first_row(sequence), count = (s.first_row(sequence + 1) - start) * parts;
  float features[kHeadsTogether][room], key[room];
  float* state = s.state + unit * size * size;
  for (int64_t first = 0; first < count; first += kHeadsTogether) {
    const int64_t left = count - first, n = left < kHeadsTogether ? left : kHeadsTogether;
    Head heads[kHeadsTogether];
    for (int64_t i = 0; i < n; i++) {
      const int64_t row = start + (first + i) / parts, part = (first + i) % parts;
      const int64_t head = part ? group * sharing + part - 1 : s.heads + group;
      const float scale = s.scales ? s.scales[row * (s.heads + s.groups) + head] : 1.0f;
      heads[i] = {s.packed + row * s.packed_width() + head * size, row, part ? scale : s.mask[row] * scale};
    }
    if (n == 4) {
      feature_map<fixed, 4>(s, heads, features);
    } else {
      if (n >= 2) feature_map<fixed, 2>(s, heads, features);
      if (n % 2) feature_map<fixed, 1>(s, heads + n - 1, features + n - 1);
    }
    for (int64_t i = 0; i < n; i++) {
      const int64_t row = heads[i].row, part = (first + i) % parts;
      float* out = s.output + row * s.output_width() + (group * sharing + part - 1) * size;
      if (part == 0)
        std::memcpy(key, features[i], size * sizeof(float));
      else if (part > 1)
        read_out(state, size, features[i], out);
      else
        advance(state, size, exact_exponential(s.log_decay[row * s.groups + group]), key,
                s.packed + row * s.packed_width() + (s.heads + s.groups + group) * size, features[i], out);
    }
  }
}

template <class Function>
DIJIANG_INLINE void apply(Function f, const float* __restrict x, float* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = f(x[i]);
}

void activate(int64_t number, const float* x, float* y, int64_t n) {
  switch (number) {
#define APPLY(name, number) \
  case number:              \
    apply(name, x, y, n);   \
    break;
    DIJIANG_ACTIVATIONS(APPLY)
#undef APPLY
  }
}

// From so many rows on, the threads share the MLP's activation by rows: each reads and writes whole lines of
// memory. Of fewer rows each unit takes its share of the channels.
constexpr int64_t kRowsOfMlp = 4;

// The unit's share of the MLP's channels.
DIJIANG_INLINE void activate_share(const Step& s, int64_t unit) {
  const int64_t sequence = unit / s.groups, group = unit % s.groups;
  const int64_t from = s.mlp * group / s.groups, n = s.mlp * (group + 1) / s.groups - from;
  for (int64_t row = s.first_row(sequence); row < s.first_row(sequence + 1); row++)
    activate(s.activation, s.packed + (row + 1) * s.packed_width() - s.mlp + from,
             s.output + (row + 1) * s.output_width() - s.mlp + from, n);
}

void attend(const Step& s, int64_t unit) {
  switch (s.size) {
    case 64: attend_head<64>(s, unit); break;
    case 80: attend_head<80>(s, unit); break;
    case 128: attend_head<128>(s, unit); break;
    default: attend_head<0>(s, unit);
  }
  if (s.rows() < kRowsOfMlp) activate_share(s, unit);
}

void finish(const Step& s, int64_t row) {
  const int64_t n = s.heads, d = s.width();
  const float* gate = s.packed + row * s.packed_width() + (s.heads + 2 * s.groups) * s.size;
  float* y = s.output + row * s.output_width();
  // num_groups = head size: each group is `heads` neighbouring channels. A sum of squares that
  // overflows gives 1 / inf = 0, as the model asks.
  for (int64_t c = 0; c < d; c += n) {
    const float mean = reduce(add, add, 0.0f, y + c, n) / n;
    for (int64_t i = 0; i < n; i++) y[c + i] -= mean;
    const float squares = reduce(add_square, add, 0.0f, y + c, n);
    const float inverse = 1.0f / __builtin_sqrtf(squares / n + s.epsilon);
    for (int64_t i = 0; i < n; i++) y[c + i] *= inverse;
  }
  for (int64_t c = 0; c < d; c++) y[c] = fused(y[c], s.weight[c], s.bias[c]) * silu(gate[c]);
  if (s.rows() >= kRowsOfMlp) activate(s.activation, gate + d, y + d, s.mlp);
}

void multiply_add(const float* a, const float* b, const float* c, float* out, int64_t n) {
  int64_t i = 0;
#ifdef __wasm_simd128__
  for (; i + 4 <= n; i += 4)
    wasm_v128_store(out + i, fused(wasm_v128_load(a + i), wasm_v128_load(b + i), wasm_v128_load(c + i)));
#endif
  for (; i < n; i++) out[i] = fused(a[i], b[i], c[i]);
}

}  // namespace
}  // namespace dijiang
