// The matmul, written once and compiled by each file of isa/, which defines `Lanes` before it:
//
//   Codes: a vector of 64 codes.  Sums: 16 integers, in any number of parts.  Floats: 16 numbers.
//   Inputs: 4 integers of a row, repeated.
//   kOffset: what an 8-bit code is above its value.  kRows, kTiles: what the registers hold at once.
//   kAlone: tiles at once of a row that is alone.
//   load(bytes) -> Codes.  low, high(Codes) -> Codes of the two halves of each byte.
//   repeat(int8 a[4]) -> Inputs.  dot(Sums&, Codes, Inputs): adds the products of the 4 inputs of each output.
//   zero() -> Sums.  none() -> Floats of 0.  floats(p), bfloats(p), store(p, Floats).
//   scaled(Sums, offset, scales, scale, acc) -> acc + (sum - offset) (scales scale), rounded as `fused`.
#pragma once

#include "arithmetic.h"
#include "matmul.h"

namespace dijiang {
namespace {

// Places of a register.
typedef int32_t Order __attribute__((vector_size(kWide * sizeof(int32_t))));

DIJIANG_INLINE Wide shuffled(Wide values, Order order) {
#ifdef __clang__
  Wide result;
  for (int i = 0; i < kWide; i++) result[i] = values[order[i]];
  return result;
#else
  return __builtin_shuffle(values, order);
#endif
}

// Sums and differences of pairs that lie `half` apart, inside of a register.
template <int half>
DIJIANG_INLINE Wide pairs_added(Wide values) {
  Order order{};
  Wide sign{};
  for (int i = 0; i < kWide; i++) order[i] = i ^ half, sign[i] = i & half ? -1.0f : 1.0f;
  return shuffled(values, order) + values * sign;
}

// The same between registers.
template <int half>
DIJIANG_INLINE void add_pairs(float* __restrict x, int64_t count) {
  for (int64_t start = 0; start < count; start += 2 * half)
    for (int i = 0; i < half; i++) {
      const float a = x[start + i], b = x[start + half + i];
      x[start + i] = a + b;
      x[start + half + i] = a - b;
    }
}

// x H for each `size` neighbours, H the orthonormal Hadamard matrix; count: a multiple of 16 and of size.
DIJIANG_INLINE void mix(float* __restrict x, int64_t count, int64_t size) {
  if (size <= 1) return;
  for (int64_t i = 0; i < count; i += kWide) {
    Wide values = pairs_added<1>(wide(x + i));
    if (size > 2) values = pairs_added<2>(values);
    if constexpr (kWide > 4)
      if (size > 4) values = pairs_added<4>(values);
    if constexpr (kWide > 8)
      if (size > 8) values = pairs_added<8>(values);
    store(x + i, values);
  }
  if (kWide <= 4 && size > 4) add_pairs<4>(x, count);
  if (kWide <= 8 && size > 8) add_pairs<8>(x, count);
  if (size > 16) add_pairs<16>(x, count);
  if (size > 32) add_pairs<32>(x, count);
  if (size > 64) add_pairs<64>(x, count);
  if (size > 128) add_pairs<128>(x, count);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
  for (int64_t i = 0; i < count; i++) x[i] *= scale;
}

// `fixed`: block and rotation where the compiler may know them and they are equal.
template <int fixed>
DIJIANG_INLINE void round_row_by(const MatMul& given, int64_t row) {
  const MatMul m = given;
  const Packed w = *m.weights;
  const int64_t block = fixed ? fixed : w.block, rotation = fixed ? fixed : w.rotation;
  const int64_t rows = m.padded_rows(), padded = w.padded(), span = block > rotation ? block : rotation;
  const int32_t offset = w.bits == 8 ? Lanes::kOffset : 8;
  const float* __restrict input = m.input + row * w.inputs;
  int8_t* __restrict codes = m.codes + row * m.stride();
  for (int64_t start = 0; start < w.inputs; start += span) {
    alignas(64) float x[fixed ? fixed : kLongestBlock];
    const int64_t left = w.inputs - start, n = left < span ? left : span;
    if (n == span)
      std::memcpy(x, input + start, span * sizeof(float));
    else
      for (int64_t i = 0; i < span; i++) x[i] = i < n ? input[start + i] : 0.0f;
    mix(x, span, rotation);
    for (int64_t from = 0; from < span && start + from < padded; from += block) {
      // As integers, magnitudes have their order, and infinities and NaN come last.
      uint32_t top = 0;
      for (int64_t i = from; i < from + block; i++) {
        const uint32_t magnitude = bits_of<uint32_t>(x[i]) & 0x7fffffffu;
        top = magnitude > top ? magnitude : top;
      }
      const float largest = bits_of<float>(top), inverse = top ? 127.0f / largest : 0.0f;
      int32_t sum = 0;
      for (int64_t i = from; i < from + block; i++) {
        // The nearest integer is in the last bits of the sum with 1.5 2^23.
        const float shifted = x[i] * inverse + 12582912.0f;
        const int8_t code = static_cast<int8_t>(bits_of<uint32_t>(shifted));
        codes[start + i] = code;
        sum += code;
      }
      const int64_t at = (start + from) / block * rows + row;
      m.scales[at] = largest * (1.0f / 127.0f);
      m.offsets[at] = sum * offset;
    }
  }
}

void round_row(const MatMul& m, int64_t row) {
  if (m.weights->block == 64 && m.weights->rotation == 64)
    round_row_by<64>(m, row);
  else
    round_row_by<0>(m, row);
}

DIJIANG_INLINE void put(const MatMul& m, int64_t outputs, int64_t row, int64_t tile, Lanes::Floats values) {
  const int64_t column = tile * kColumns, left = outputs - column;
  float* out = m.output + row * outputs + column;
  float line[kColumns];
  float* whole = left < kColumns ? line : out;
  Lanes::store(whole, values);
  const int64_t n = left < kColumns ? left : kColumns;
  if (m.bias)
    for (int64_t c = 0; c < n; c++) whole[c] += m.bias[column + c];
  if (left < kColumns)
    for (int64_t c = 0; c < n; c++) out[c] = line[c];
}

// The scales of block b of a tile.
DIJIANG_INLINE Lanes::Floats scales_of(const Packed& w, const uint8_t* tile, int64_t b) {
  const uint8_t* at = tile + w.scales_at(b);
  return w.scale_bytes == 2 ? Lanes::bfloats(reinterpret_cast<const uint16_t*>(at))
                            : Lanes::floats(reinterpret_cast<const float*>(at));
}

// R rows of T tiles.
template <int bits, int R, int T>
DIJIANG_INLINE void multiply_rows(const MatMul& given, int64_t tile, int64_t row) {
  const MatMul m = given;  // copies: what is written through pointers cannot change them
  const Packed w = *m.weights;
  const int64_t rows = m.padded_rows(), blocks = w.blocks(), stride = m.stride(), tile_bytes = w.tile_bytes();
  const int64_t block = w.block;
  constexpr int64_t step = 32 / bits;  // inputs of a vector
  const uint8_t* first_tile = w.data + tile * tile_bytes;
  const int8_t* inputs = m.codes + row * stride;
  Lanes::Floats acc[R][T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) acc[r][t] = Lanes::none();
  for (int64_t b = 0; b < blocks; b++, inputs += block) {
    const uint8_t* vectors = first_tile + w.codes_at(b);
    Lanes::Sums sums[R][T];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) sums[r][t] = Lanes::zero();
    for (int64_t k = 0; k < block; k += step) {
      Lanes::Codes codes[T];
      for (int t = 0; t < T; t++) {
        const uint8_t* vector = vectors + t * tile_bytes + k / step * kVector;
        if (R == 1) __builtin_prefetch(vector + 4096);  // the weights come from memory
        codes[t] = Lanes::load(vector);
      }
      for (int r = 0; r < R; r++) {
        const int8_t* a = inputs + r * stride + k;
        if (bits == 8) {
          const Lanes::Inputs four = Lanes::repeat(a);
          for (int t = 0; t < T; t++) Lanes::dot(sums[r][t], codes[t], four);
        } else {
          const Lanes::Inputs first = Lanes::repeat(a), second = Lanes::repeat(a + 4);
          for (int t = 0; t < T; t++) {
            Lanes::dot(sums[r][t], Lanes::low(codes[t]), first);
            Lanes::dot(sums[r][t], Lanes::high(codes[t]), second);
          }
        }
      }
    }
    for (int t = 0; t < T; t++) {
      const Lanes::Floats scales = scales_of(w, first_tile + t * tile_bytes, b);
      for (int r = 0; r < R; r++) {
        const int64_t i = b * rows + row + r;
        acc[r][t] = Lanes::scaled(sums[r][t], m.offsets[i], scales, m.scales[i], acc[r][t]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) put(m, w.outputs, row + r, tile + t, acc[r][t]);
}

// All rows of T tiles from `row` on, as many together as the registers hold.
template <int bits, int R, int T>
DIJIANG_INLINE void multiply_all(const MatMul& m, int64_t tile, int64_t row) {
  for (; row + R <= m.rows; row += R) multiply_rows<bits, R, T>(m, tile, row);
  if constexpr (R > 1) multiply_all<bits, R / 2, T>(m, tile, row);
}

template <int bits>
DIJIANG_INLINE void multiply_unit(const MatMul& m, int64_t unit) {
  const int64_t first = unit * kTilesTogether, tiles = m.weights->tiles();
  const int64_t last = first + kTilesTogether < tiles ? first + kTilesTogether : tiles;
  int64_t tile = first;
  if (m.rows == 1)
    for (; tile + Lanes::kAlone <= last; tile += Lanes::kAlone) multiply_rows<bits, 1, Lanes::kAlone>(m, tile, 0);
  for (; tile + Lanes::kTiles <= last; tile += Lanes::kTiles)
    multiply_all<bits, Lanes::kRows, Lanes::kTiles>(m, tile, 0);
  if constexpr (Lanes::kTiles > 1)
    for (; tile < last; tile++) multiply_all<bits, Lanes::kRows, 1>(m, tile, 0);
}

void multiply(const MatMul& m, int64_t unit) {
  if (m.weights->bits == 8)
    multiply_unit<8>(m, unit);
  else
    multiply_unit<4>(m, unit);
}

}  // namespace
}  // namespace dijiang
