// The nodes of ONNX's own domains that a native graph has, in plain loops: nothing here takes long, but `multiply`.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "exported.h"

// A row of `a` begins a_row numbers after the one before, and its numbers are a_column apart; 0: the same one again.
#define BINARY(name, result)                                                                                        \
  EXPORT void name(int rows, int width, const float* a, int a_row, int a_column, const float* b, int b_row,         \
                   int b_column, float* out) {                                                                      \
    for (int r = 0; r < rows; r++)                                                                                  \
      for (int c = 0; c < width; c++) {                                                                             \
        const float x = a[int64_t{r} * a_row + c * a_column], y = b[int64_t{r} * b_row + c * b_column];             \
        out[int64_t{r} * width + c] = result;                                                                       \
      }                                                                                                             \
  }
BINARY(add, x + y)
BINARY(subtract, x - y)
BINARY(times, x* y)
BINARY(divide, x / y)
BINARY(largest, x > y || x != x ? x : y)
BINARY(smallest, x < y || x != x ? x : y)

// Of integers, `b` one number or as many as `a`.
#define INTEGERS(name, operation)                                                                      \
  EXPORT void name##_integers(int n, const int64_t* a, const int64_t* b, int b_column, int64_t* out) { \
    for (int i = 0; i < n; i++) out[i] = a[i] operation b[i * b_column];                               \
  }
INTEGERS(subtract, -)
INTEGERS(times, *)
INTEGERS(divide, /)

// In float64, rounded to float32 once.
#define UNARY(name, result)                                        \
  EXPORT void name(int n, [[maybe_unused]] double alpha, const float* from, float* to) { \
    for (int i = 0; i < n; i++) {                                  \
      const double x = from[i];                                    \
      to[i] = static_cast<float>(result);                          \
    }                                                              \
  }
UNARY(erf_of, std::erf(x))
UNARY(tanh_of, std::tanh(x))
UNARY(sigmoid, 1 / (1 + std::exp(-x)))
UNARY(softplus, std::log1p(std::exp(-std::fabs(x))) + (x > 0 ? x : 0))
UNARY(square_root, std::sqrt(x))
UNARY(leaky, x > 0 ? x : alpha * x)
UNARY(hard_swish, x* std::fmin(std::fmax(x / 6 + 0.5, 0), 1))
UNARY(quick_gelu, x / (1 + std::exp(-alpha * x)))

EXPORT void floats_of_integers(int n, const int64_t* from, float* to) {
  for (int i = 0; i < n; i++) to[i] = static_cast<float>(from[i]);
}

EXPORT void floats_of_bfloats(int n, const uint16_t* from, float* to) {
  for (int i = 0; i < n; i++) {
    const uint32_t bits = uint32_t{from[i]} << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

// Rows of a table; ids are within it.
EXPORT void gather(int n, int width, const float* table, const int64_t* ids, float* out) {
  for (int i = 0; i < n; i++) std::memcpy(out + int64_t{i} * width, table + ids[i] * width, width * sizeof(float));
}

// The same of codes of 8 or 4 bits, offset by half their range, with a scale a block.
EXPORT void gather_codes(int n, int width, int bits, int block, const uint8_t* codes, const int64_t* ids,
                         const float* scales, float* out) {
  const int64_t blocks = (width + block - 1) / block, bytes = int64_t{width} * bits / 8;
  for (int i = 0; i < n; i++) {
    const uint8_t* from = codes + ids[i] * bytes;
    for (int c = 0; c < width; c++) {
      const int code = bits == 8 ? from[c] - 128 : (from[c / 2] >> c % 2 * 4 & 15) - 8;
      out[int64_t{i} * width + c] = static_cast<float>(code) * scales[ids[i] * blocks + c / block];
    }
  }
}

// `width` numbers of each row, from rows of one length to rows of another.
EXPORT void copy_columns(int rows, int width, const float* from, int from_row, float* to, int to_row) {
  for (int r = 0; r < rows; r++)
    std::memcpy(to + int64_t{r} * to_row, from + int64_t{r} * from_row, width * sizeof(float));
}

// The place of the first largest number of each row; the first of all where there is none.
EXPORT void arg_max(int rows, int width, const float* x, int64_t* out) {
  constexpr int kLanes = 16;
  for (int r = 0; r < rows; r++, x += width) {
    float lanes[kLanes];
    for (float& lane : lanes) lane = x[0];
    const int whole = width - width % kLanes;
    for (int c = 0; c < whole; c += kLanes)
      for (int l = 0; l < kLanes; l++) lanes[l] = x[c + l] > lanes[l] ? x[c + l] : lanes[l];
    float top = x[0];
    for (float lane : lanes) top = lane > top ? lane : top;
    for (int c = whole; c < width; c++) top = x[c] > top ? x[c] : top;
    int at = 0;
    while (at + 1 < width && x[at] != top) at++;
    out[r] = x[at] == top ? at : 0;
  }
}

// x [rows, inputs] times weights [inputs, outputs]. Weights are read in their order, several rows of them at once, and for
// every row of x. Products and sums are rounded one by one: the same in every engine, and whatever the rows.
EXPORT void multiply(int rows, int inputs, int outputs, const float* x, const float* weights, float* out) {
  constexpr int kTogether = 8;
  std::memset(out, 0, int64_t{rows} * outputs * sizeof(float));
  for (int k = 0; k < inputs; k += kTogether) {
    const int n = inputs - k < kTogether ? inputs - k : kTogether;
    const float* w = weights + int64_t{k} * outputs;
    for (int r = 0; r < rows; r++) {
      float* __restrict y = out + int64_t{r} * outputs;
      const float* a = x + int64_t{r} * inputs + k;
      if (n == kTogether)
        for (int c = 0; c < outputs; c++) {
          float sum = y[c];
          for (int i = 0; i < kTogether; i++) sum += a[i] * w[int64_t{i} * outputs + c];
          y[c] = sum;
        }
      else
        for (int i = 0; i < n; i++)
          for (int c = 0; c < outputs; c++) y[c] += a[i] * w[int64_t{i} * outputs + c];
    }
  }
}
