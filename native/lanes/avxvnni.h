// `Lanes` in registers of AVX2 with AVX-VNNI, which multiplies unsigned by signed bytes, four at a time.
#pragma once

#include <immintrin.h>

#include "../matmul.h"

namespace dijiang {
namespace {

struct Lanes {
  struct Codes { __m256i half[2]; };
  struct Sums { __m256i half[2]; };
  using Inputs = __m256i;
  struct Floats { __m256 half[2]; };
  static constexpr int32_t kOffset = 128;
  static constexpr int kRows = 4, kTiles = 1;

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
  DIJIANG_INLINE static Sums zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  DIJIANG_INLINE static Floats none() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  DIJIANG_INLINE static Inputs repeat(const int8_t* a) {
    int32_t four;
    __builtin_memcpy(&four, a, sizeof four);
    return _mm256_set1_epi32(four);
  }
  DIJIANG_INLINE static void dot(Sums& sums, const Codes& codes, Inputs four) {
    for (int h = 0; h < 2; h++) sums.half[h] = _mm256_dpbusd_avx_epi32(sums.half[h], codes.half[h], four);
  }
  DIJIANG_INLINE static Floats floats(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  DIJIANG_INLINE static void store(float* p, const Floats& values) {
    _mm256_storeu_ps(p, values.half[0]);
    _mm256_storeu_ps(p + 8, values.half[1]);
  }
  DIJIANG_INLINE static Floats scaled(const Sums& sums, int32_t offset, const Floats& scales, float scale,
                                      Floats acc) {
    for (int h = 0; h < 2; h++) {
      const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums.half[h], _mm256_set1_epi32(offset)));
      acc.half[h] = _mm256_fmadd_ps(exact, _mm256_mul_ps(scales.half[h], _mm256_set1_ps(scale)), acc.half[h]);
    }
    return acc;
  }
};

}  // namespace
}  // namespace dijiang
