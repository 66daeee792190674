// x86-64 with AVX-512 VNNI and AMX: 16 rows by 16 outputs by 64 inputs at a time. Few rows, and blocks that
// are not whole tiles, take the VNNI way.
#define DIJIANG_HARDWARE_FMA
#include "../lanes/avx512vnni.h"
#include "../gptq_kernel.h"
#include "../matmul_kernel.h"
#include "../norm_kernel.h"
#include "../step_kernel.h"

namespace dijiang {
namespace {

// Layout of the operand of ldtilecfg.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of a row
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int64_t kTile = 16;   // rows, and outputs
constexpr int64_t kInputs = 64;

struct alignas(64) Sums {
  int32_t at[2][2][kTile][kTile];  // rows, outputs
};

// The vectors of 64 inputs of one tile, 8-bit codes each; `room` is for those of 4 bits.
DIJIANG_INLINE const uint8_t* whole_codes(const uint8_t* vectors, int64_t bits, uint8_t* room) {
  if (bits == 8) return vectors;
  for (int64_t v = 0; v < kInputs / 8; v++) {
    const Lanes::Codes both = Lanes::load(vectors + v * kVector);
    _mm512_store_si512(room + 2 * v * kVector, Lanes::low(both));
    _mm512_store_si512(room + (2 * v + 1) * kVector, Lanes::high(both));
  }
  return room;
}

// What 32 rows of one unit of outputs come to.
using Results = Lanes::Floats[2 * kTile][kTilesTogether];

// Two tiles of outputs, or one, by up to 32 rows, into columns of `results`. second: there are more than 16 rows.
template <int T>
DIJIANG_INLINE void multiply_tiles(const MatMul& m, const Packed& w, int64_t tile, int64_t row, bool second,
                                   Lanes::Floats (*__restrict results)[kTilesTogether], int64_t column) {
  const int64_t rows = m.padded_rows(), blocks = w.blocks(), padded = w.padded(), block_bytes = w.block_bytes();
  const int64_t tile_bytes = w.tile_bytes(), step = kInputs * w.bits / 32 * kVector, count = second ? 2 * kTile : kTile;
  alignas(64) uint8_t room[T][kInputs * kTile];
  for (int64_t r = 0; r < count; r++)
    for (int t = 0; t < T; t++) results[r][column + t] = Lanes::none();
  const uint8_t* at = w.data + tile * tile_bytes;
  for (int64_t b = 0; b < blocks; b++, at += block_bytes) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int8_t* inputs = m.codes + row * padded + b * w.block;
    const uint8_t* vectors = at + kVector;  // after the scales
    for (int64_t k = 0; k < w.block; k += kInputs, inputs += kInputs, vectors += step) {
      _tile_loadd(4, inputs, padded);
      _tile_loadd(6, whole_codes(vectors, w.bits, room[0]), kVector);
      _tile_dpbsud(0, 4, 6);
      if (T == 2) {
        _tile_loadd(7, whole_codes(vectors + tile_bytes, w.bits, room[T - 1]), kVector);
        _tile_dpbsud(1, 4, 7);
      }
      if (second) {
        _tile_loadd(5, inputs + kTile * padded, padded);
        _tile_dpbsud(2, 5, 6);
        if (T == 2) _tile_dpbsud(3, 5, 7);
      }
    }
    Sums sums;
    _tile_stored(0, sums.at[0][0], kVector);
    _tile_stored(1, sums.at[0][1], kVector);
    _tile_stored(2, sums.at[1][0], kVector);
    _tile_stored(3, sums.at[1][1], kVector);
    Lanes::Floats scales[T];
    for (int t = 0; t < T; t++) scales[t] = Lanes::floats(reinterpret_cast<const float*>(at + t * tile_bytes));
    for (int64_t h = 0; h <= second; h++) {
      const int64_t i = b * rows + row + h * kTile;
      for (int r = 0; r < kTile; r++)
        for (int t = 0; t < T; t++) {
          Lanes::Floats& result = results[h * kTile + r][column + t];
          const __m512i sum = _mm512_load_si512(sums.at[h][t][r]);
          result = Lanes::scaled(sum, m.offsets[i + r], scales[t], m.scales[i + r], result);
        }
    }
  }
}

// An output of so many bytes does not stay in a cache until it is read. Its lines are written past the caches,
// whole: else each is read first, and rows that lie a power of two apart push one another out.
constexpr int64_t kPastCaches = 2 << 20;

DIJIANG_INLINE void write(const MatMul& m, int64_t outputs, int64_t row, int64_t tile, Lanes::Floats values,
                          bool past_caches) {
  if (!past_caches) return put(m, outputs, row, tile, values);
  if (m.bias) values = _mm512_add_ps(values, Lanes::floats(m.bias + tile * kColumns));
  _mm512_stream_ps(m.output + row * outputs + tile * kColumns, values);
}

// Fewer rows leave most of a tile empty.
constexpr int64_t kFewest = 8;

void multiply_with_tiles(const MatMul& given, int64_t unit) {
  const MatMul m = given;  // copies: what is written through pointers cannot change them
  const Packed w = *m.weights;
  if (m.rows < kFewest || w.block % kInputs) return multiply(given, unit);
  const int64_t first = unit * kTilesTogether, left = w.tiles() - first;
  const int64_t tiles = left < kTilesTogether ? left : kTilesTogether;
  const bool aligned = reinterpret_cast<uintptr_t>(m.output) % kVector == 0 && w.outputs % kColumns == 0;
  const bool past_caches = aligned && m.rows * w.outputs * int64_t{sizeof(float)} >= kPastCaches;
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t row = 0; row < m.rows; row += 2 * kTile) {
    const int64_t count = m.rows - row < 2 * kTile ? m.rows - row : 2 * kTile;
    Results results;
    int64_t t = 0;
    for (; t + 2 <= tiles; t += 2) multiply_tiles<2>(m, w, first + t, row, count > kTile, results, t);
    if (t < tiles) multiply_tiles<1>(m, w, first + t, row, count > kTile, results, t);
    for (int64_t r = 0; r < count; r++)
      for (t = 0; t < tiles; t++) write(m, w.outputs, row + r, first + t, results[r][t], past_caches);
  }
  _tile_release();
  if (past_caches) _mm_sfence();  // what is written past the caches is seen by the others from here on
}

}  // namespace

const Kernels kAmx = {"amx", attend, finish, activate, multiply_add, add_norm, round_row, multiply_with_tiles, gptq};
}  // namespace dijiang
