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

// Two tiles of outputs, or one, by 32 rows at a time.
template <int T>
DIJIANG_INLINE void multiply_tiles(const MatMul& given, int64_t tile) {
  const MatMul m = given;
  const Packed w = *m.weights;
  const int64_t rows = m.padded_rows(), blocks = w.blocks(), stride = m.stride();
  const int64_t tile_bytes = w.tile_bytes(), step = kInputs * w.bits / 32 * kVector;
  alignas(64) uint8_t room[T][kInputs * kTile];
  for (int64_t row = 0; row < m.rows; row += 2 * kTile) {
    const int64_t left = m.rows - row, count = left < 2 * kTile ? left : 2 * kTile;
    const bool second = count > kTile;
    Lanes::Floats acc[2][kTile][T];
    for (auto& half : acc)
      for (auto& line : half)
        for (Lanes::Floats& value : line) value = Lanes::none();
    const uint8_t* first_tile = w.data + tile * tile_bytes;
    for (int64_t b = 0; b < blocks; b++) {
      // Lines of the output are fetched a few at a time, so that their writing does not wait for all of them.
      for (int64_t r = b * count / blocks; r < (b + 1) * count / blocks; r++)
        for (int t = 0; t < T; t++) __builtin_prefetch(m.output + (row + r) * w.outputs + (tile + t) * kColumns, 1);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      const int8_t* inputs = m.codes + row * stride + b * w.block;
      const uint8_t* vectors = first_tile + w.codes_at(b);
      for (int64_t k = 0; k < w.block; k += kInputs, inputs += kInputs, vectors += step) {
        _tile_loadd(4, inputs, stride);
        _tile_loadd(6, whole_codes(vectors, w.bits, room[0]), kVector);
        _tile_dpbsud(0, 4, 6);
        if (T == 2) {
          _tile_loadd(7, whole_codes(vectors + tile_bytes, w.bits, room[T - 1]), kVector);
          _tile_dpbsud(1, 4, 7);
        }
        if (second) {
          _tile_loadd(5, inputs + kTile * stride, stride);
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
      for (int t = 0; t < T; t++) scales[t] = scales_of(w, first_tile + t * tile_bytes, b);
      for (int64_t h = 0; h <= second; h++) {
        // Past the last row are whatever numbers were in memory: sums of subnormal ones take many times as long.
        const int64_t i = b * rows + row + h * kTile, here = count - h * kTile < kTile ? count - h * kTile : kTile;
        for (int r = 0; r < here; r++)
          for (int t = 0; t < T; t++) {
            const __m512i sum = _mm512_load_si512(sums.at[h][t][r]);
            acc[h][r][t] = Lanes::scaled(sum, m.offsets[i + r], scales[t], m.scales[i + r], acc[h][r][t]);
          }
      }
    }
    for (int64_t r = 0; r < count; r++)
      for (int t = 0; t < T; t++) put(m, w.outputs, row + r, tile + t, acc[r / kTile][r % kTile][t]);
  }
}

// Fewer rows leave most of a tile empty.
constexpr int64_t kFewest = 8;

void multiply_with_tiles(const MatMul& m, int64_t unit) {
  if (m.rows < kFewest || m.weights->block % kInputs) return multiply(m, unit);
  const int64_t first = unit * kTilesTogether, tiles = m.weights->tiles();
  const int64_t last = first + kTilesTogether < tiles ? first + kTilesTogether : tiles;
  const TileConfig config;
  _tile_loadconfig(&config);
  int64_t tile = first;
  for (; tile + 2 <= last; tile += 2) multiply_tiles<2>(m, tile);
  if (tile < last) multiply_tiles<1>(m, tile);
  _tile_release();
}

}  // namespace

const Kernels kAmx = {"amx", attend, finish, activate, multiply_add, add_norm, round_row, multiply_with_tiles, gptq};
}  // namespace dijiang
