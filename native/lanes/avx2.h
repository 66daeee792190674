// `Lanes` in registers of AVX2. Bytes are widened to 16 bits: their products in pairs would not fit.
#pragma once

#include <immintrin.h>

#include "../matmul.h"

namespace dijiang {
namespace {

struct Lanes {
  struct Codes { __m256i half[2]; };
  struct Sums { __m256i pairs[4]; };  // two of each half: outputs 0, 1, 4, 5 and 2, 3, 6, 7, each in two parts
  using Inputs = __m256i;
  struct Floats { __m256 half[2]; };
  static constexpr int32_t kOffset = 128;
  static constexpr int kRows = 2, kTiles = 1;

  DIJIANG_INLINE static Codes load(const uint8_t* bytes) {
    const __m256i* p = reinterpret_cast<const __m256i*>(bytes);
    return {{_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)}};
  }
  DIJIANG_INLINE static Codes low(const Codes& codes) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(codes.half[0], mask), _mm256_and_si256(codes.half[1], mask)}};
  }
  DIJIANG_INLINE static Codes high(const Codes& codes) {
    return low({{_mm256_srli_epi16(codes.half[0], 4), _mm256_srli_epi16(codes.half[1], 4)}});
  }
  DIJIANG_INLINE static Sums zero() {
    const __m256i none = _mm256_setzero_si256();
    return {{none, none, none, none}};
  }
  DIJIANG_INLINE static Floats none() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  DIJIANG_INLINE static Inputs repeat(const int8_t* a) {
    int32_t four;
    __builtin_memcpy(&four, a, sizeof four);
    return _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
  }
  DIJIANG_INLINE static void dot(Sums& sums, const Codes& codes, Inputs wide) {
    const __m256i none = _mm256_setzero_si256();
    for (int h = 0; h < 2; h++) {
      const __m256i first = _mm256_unpacklo_epi8(codes.half[h], none);
      const __m256i second = _mm256_unpackhi_epi8(codes.half[h], none);
      sums.pairs[2 * h] = _mm256_add_epi32(sums.pairs[2 * h], _mm256_madd_epi16(first, wide));
      sums.pairs[2 * h + 1] = _mm256_add_epi32(sums.pairs[2 * h + 1], _mm256_madd_epi16(second, wide));
    }
  }
  DIJIANG_INLINE static Floats floats(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  DIJIANG_INLINE static void store(float* p, const Floats& values) {
    _mm256_storeu_ps(p, values.half[0]);
    _mm256_storeu_ps(p + 8, values.half[1]);
  }
  DIJIANG_INLINE static Floats scaled(const Sums& sums, int32_t offset, const Floats& scales, float scale,
                                      Floats acc) {
    for (int h = 0; h < 2; h++) {
      const __m256i whole = _mm256_hadd_epi32(sums.pairs[2 * h], sums.pairs[2 * h + 1]);
      const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(whole, _mm256_set1_epi32(offset)));
      acc.half[h] = _mm256_fmadd_ps(exact, _mm256_mul_ps(scales.half[h], _mm256_set1_ps(scale)), acc.half[h]);
    }
    return acc;
  }
};

}  // namespace
}  // namespace dijiang
