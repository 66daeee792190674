// What the two sets with registers of 256 bits share: a vector of 64 codes is two of them.
#pragma once

#include <immintrin.h>

#include "../matmul.h"

namespace dijiang {
namespace {

struct Halves {
  struct Codes { __m256i half[2]; };
  struct Floats { __m256 half[2]; };
  using Inputs = __m256i;
  static constexpr int32_t kOffset = 128;

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
  DIJIANG_INLINE static Floats none() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  DIJIANG_INLINE static Floats floats(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  DIJIANG_INLINE static __m256 bfloats_half(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  DIJIANG_INLINE static Floats bfloats(const uint16_t* p) { return {{bfloats_half(p), bfloats_half(p + 8)}}; }
  DIJIANG_INLINE static void store(float* p, const Floats& values) {
    _mm256_storeu_ps(p, values.half[0]);
    _mm256_storeu_ps(p + 8, values.half[1]);
  }
  // One half of `scaled`, with its 8 sums whole.
  DIJIANG_INLINE static __m256 scaled_half(__m256i sums, int32_t offset, __m256 scales, float scale, __m256 acc) {
    const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(offset)));
    return _mm256_fmadd_ps(exact, _mm256_mul_ps(scales, _mm256_set1_ps(scale)), acc);
  }
};

}  // namespace
}  // namespace dijiang
