// `Lanes` in one register of AVX-512: VNNI multiplies unsigned by signed bytes, four at a time.
#pragma once

#include <immintrin.h>

#include "../matmul.h"

namespace dijiang {
namespace {

struct Lanes {
  using Codes = __m512i;
  using Sums = __m512i;
  using Inputs = __m512i;
  using Floats = __m512;
  static constexpr int32_t kOffset = 128;
  static constexpr int kRows = 4, kTiles = 4, kAlone = 4;

  DIJIANG_INLINE static Codes load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  DIJIANG_INLINE static Codes low(Codes codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
  DIJIANG_INLINE static Codes high(Codes codes) { return low(_mm512_srli_epi16(codes, 4)); }
  DIJIANG_INLINE static Sums zero() { return _mm512_setzero_si512(); }
  DIJIANG_INLINE static Floats none() { return _mm512_setzero_ps(); }
  DIJIANG_INLINE static Inputs repeat(const int8_t* a) { return _mm512_set1_epi32(four_at(a)); }
  DIJIANG_INLINE static void dot(Sums& sums, Codes codes, Inputs four) {
    sums = _mm512_dpbusd_epi32(sums, codes, four);
  }
  DIJIANG_INLINE static Floats floats(const float* p) { return _mm512_loadu_ps(p); }
  DIJIANG_INLINE static Floats bfloats(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  DIJIANG_INLINE static void store(float* p, Floats values) { _mm512_storeu_ps(p, values); }
  DIJIANG_INLINE static Floats scaled(Sums sums, int32_t offset, Floats scales, float scale, Floats acc) {
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(offset)));
    return _mm512_fmadd_ps(exact, _mm512_mul_ps(scales, _mm512_set1_ps(scale)), acc);
  }
};

}  // namespace
}  // namespace dijiang
