// Functions of one number, for step_kernel.h. Each is a fixed sequence of IEEE operations, so that every
// instruction set gives the same bits. The compiler may not contract (-ffp-contract=off): where one
// rounding is wanted instead of two, `fused` says so.
//
// No names of std: a template that one instruction set compiled must not be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif

#include "step.h"

namespace dijiang {
namespace {

template <class To, class From>
DIJIANG_INLINE To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same width");
  To result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}

// a b + c, rounded once.
DIJIANG_INLINE float fused(float a, float b, float c) {
#if defined(__wasm_relaxed_simd__)
  // An engine may round twice here: then `fuses` of wasm/core.cc says so, and the page takes the other build.
  const v128_t x = wasm_f32x4_splat(a), y = wasm_f32x4_splat(b), z = wasm_f32x4_splat(c);
  return wasm_f32x4_extract_lane(wasm_f32x4_relaxed_madd(x, y, z), 0);
#elif defined(DIJIANG_HARDWARE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  // In double the product is exact. The sum is rounded to odd: towards zero, and the last bit is set
  // where something was left over. So rounding to float sees on which side of it the truth lies.
  const double product = static_cast<double>(a) * b, addend = c, sum = product + addend;
  const double back = sum - product, rest = (product - (sum - back)) + (addend - back);
  const double flag = __builtin_fabs(rest) > 0 ? 1.0 : 0.0;  // 0 for infinities, whose rest is NaN
  const uint64_t bits = bits_of<uint64_t>(sum), inexact = bits_of<uint64_t>(flag) >> 61;  // 1 or 0
  const uint64_t away = inexact & ((bits_of<uint64_t>(rest) ^ bits) >> 63);
  return static_cast<float>(bits_of<double>((bits - away) | inexact));
#endif
}

// Numbers in one register, for the loops that the compiler does not keep there by itself.
#if defined(__AVX512F__)
constexpr int kWide = 16;
#elif defined(__AVX__)
constexpr int kWide = 8;
#else
constexpr int kWide = 4;
#endif
typedef float Wide __attribute__((vector_size(kWide * sizeof(float))));

DIJIANG_INLINE Wide wide(const float* x) {
  Wide values;
  std::memcpy(&values, x, sizeof values);
  return values;
}

DIJIANG_INLINE void store(float* x, Wide values) { std::memcpy(x, &values, sizeof values); }

#ifdef __wasm_simd128__
// The same of each number, as `fused` says: there is no instruction but a relaxed one, and the compiler makes no vectors of it.
DIJIANG_INLINE v128_t fused_pair(v128_t a, v128_t b, v128_t c) {
  const v128_t product = wasm_f64x2_mul(a, b), sum = wasm_f64x2_add(product, c), back = wasm_f64x2_sub(sum, product);
  const v128_t rest = wasm_f64x2_add(wasm_f64x2_sub(product, wasm_f64x2_sub(sum, back)), wasm_f64x2_sub(c, back));
  const v128_t none = wasm_f64x2_splat(0), left = wasm_v128_or(wasm_f64x2_gt(rest, none), wasm_f64x2_lt(rest, none));
  const v128_t inexact = wasm_u64x2_shr(left, 63);
  const v128_t away = wasm_v128_and(inexact, wasm_u64x2_shr(wasm_v128_xor(rest, sum), 63));
  return wasm_f32x4_demote_f64x2_zero(wasm_v128_or(wasm_i64x2_sub(sum, away), inexact));
}

DIJIANG_INLINE v128_t lower(v128_t x) { return wasm_f64x2_promote_low_f32x4(x); }
DIJIANG_INLINE v128_t upper(v128_t x) { return wasm_f64x2_promote_low_f32x4(wasm_i32x4_shuffle(x, x, 2, 3, 0, 1)); }
DIJIANG_INLINE v128_t joined(v128_t low, v128_t high) { return wasm_i64x2_shuffle(low, high, 0, 2); }

__attribute__((noinline)) inline v128_t fused_with_care(v128_t a, v128_t b, v128_t c) {
  return joined(fused_pair(lower(a), lower(b), lower(c)), fused_pair(upper(a), upper(b), upper(c)));
}

DIJIANG_INLINE v128_t fused(v128_t a, v128_t b, v128_t c) {
#ifdef __wasm_relaxed_simd__
  return wasm_f32x4_relaxed_madd(a, b, c);
#else
  const v128_t low = wasm_f64x2_add(wasm_f64x2_mul(lower(a), lower(b)), lower(c));
  const v128_t high = wasm_f64x2_add(wasm_f64x2_mul(upper(a), upper(b)), upper(c));
  const v128_t twice = joined(wasm_f32x4_demote_f64x2_zero(low), wasm_f32x4_demote_f64x2_zero(high));
  // Two roundings are one, but where the first one ends in the middle of two floats: in bits 10...0 after the 24 of the result.
  // Subnormal ones have fewer, and so has what became the smallest normal one.
  const v128_t rest = wasm_i32x4_shl(wasm_i32x4_shuffle(low, high, 0, 2, 4, 6), 3);
  const v128_t middle = wasm_i32x4_eq(rest, wasm_i32x4_splat(INT32_MIN));
  const v128_t tiny = wasm_i32x4_le(wasm_v128_and(twice, wasm_i32x4_splat(0x7fffffff)), wasm_i32x4_splat(0x00800000));
  if (__builtin_expect(!wasm_v128_any_true(wasm_v128_or(middle, tiny)), 1)) return twice;
  return fused_with_care(a, b, c);
#endif
}
#endif

DIJIANG_INLINE Wide fused(float a, Wide b, Wide c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
#elif defined(__aarch64__) && defined(DIJIANG_HARDWARE_FMA)
  return vfmaq_n_f32(c, b, a);
#elif defined(__wasm_simd128__)
  return Wide(fused(wasm_f32x4_splat(a), v128_t(b), v128_t(c)));
#else
  for (int i = 0; i < kWide; i++) c[i] = fused(a, b[i], c[i]);
  return c;
#endif
}

DIJIANG_INLINE float larger(float a, float b) { return a > b ? a : b; }
DIJIANG_INLINE float add(float a, float b) { return a + b; }
DIJIANG_INLINE float add_square(float sum, float x) { return fused(x, x, sum); }

// exp(x) within 2 ulp: 2^n times a polynomial in the rest (coefficients as in Cephes expf).
DIJIANG_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;  // NaN stays
  x = x > 88.0f ? 88.0f : x;
  // Added to 1.5 2^23, a number is rounded to an integer, which is in the last bits of the sum.
  const float shifted = fused(x, 1.44269504f, 12582912.0f), n = shifted - 12582912.0f;
  float r = fused(n, -0.693145752f, x);
  r = fused(n, -1.42860677e-6f, r);
  float p = fused(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p, r * r, r) + 1.0f;
  return p * bits_of<float>((bits_of<uint32_t>(shifted) + 127u) << 23);
}

