// `Lanes` in registers of NEON. Codes lose their offset when they are read: products are signed. With the
// dot product of ARMv8.2 four inputs are one instruction, without it two.
#pragma once

#include <arm_neon.h>

#include "../matmul.h"

namespace dijiang {
namespace {

struct Lanes {
  struct Codes { int8x16_t part[4]; };
  using Inputs = int8x16_t;
  struct Floats { float32x4_t part[4]; };
#ifdef __ARM_FEATURE_DOTPROD
  struct Sums { int32x4_t part[4]; };
  static constexpr int kRows = 4, kTiles = 1, kAlone = 4;
#else
  struct Sums { int32x4_t part[8]; };  // two outputs each, in two parts
  static constexpr int kRows = 1, kTiles = 1, kAlone = 4;
#endif
  static constexpr int32_t kOffset = 0;

  DIJIANG_INLINE static Codes load(const uint8_t* bytes) {
    Codes codes;
    for (int i = 0; i < 4; i++)
      codes.part[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(bytes + 16 * i), vdupq_n_u8(128)));
    return codes;
  }
  DIJIANG_INLINE static Codes low(Codes codes) {
    for (int8x16_t& part : codes.part) part = vandq_s8(part, vdupq_n_s8(15));
    return codes;
  }
  DIJIANG_INLINE static Codes high(Codes codes) {
    for (int8x16_t& part : codes.part)
      part = vreinterpretq_s8_u8(vshrq_n_u8(veorq_u8(vreinterpretq_u8_s8(part), vdupq_n_u8(128)), 4));
    return codes;
  }
  DIJIANG_INLINE static Sums zero() {
    Sums sums;
    for (int32x4_t& part : sums.part) part = vdupq_n_s32(0);
    return sums;
  }
  DIJIANG_INLINE static Floats none() {
    Floats values;
    for (float32x4_t& part : values.part) part = vdupq_n_f32(0);
    return values;
  }
  DIJIANG_INLINE static Inputs repeat(const int8_t* a) { return vreinterpretq_s8_s32(vdupq_n_s32(four_at(a))); }
  DIJIANG_INLINE static void dot(Sums& sums, const Codes& codes, Inputs four) {
#ifdef __ARM_FEATURE_DOTPROD
    for (int i = 0; i < 4; i++) sums.part[i] = vdotq_s32(sums.part[i], codes.part[i], four);
#else
    for (int i = 0; i < 4; i++) {
      const int16x8_t first = vmull_s8(vget_low_s8(codes.part[i]), vget_low_s8(four));
      const int16x8_t second = vmull_high_s8(codes.part[i], four);
      sums.part[2 * i] = vpadalq_s16(sums.part[2 * i], first);
      sums.part[2 * i + 1] = vpadalq_s16(sums.part[2 * i + 1], second);
    }
#endif
  }
  DIJIANG_INLINE static Floats floats(const float* p) {
    return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
  }
  DIJIANG_INLINE static Floats bfloats(const uint16_t* p) {
    Floats values;
    for (int i = 0; i < 4; i++) values.part[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return values;
  }
  DIJIANG_INLINE static void store(float* p, const Floats& values) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, values.part[i]);
  }
  DIJIANG_INLINE static Floats scaled(const Sums& sums, int32_t offset, const Floats& scales, float scale,
                                      Floats acc) {
    for (int i = 0; i < 4; i++) {
#ifdef __ARM_FEATURE_DOTPROD
      const int32x4_t whole = sums.part[i];
#else
      const int32x4_t whole = vpaddq_s32(sums.part[2 * i], sums.part[2 * i + 1]);
#endif
      const float32x4_t exact = vcvtq_f32_s32(vsubq_s32(whole, vdupq_n_s32(offset)));
      acc.part[i] = vfmaq_f32(acc.part[i], exact, vmulq_n_f32(scales.part[i], scale));
    }
    return acc;
  }
};

}  // namespace
}  // namespace dijiang
