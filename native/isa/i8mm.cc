// aarch64 with the dot product of dotprod.cc, and the matrix product of ARMv8.6: two rows by two outputs by
// eight inputs at a time. One row takes the way of dotprod.cc.
#define DIJIANG_HARDWARE_FMA
#include "../lanes/neon.h"
#include "../gptq_kernel.h"
#include "../matmul_kernel.h"
#include "../norm_kernel.h"
#include "../step_kernel.h"

namespace dijiang {
namespace {

// P pairs of rows of one tile.
template <int bits, int P>
DIJIANG_INLINE void multiply_pairs(const MatMul& given, int64_t tile, int64_t row) {
  const MatMul m = given;  // copies: what is written through pointers cannot change them
  const Packed w = *m.weights;
  const int64_t rows = m.padded_rows(), blocks = w.blocks(), stride = m.stride(), block = w.block;
  constexpr int64_t kInputs = 8;
  const uint8_t* data = w.data + tile * w.tile_bytes();
  const int8_t* inputs = m.codes + row * stride;
  Lanes::Floats acc[2 * P];
  for (Lanes::Floats& one : acc) one = Lanes::none();
  for (int64_t b = 0; b < blocks; b++, inputs += block) {
    int32x4_t sums[P][8];  // of each two outputs: those of the first row, those of the second
    for (auto& pair : sums)
      for (int32x4_t& one : pair) one = vdupq_n_s32(0);
    const uint8_t* vector = data + w.codes_at(b);
    for (int64_t k = 0; k < block; k += kInputs, vector += kInputs * bits / 32 * kVector) {
      Lanes::Codes first = Lanes::load(vector), second;
      if (bits == 8)
        second = Lanes::load(vector + kVector);
      else
        second = Lanes::high(first), first = Lanes::low(first);
      int8x16_t both[P];
      for (int p = 0; p < P; p++) {
        const int8_t* a = inputs + 2 * p * stride + k;
        both[p] = vcombine_s8(vld1_s8(a), vld1_s8(a + stride));
      }
      for (int i = 0; i < 4; i++) {
        const int32x4_t x = vreinterpretq_s32_s8(first.part[i]), y = vreinterpretq_s32_s8(second.part[i]);
        const int8x16_t lower = vreinterpretq_s8_s32(vzip1q_s32(x, y));
        const int8x16_t upper = vreinterpretq_s8_s32(vzip2q_s32(x, y));
        for (int p = 0; p < P; p++) {
          sums[p][2 * i] = vmmlaq_s32(sums[p][2 * i], both[p], lower);
          sums[p][2 * i + 1] = vmmlaq_s32(sums[p][2 * i + 1], both[p], upper);
        }
      }
    }
    const Lanes::Floats scales = scales_of(w, data, b);
    for (int r = 0; r < 2 * P; r++) {
      Lanes::Sums line;
      for (int i = 0; i < 4; i++) {
        const int64x2_t x = vreinterpretq_s64_s32(sums[r / 2][2 * i]), y = vreinterpretq_s64_s32(sums[r / 2][2 * i + 1]);
        line.part[i] = vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(x, y) : vzip1q_s64(x, y));
      }
      const int64_t i = b * rows + row + r;
      acc[r] = Lanes::scaled(line, m.offsets[i], scales, m.scales[i], acc[r]);
    }
  }
  for (int r = 0; r < 2 * P; r++) put(m, w.outputs, row + r, tile, acc[r]);
}

template <int bits>
DIJIANG_INLINE void multiply_unit_by_pairs(const MatMul& m, int64_t unit) {
  const int64_t first = unit * kTilesTogether, tiles = m.weights->tiles();
  const int64_t last = first + kTilesTogether < tiles ? first + kTilesTogether : tiles;
  for (int64_t tile = first; tile < last; tile++) {
    int64_t row = 0;
    for (; row + 4 <= m.rows; row += 4) multiply_pairs<bits, 2>(m, tile, row);
    for (; row + 2 <= m.rows; row += 2) multiply_pairs<bits, 1>(m, tile, row);
    if (row < m.rows) multiply_rows<bits, 1, 1>(m, tile, row);
  }
}

void multiply_by_pairs(const MatMul& m, int64_t unit) {
  if (m.rows == 1) return multiply(m, unit);
  if (m.weights->bits == 8)
    multiply_unit_by_pairs<8>(m, unit);
  else
    multiply_unit_by_pairs<4>(m, unit);
}

}  // namespace

const Kernels kI8mm = {"i8mm", attend, finish, activate, multiply_add, add_norm, round_row, multiply_by_pairs, gptq};
}  // namespace dijiang
