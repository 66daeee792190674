// `Lanes` in plain C++: the twin.
#pragma once

#include "../arithmetic.h"
#include "../matmul.h"

namespace dijiang {
namespace {

struct Lanes {
  struct Codes { uint8_t at[kVector]; };
  struct Sums { int32_t at[kColumns]; };
  struct Inputs { int8_t at[4]; };
  struct Floats { float at[kColumns]; };
  static constexpr int32_t kOffset = 128;
  static constexpr int kRows = 1, kTiles = 1, kAlone = 4;

  static Codes load(const uint8_t* bytes) {
    Codes codes;
    std::memcpy(codes.at, bytes, sizeof codes.at);
    return codes;
  }
  static Codes low(Codes codes) {
    for (uint8_t& code : codes.at) code &= 15;
    return codes;
  }
  static Codes high(Codes codes) {
    for (uint8_t& code : codes.at) code >>= 4;
    return codes;
  }
  static Sums zero() { return {}; }
  static Floats none() { return {}; }
  static Inputs repeat(const int8_t* a) { return {{a[0], a[1], a[2], a[3]}}; }
  static void dot(Sums& sums, const Codes& codes, const Inputs& four) {
    for (int c = 0; c < kColumns; c++)
      for (int k = 0; k < 4; k++) sums.at[c] += codes.at[4 * c + k] * four.at[k];
  }
  static Floats floats(const float* p) {
    Floats values;
    std::memcpy(values.at, p, sizeof values.at);
    return values;
  }
  static Floats bfloats(const uint16_t* p) {
    Floats values;
    for (int c = 0; c < kColumns; c++) values.at[c] = widened(p[c]);
    return values;
  }
  static void store(float* p, const Floats& values) { std::memcpy(p, values.at, sizeof values.at); }
  static Floats scaled(const Sums& sums, int32_t offset, const Floats& scales, float scale, Floats acc) {
    for (int c = 0; c < kColumns; c++)
      acc.at[c] = fused(static_cast<float>(sums.at[c] - offset), scales.at[c] * scale, acc.at[c]);
    return acc;
  }
};

}  // namespace
}  // namespace dijiang
