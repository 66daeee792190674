#include <cmath>
#include <cstring>

#include "matmul.h"

namespace dijiang {
namespace {

// Eight 4-bit codes, the earlier of two in the low half of a byte: the first four into the low halves.
void interleave(const uint8_t* from, uint8_t* to) {
  for (int i = 0; i < 2; i++) {
    const int first = from[i], second = from[2 + i];
    to[2 * i] = static_cast<uint8_t>((first & 15) | (second & 15) << 4);
    to[2 * i + 1] = static_cast<uint8_t>(first >> 4 | (second & 240));
  }
}

float scale_of(const uint8_t* stored, int64_t bytes) {
  if (bytes == 2) {
    uint16_t brief;
    std::memcpy(&brief, stored, sizeof brief);
    return widened(brief);
  }
  float scale;
  std::memcpy(&scale, stored, sizeof scale);
  return scale;
}

}  // namespace

bool pack_tile(const Packed& w, int64_t tile, const uint8_t* codes, const uint8_t* scales) {
  const int64_t row_bytes = w.padded() * w.bits / 8, step = 32 / w.bits;
  uint8_t* data = w.data + tile * w.tile_bytes();
  std::memset(data, 0, w.tile_bytes());
  const int64_t first = tile * kColumns, left = w.outputs - first, count = left < kColumns ? left : kColumns;
  for (int64_t b = 0; b < w.blocks(); b++) {
    for (int64_t c = 0; c < count; c++) {
      const uint8_t* stored = scales + ((first + c) * w.blocks() + b) * w.scale_bytes;
      const float scale = scale_of(stored, w.scale_bytes);
      if (!std::isfinite(scale) || scale == 0.0f) return false;
      std::memcpy(data + w.scales_at(b) + c * w.scale_bytes, stored, w.scale_bytes);
      const uint8_t* from = codes + (first + c) * row_bytes + b * w.block * w.bits / 8;
      uint8_t* to = data + w.codes_at(b) + 4 * c;
      for (int64_t k = 0; k < w.block; k += step, from += 4, to += kVector) {
        if (w.bits == 8)
          std::memcpy(to, from, 4);
        else
          interleave(from, to);
      }
    }
  }
  return true;
}

}  // namespace dijiang