// exp(x) as float64 rounds it. A decay is applied once a token, so that its error grows with the length
// of what is remembered.
DIJIANG_INLINE float exact_exponential(float argument) {
  double x = argument;
  x = x < -150.0 ? -150.0 : x;  // 0 as a float
  x = x > 100.0 ? 100.0 : x;    // infinite as a float
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0, n = shifted - 6755399441055744.0;
  const double r = (x - n * 0.69314718036912382) - n * 1.9082149292705877e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return static_cast<float>(p * bits_of<double>((bits_of<uint64_t>(shifted) + 1023u) << 52));
}

// erf(x), absolute error below 1.5e-7 (Abramowitz and Stegun 7.1.26).
DIJIANG_INLINE float error_function(float x) {
  const float a = __builtin_fabsf(x);
  const float t = 1.0f / fused(0.3275911f, a, 1.0f);
  float p = fused(1.061405429f, t, -1.453152027f);
  p = fused(p, t, 1.421413741f);
  p = fused(p, t, -0.284496736f);
  p = fused(p, t, 0.254829592f);
  return __builtin_copysignf(fused(-(p * t), exponential(-a * a), 1.0f), x);
}

DIJIANG_INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }
// x / (1 + exp(y)). Beyond 88 `exponential` stays where it is, and the whole is 0.
DIJIANG_INLINE float over_exponential(float x, float y) { return y > 88.0f ? x * 0.0f : x / (1.0f + exponential(y)); }
DIJIANG_INLINE float silu(float x) { return over_exponential(x, -x); }
DIJIANG_INLINE float gelu(float x) { return 0.5f * x * (1.0f + error_function(x * 0.707106781f)); }
DIJIANG_INLINE float gelu_tanh(float x) {
  return over_exponential(x, -1.595769122f * fused(0.044715f * x * x, x, x));
}

}  // namespace
}  // namespace dijiang
