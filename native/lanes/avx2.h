// `Lanes` in registers of AVX2. Bytes are widened to 16 bits: their products in pairs would not fit.
#pragma once

#include "halves.h"

namespace dijiang {
namespace {

struct Lanes : Halves {
  struct Sums { __m256i pairs[4]; };  // of each half two, each output in two parts
  static constexpr int kRows = 2, kTiles = 1, kAlone = 4;

  DIJIANG_INLINE static Sums zero() {
    const __m256i none = _mm256_setzero_si256();
    return {{none, none, none, none}};
  }
  DIJIANG_INLINE static Inputs repeat(const int8_t* a) { return _mm256_cvtepi8_epi16(_mm_set1_epi32(four_at(a))); }
  DIJIANG_INLINE static void dot(Sums& sums, const Codes& codes, Inputs wide) {
    const __m256i none = _mm256_setzero_si256();
    for (int h = 0; h < 2; h++) {
      const __m256i first = _mm256_unpacklo_epi8(codes.half[h], none);
      const __m256i second = _mm256_unpackhi_epi8(codes.half[h], none);
      sums.pairs[2 * h] = _mm256_add_epi32(sums.pairs[2 * h], _mm256_madd_epi16(first, wide));
      sums.pairs[2 * h + 1] = _mm256_add_epi32(sums.pairs[2 * h + 1], _mm256_madd_epi16(second, wide));
    }
  }
  DIJIANG_INLINE static Floats scaled(const Sums& sums, int32_t offset, const Floats& scales, float scale,
                                      Floats acc) {
    for (int h = 0; h < 2; h++) {
      const __m256i whole = _mm256_hadd_epi32(sums.pairs[2 * h], sums.pairs[2 * h + 1]);
      acc.half[h] = scaled_half(whole, offset, scales.half[h], scale, acc.half[h]);
    }
    return acc;
  }
};

}  // namespace
}  // namespace dijiang
