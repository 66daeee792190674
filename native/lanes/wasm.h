// `Lanes` in WebAssembly's registers of 128 bits: a vector of 64 codes is four of them. Sums are exact in every engine.
//
// Plain SIMD widens codes to 16 bits. Relaxed SIMD multiplies bytes, four at a time, where the second one has 7 bits: then all
// engines give the same. So 4-bit codes are the second one. 8-bit codes are the first one, and an input is the difference of
// two numbers of 7 bits.
#pragma once

#include <wasm_simd128.h>

#include "../arithmetic.h"
#include "../matmul.h"

namespace dijiang {
namespace {

struct Quarters {
  struct Codes { v128_t part[4]; };
  struct Floats { v128_t part[4]; };
  static constexpr int kRows = 1, kTiles = 1, kAlone = 1;

  DIJIANG_INLINE static Codes load(const uint8_t* bytes) {
    Codes codes;
    for (int i = 0; i < 4; i++) codes.part[i] = wasm_v128_load(bytes + 16 * i);
    return codes;
  }
  DIJIANG_INLINE static Floats none() {
    Floats values;
    for (v128_t& part : values.part) part = wasm_f32x4_splat(0);
    return values;
  }
  DIJIANG_INLINE static Floats floats(const float* p) {
    Floats values;
    for (int i = 0; i < 4; i++) values.part[i] = wasm_v128_load(p + 4 * i);
    return values;
  }
  DIJIANG_INLINE static Floats bfloats(const uint16_t* p) {
    Floats values;
    for (int i = 0; i < 4; i++) values.part[i] = wasm_i32x4_shl(wasm_u32x4_load16x4(p + 4 * i), 16);
    return values;
  }
  DIJIANG_INLINE static void store(float* p, const Floats& values) {
    for (int i = 0; i < 4; i++) wasm_v128_store(p + 4 * i, values.part[i]);
  }
  // One quarter of `scaled`, with its 4 sums whole.
  DIJIANG_INLINE static v128_t scaled_quarter(v128_t sums, int32_t offset, v128_t scales, float scale, v128_t acc) {
    const v128_t exact = wasm_f32x4_convert_i32x4(wasm_i32x4_sub(sums, wasm_i32x4_splat(offset)));
    return fused(exact, wasm_f32x4_mul(scales, wasm_f32x4_splat(scale)), acc);
  }
};

#ifdef __wasm_relaxed_simd__

struct Lanes : Quarters {
  struct Halves { v128_t part[4]; };  // codes of 4 bits
  struct Sums { v128_t above[4], below[4]; };
  struct Inputs { v128_t all, above, below; };  // all = above - below, and neither is negative
  static constexpr int32_t kOffset = 0;

  DIJIANG_INLINE static Halves low(const Codes& codes) {
    Halves halves;
    for (int i = 0; i < 4; i++) halves.part[i] = wasm_v128_and(codes.part[i], wasm_i8x16_splat(15));
    return halves;
  }
  DIJIANG_INLINE static Halves high(const Codes& codes) {
    Halves halves;
    for (int i = 0; i < 4; i++) halves.part[i] = wasm_u8x16_shr(codes.part[i], 4);
    return halves;
  }
  DIJIANG_INLINE static Sums zero() {
    Sums sums;
    for (int i = 0; i < 4; i++) sums.above[i] = sums.below[i] = wasm_i32x4_splat(0);
    return sums;
  }
  DIJIANG_INLINE static Inputs repeat(const int8_t* a) {
    const v128_t all = wasm_v128_load32_splat(a), none = wasm_i8x16_splat(0);
    return {all, wasm_i8x16_max(all, none), wasm_i8x16_max(wasm_i8x16_neg(all), none)};
  }
  DIJIANG_INLINE static void dot(Sums& sums, const Codes& codes, const Inputs& four) {
    for (int i = 0; i < 4; i++) {
      const v128_t values = wasm_v128_xor(codes.part[i], wasm_i8x16_splat(-128));
      sums.above[i] = wasm_i32x4_relaxed_dot_i8x16_i7x16_add(values, four.above, sums.above[i]);
      sums.below[i] = wasm_i32x4_relaxed_dot_i8x16_i7x16_add(values, four.below, sums.below[i]);
    }
  }
  DIJIANG_INLINE static void dot(Sums& sums, const Halves& codes, const Inputs& four) {
    for (int i = 0; i < 4; i++)
      sums.above[i] = wasm_i32x4_relaxed_dot_i8x16_i7x16_add(four.all, codes.part[i], sums.above[i]);
  }
  DIJIANG_INLINE static Floats scaled(const Sums& sums, int32_t offset, const Floats& scales, float scale,
                                      Floats acc) {
    for (int i = 0; i < 4; i++) {
      const v128_t whole = wasm_i32x4_sub(sums.above[i], sums.below[i]);
      acc.part[i] = scaled_quarter(whole, offset, scales.part[i], scale, acc.part[i]);
    }
    return acc;
  }
};

#else

struct Lanes : Quarters {
  struct Sums { v128_t pairs[8]; };  // two outputs each, each in two parts
  using Inputs = v128_t;
  static constexpr int32_t kOffset = 128;

  DIJIANG_INLINE static Codes low(Codes codes) {
    for (v128_t& part : codes.part) part = wasm_v128_and(part, wasm_i8x16_splat(15));
    return codes;
  }
  DIJIANG_INLINE static Codes high(Codes codes) {
    for (v128_t& part : codes.part) part = wasm_u8x16_shr(part, 4);
    return codes;
  }
  DIJIANG_INLINE static Sums zero() {
    Sums sums;
    for (v128_t& pairs : sums.pairs) pairs = wasm_i32x4_splat(0);
    return sums;
  }
  DIJIANG_INLINE static Inputs repeat(const int8_t* a) {
    return wasm_i16x8_extend_low_i8x16(wasm_v128_load32_splat(a));
  }
  DIJIANG_INLINE static void dot(Sums& sums, const Codes& codes, Inputs four) {
    for (int i = 0; i < 4; i++) {
      const v128_t first = wasm_u16x8_extend_low_u8x16(codes.part[i]);
      const v128_t second = wasm_u16x8_extend_high_u8x16(codes.part[i]);
      sums.pairs[2 * i] = wasm_i32x4_add(sums.pairs[2 * i], wasm_i32x4_dot_i16x8(first, four));
      sums.pairs[2 * i + 1] = wasm_i32x4_add(sums.pairs[2 * i + 1], wasm_i32x4_dot_i16x8(second, four));
    }
  }
  DIJIANG_INLINE static Floats scaled(const Sums& sums, int32_t offset, const Floats& scales, float scale,
                                      Floats acc) {
    for (int i = 0; i < 4; i++) {
      const v128_t one = sums.pairs[2 * i], two = sums.pairs[2 * i + 1];
      const v128_t whole = wasm_i32x4_add(wasm_i32x4_shuffle(one, two, 0, 2, 4, 6), wasm_i32x4_shuffle(one, two, 1, 3, 5, 7));
      acc.part[i] = scaled_quarter(whole, offset, scales.part[i], scale, acc.part[i]);
    }
    return acc;
  }
};

#endif

}  // namespace
}  // namespace dijiang
