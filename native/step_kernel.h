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

// features = softmax(rotated(x) P) * scale. `fixed`: the head size where the compiler may know it.
template <int fixed>
DIJIANG_INLINE void feature_map(const Step& s, const float* __restrict x, int64_t row, float scale,
                                float* __restrict features) {
  constexpr int64_t room = fixed ? fixed : kLongestHead;
  const int64_t size = fixed ? fixed : s.size, half = s.rotary / 2;
  float z[room], y[room];
  for (int64_t i = 0; i < half; i++) {
    const float c = s.cos[row * half + i], n = s.sin[row * half + i];
    z[i] = fused(x[i], c, -(x[half + i] * n));
    z[half + i] = fused(x[half + i], c, x[i] * n);
  }
  for (int64_t i = 2 * half; i < size; i++) z[i] = x[i];
  for (int64_t j = 0; j < size; j++) y[j] = 0.0f;
  for (int64_t i = 0; i < size; i++) {
    const float* __restrict p = s.projection + i * size;
    for (int64_t j = 0; j < size; j++) y[j] = fused(z[i], p[j], y[j]);
  }
  const float top = reduce(larger, larger, y[0], y, size);
  for (int64_t j = 0; j < size; j++) y[j] = exponential(y[j] - top);
  const float factor = scale / reduce(add, add, 0.0f, y, size);
  for (int64_t j = 0; j < size; j++) features[j] = y[j] * factor;
}

// S = decay S + k v^T and o = q^T S in one reading of S.
template <int fixed>
DIJIANG_INLINE void advance(float* __restrict state, int64_t runtime_size, float decay,
                            const float* __restrict k, const float* __restrict v,
                            const float* __restrict q, float* __restrict out) {
  constexpr int64_t room = fixed ? fixed : kLongestHead;
  const int64_t size = fixed ? fixed : runtime_size;
  float o[room];
  for (int64_t j = 0; j < size; j++) o[j] = 0.0f;
  for (int64_t i = 0; i < size; i++) {
    float* __restrict line = state + i * size;
    for (int64_t j = 0; j < size; j++) {
      line[j] = fused(k[i], v[j], decay * line[j]);
      o[j] = fused(q[i], line[j], o[j]);
    }
  }
  std::memcpy(out, o, size * sizeof(float));
}

// o = q^T S, in the order of `advance`.
DIJIANG_INLINE void read_out(const float* __restrict state, int64_t size, const float* __restrict q,
                             float* __restrict out) {
  for (int64_t j = 0; j < size; j++) out[j] = 0.0f;
  for (int64_t i = 0; i < size; i++)
    for (int64_t j = 0; j < size; j++) out[j] = fused(q[i], state[i * size + j], out[j]);
}

template <int fixed>
DIJIANG_INLINE void attend_head(const Step& s, int64_t unit) {
  constexpr int64_t room = fixed ? fixed : kLongestHead;
  const int64_t size = fixed ? fixed : s.size, sharing = s.heads / s.groups;
  const int64_t sequence = unit / s.groups, group = unit % s.groups;
  float k[room], q[room];
  float* state = s.state + unit * size * size;
  for (int64_t t = 0; t < s.tokens; t++) {
    const int64_t row = sequence * s.tokens + t;
    const float* heads = s.packed + row * s.packed_width();
    const float* v = heads + (s.heads + s.groups + group) * size;
    const float* scales = s.scales ? s.scales + row * (s.heads + s.groups) : nullptr;
    float* out = s.output + row * s.output_width() + group * sharing * size;
    const int64_t key = s.heads + group, query = group * sharing;
    const float kept = s.mask[row] * (scales ? scales[key] : 1.0f);
    const float decay = exact_exponential(s.log_decay[row * s.groups + group]);
    feature_map<fixed>(s, heads + key * size, row, kept, k);
    for (int64_t r = 0; r < sharing; r++) {
      feature_map<fixed>(s, heads + (query + r) * size, row, scales ? scales[query + r] : 1.0f, q);
      if (r == 0)
        advance<fixed>(state, size, decay, k, v, q, out);
      else
        read_out(state, size, q, out + r * size);
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

// The unit's share of the MLP's channels.
DIJIANG_INLINE void activate_share(const Step& s, int64_t unit) {
  const int64_t sequence = unit / s.groups, group = unit % s.groups;
  const int64_t from = s.mlp * group / s.groups, n = s.mlp * (group + 1) / s.groups - from;
  for (int64_t t = 0; t < s.tokens; t++) {
    const int64_t row = sequence * s.tokens + t;
    activate(s.activation, s.packed + (row + 1) * s.packed_width() - s.mlp + from,
             s.output + (row + 1) * s.output_width() - s.mlp + from, n);
  }
}

void attend(const Step& s, int64_t unit) {
  switch (s.size) {
    case 64: attend_head<64>(s, unit); break;
    case 80: attend_head<80>(s, unit); break;
    case 128: attend_head<128>(s, unit); break;
    default: attend_head<0>(s, unit);
  }
  activate_share(s, unit);
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
}

void multiply_add(const float* a, const float* b, const float* c, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = fused(a[i], b[i], c[i]);
}

}  // namespace
}  // namespace dijiang
