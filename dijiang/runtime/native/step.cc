#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// Compiled once for each instruction set; the processor picks at load.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_PROCESSOR \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace dijiang {
namespace {

// Sums kept side by side, so that a reduction fills a vector register.
constexpr int kLanes = 16;

// exp(x) within 2 ulp: 2^n times a polynomial in the rest (coefficients as in Cephes expf).
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  float r = x - n * 0.693145752f;
  r -= n * 1.42860677e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// erf(x), absolute error below 1.5e-7 (Abramowitz and Stegun 7.1.26).
inline float error_function(float x) {
  const float a = std::fabs(x);
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return std::copysign(1.0f - p * t * exponential(-a * a), x);
}

inline float relu(float x) { return std::max(x, 0.0f); }
inline float silu(float x) { return x / (1.0f + exponential(-x)); }
inline float gelu(float x) { return 0.5f * x * (1.0f + error_function(x * 0.707106781f)); }
inline float gelu_tanh(float x) {
  return x / (1.0f + exponential(-1.595769122f * (x + 0.044715f * x * x * x)));
}

template <class Function>
inline void apply(Function f, const float* __restrict x, float* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = f(x[i]);
}

// join(... join(join(start, map(x[0])), map(x[1])) ...) in any order.
template <class Map, class Join>
inline float reduce(Map map, Join join, float start, const float* x, int64_t n) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; l++) lanes[l] = start;
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int l = 0; l < kLanes; l++) lanes[l] = join(lanes[l], map(x[i + l]));
  float result = start;
  for (int l = 0; l < kLanes; l++) result = join(result, lanes[l]);
  for (int64_t i = whole; i < n; i++) result = join(result, map(x[i]));
  return result;
}

inline float same(float x) { return x; }
inline float square(float x) { return x * x; }
inline float add(float a, float b) { return a + b; }
inline float larger(float a, float b) { return a > b ? a : b; }

// features = softmax(rotated(x) P) * scale. `fixed`: the head size where the compiler may know it.
template <int fixed>
inline void feature_map(const Step& s, const float* __restrict x, int64_t row, float scale,
                        float* __restrict features) {
  constexpr int64_t room = fixed ? fixed : kLongestHead;
  const int64_t size = fixed ? fixed : s.size, half = s.rotary / 2;
  float z[room], y[room];
  for (int64_t i = 0; i < half; i++) {
    const float c = s.cos[row * half + i], n = s.sin[row * half + i];
    z[i] = x[i] * c - x[half + i] * n;
    z[half + i] = x[half + i] * c + x[i] * n;
  }
  for (int64_t i = 2 * half; i < size; i++) z[i] = x[i];
  for (int64_t j = 0; j < size; j++) y[j] = 0.0f;
  for (int64_t i = 0; i < size; i++) {
    const float* __restrict p = s.projection + i * size;
    for (int64_t j = 0; j < size; j++) y[j] += z[i] * p[j];
  }
  const float top = reduce(same, larger, y[0], y, size);
  for (int64_t j = 0; j < size; j++) y[j] = exponential(y[j] - top);
  const float factor = scale / reduce(same, add, 0.0f, y, size);
  for (int64_t j = 0; j < size; j++) features[j] = y[j] * factor;
}

// S = decay S + k v^T and o = q^T S in one reading of S.
template <int fixed>
inline void advance(float* __restrict state, int64_t runtime_size, float decay,
                    const float* __restrict k, const float* __restrict v, const float* __restrict q,
                    float* __restrict out) {
  constexpr int64_t room = fixed ? fixed : kLongestHead;
  const int64_t size = fixed ? fixed : runtime_size;
  float o[room];
  for (int64_t j = 0; j < size; j++) o[j] = 0.0f;
  for (int64_t i = 0; i < size; i++) {
    float* __restrict line = state + i * size;
    for (int64_t j = 0; j < size; j++) {
      line[j] = decay * line[j] + k[i] * v[j];
      o[j] += q[i] * line[j];
    }
  }
  std::memcpy(out, o, size * sizeof(float));
}

template <int fixed>
inline void read_out(const float* __restrict state, int64_t size, const float* __restrict q,
                     float* __restrict out) {
  for (int64_t j = 0; j < size; j++) out[j] = 0.0f;
  for (int64_t i = 0; i < size; i++)
    for (int64_t j = 0; j < size; j++) out[j] += q[i] * state[i * size + j];
}

template <int fixed>
inline void attend_head(const Step& s, int64_t unit) {
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
    feature_map<fixed>(s, heads + key * size, row, kept, k);
    for (int64_t r = 0; r < sharing; r++) {
      feature_map<fixed>(s, heads + (query + r) * size, row, scales ? scales[query + r] : 1.0f, q);
      if (r == 0)
        advance<fixed>(state, size, std::exp(s.log_decay[row * s.groups + group]), k, v, q, out);
      else
        read_out<fixed>(state, size, q, out + r * size);
    }
  }
}

inline void activate(const Step& s, int64_t unit) {
  const int64_t sequence = unit / s.groups, group = unit % s.groups;
  const int64_t from = s.mlp * group / s.groups, n = s.mlp * (group + 1) / s.groups - from;
  for (int64_t t = 0; t < s.tokens; t++) {
    const int64_t row = sequence * s.tokens + t;
    const float* x = s.packed + (row + 1) * s.packed_width() - s.mlp + from;
    float* y = s.output + (row + 1) * s.output_width() - s.mlp + from;
    switch (s.activation) {
      case kRelu: apply(relu, x, y, n); break;
      case kSilu: apply(silu, x, y, n); break;
      case kGelu: apply(gelu, x, y, n); break;
      case kGeluTanh: apply(gelu_tanh, x, y, n); break;
      case kNone: break;
    }
  }
}

}  // namespace

FOR_EACH_PROCESSOR void attend(const Step& s, int64_t unit) {
  switch (s.size) {
    case 64: attend_head<64>(s, unit); break;
    case 80: attend_head<80>(s, unit); break;
    case 128: attend_head<128>(s, unit); break;
    default: attend_head<0>(s, unit);
  }
  activate(s, unit);
}

FOR_EACH_PROCESSOR void finish(const Step& s, int64_t row) {
  const int64_t n = s.heads, d = s.width();
  const float* gate = s.packed + row * s.packed_width() + (s.heads + 2 * s.groups) * s.size;
  float* y = s.output + row * s.output_width();
  // num_groups = head size: each group is `heads` neighbouring channels. A sum of squares that
  // overflows gives 1 / inf = 0, as the model asks.
  for (int64_t c = 0; c < d; c += n) {
    const float mean = reduce(same, add, 0.0f, y + c, n) / n;
    for (int64_t i = 0; i < n; i++) y[c + i] -= mean;
    const float squares = reduce(square, add, 0.0f, y + c, n);
    const float inverse = 1.0f / std::sqrt(squares / n + s.epsilon);
    for (int64_t i = 0; i < n; i++) y[c + i] *= inverse;
  }
  for (int64_t c = 0; c < d; c++) y[c] = (y[c] * s.weight[c] + s.bias[c]) * silu(gate[c]);
}

}  // namespace dijiang
