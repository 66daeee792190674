// x W^T + b with W as integers in blocks, packed once for the kernels.
//
// M rows, K inputs, N outputs. Activations are rounded to 8 bits, a scale a block, so that the products
// are sums of integers: exact, whatever the instruction set. They are scaled and added in float32 block
// after block. So a row has the same bits on every set, and whatever the number of rows.
// Equations: docs/adr/0020-matmul.md.
#pragma once

#include <cstdint>

#include "step.h"

namespace dijiang {

constexpr int64_t kColumns = 16;        // outputs of a tile
constexpr int64_t kVector = 64;         // bytes of the codes that are multiplied together
constexpr int64_t kLongestBlock = 256;  // of inputs that share a scale, and of inputs that are mixed

// Tiles of 16 outputs. A tile is, for each block of inputs, or each two where scales are bfloat16: 64 bytes of
// scales, 16 a block; then the vectors of those blocks, 64 bytes each.
// A vector of 8-bit codes has 4 inputs of each output. One of 4-bit codes has 8: the first 4 in the low
// halves of its bytes. Codes are offset by half their range. Outputs beyond N have scales of 0.
struct Packed {
  int64_t inputs, outputs, bits, block;
  int64_t rotation;     // inputs that a Hadamard matrix mixes before they are rounded; 1: none
  int64_t scale_bytes;  // 4: float32; 2: bfloat16
  uint8_t* data;

  // Whether the sizes go together: then nothing outside of the tensors is read. A graph may come from anybody.
  DIJIANG_INLINE bool sound() const {
    const auto allowed = [](int64_t n) { return n >= 1 && n <= kLongestBlock && (n & (n - 1)) == 0; };
    return inputs >= 1 && outputs >= 1 && (bits == 4 || bits == 8) && allowed(block) && block >= 16 &&
           allowed(rotation) && inputs % rotation == 0;
  }
  DIJIANG_INLINE int64_t blocks() const { return (inputs + block - 1) / block; }
  DIJIANG_INLINE int64_t padded() const { return blocks() * block; }
  DIJIANG_INLINE int64_t tiles() const { return (outputs + kColumns - 1) / kColumns; }
  DIJIANG_INLINE int64_t block_bytes() const { return kColumns * block * bits / 8; }  // of codes
  DIJIANG_INLINE int64_t tile_bytes() const { return codes_at(blocks() - 1) + block_bytes(); }
  // Where in a tile the scales and the codes of block b are.
  DIJIANG_INLINE int64_t scales_at(int64_t b) const {
    const int64_t together = scale_bytes == 2;
    return codes_at(b & ~together) - kVector + (b & together) * (kVector / 2);
  }
  DIJIANG_INLINE int64_t codes_at(int64_t b) const {
    return b * block_bytes() + ((b >> (scale_bytes == 2)) + 1) * kVector;
  }
};

// One call. A row of codes is padded to whole blocks with zeros. Codes, scales and offsets have room for
// rows up to a multiple of kRowsTogether; what is there does not matter.
constexpr int64_t kRowsTogether = 16;
constexpr int64_t kTilesTogether = 4;

struct MatMul {
  const Packed* weights;
  int64_t rows;
  const float* input;   // [M, K]
  const float* bias;    // [N], null: none
  float* output;        // [M, N]
  int8_t* codes;        // [padded M, stride] of the input, mixed
  float* scales;        // [blocks, padded M]
  int32_t* offsets;     // [blocks, padded M]: what the offset of the weights' codes adds to a sum

  DIJIANG_INLINE int64_t padded_rows() const {
    return (rows + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
  }
  // Bytes from one row of codes to the next: with a power of two, rows would push each other out of the cache.
  DIJIANG_INLINE int64_t stride() const { return weights->padded() + kVector; }
  // Bytes of codes, scales and offsets, and their places in such a room.
  DIJIANG_INLINE int64_t room() const { return padded_rows() * (weights->blocks() * 8 + stride()); }
  DIJIANG_INLINE void use(uint8_t* at) {
    const int64_t numbers = padded_rows() * weights->blocks();
    scales = reinterpret_cast<float*>(at);
    offsets = reinterpret_cast<int32_t*>(at + numbers * 4);
    codes = reinterpret_cast<int8_t*>(at + numbers * 8);
  }
  // Calls of multiply, which may run at once.
  DIJIANG_INLINE int64_t units() const {
    return (weights->tiles() + kTilesTogether - 1) / kTilesTogether;
  }
};

// Four integers of a row as one number, to be repeated in a register.
DIJIANG_INLINE int32_t four_at(const int8_t* a) {
  int32_t four;
  __builtin_memcpy(&four, a, sizeof four);
  return four;
}

// A bfloat16 is the upper half of a float32.
DIJIANG_INLINE float widened(uint16_t upper) {
  const uint32_t bits = static_cast<uint32_t>(upper) << 16;
  float number;
  __builtin_memcpy(&number, &bits, sizeof number);
  return number;
}

// Fills one tile from codes [N, blocks, block bits / 8] uint8, as MatMulNBits stores them, and scales
// [N, blocks] in their type. False: a scale is 0 or no finite number.
bool pack_tile(const Packed& packed, int64_t tile, const uint8_t* codes, const uint8_t* scales);

}  // namespace dijiang
