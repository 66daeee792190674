// `Lanes` in registers of AVX2 with AVX-VNNI, which multiplies unsigned by signed bytes, four at a time.
#pragma once

#include "halves.h"

namespace dijiang {
namespace {

struct Lanes : Halves {
  struct Sums { __m256i half[2]; };
  static constexpr int kRows = 4, kTiles = 1, kAlone = 4;

  DIJIANG_INLINE static Sums zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  DIJIANG_INLINE static Inputs repeat(const int8_t* a) { return _mm256_set1_epi32(four_at(a)); }
  DIJIANG_INLINE static void dot(Sums& sums, const Codes& codes, Inputs all) {
    for (int h = 0; h < 2; h++) sums.half[h] = _mm256_dpbusd_avx_epi32(sums.half[h], codes.half[h], all);
  }
  DIJIANG_INLINE static Floats scaled(const Sums& sums, int32_t offset, const Floats& scales, float scale,
                                      Floats acc) {
    for (int h = 0; h < 2; h++)
      acc.half[h] = scaled_half(sums.half[h], offset, scales.half[h], scale, acc.half[h]);
    return acc;
  }
};

}  // namespace
}  // namespace dijiang
