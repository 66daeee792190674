// GPTQ of 16 outputs at once, written once and compiled by each file of isa/. Outputs are independent, so
// that each has a lane of its own and every instruction set gives the same bits.
#pragma once

#include "arithmetic.h"
#include "gptq.h"

namespace dijiang {
namespace {

constexpr int kOutputs = kOutputsTogether;
constexpr float kStarts[] = {1.0f, 0.94f, 0.88f, 0.82f};  // of the scale that just covers a block
constexpr int kNext = 4;                                  // inputs that are corrected together

DIJIANG_INLINE float nearest_code(float x, float bound) {
  x = x < -bound ? -bound : x;
  x = x > bound - 1.0f ? bound - 1.0f : x;
  return (x + 12582912.0f) - 12582912.0f;
}

// Blocks of a smaller scale are dead: they take this one.
DIJIANG_INLINE float least_of(ScaleType type) { return type == ScaleType::kFloat16 ? 0x1p-24f : 0x1p-119f; }

DIJIANG_INLINE bool is_dead(float scale, float least) { return scale < least && scale > -least; }

// The nearest bfloat16 of a finite number, the even one of two.
DIJIANG_INLINE float nearest_bfloat(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  return bits_of<float>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

// The nearest float16 of a finite number, the even one of two; beyond them the number itself.
DIJIANG_INLINE float nearest_half(float x) {
  const float size = x < 0.0f ? -x : x;
  if (size > 65504.0f) return x;
  if (size < 0x1p-14f) return (x + 0.75f) - 0.75f;  // a float32 there is a multiple of 2^-24
  const uint32_t bits = bits_of<uint32_t>(x);
  return bits_of<float>((bits + 0xfffu + (bits >> 13 & 1u)) & 0xffffe000u);
}

DIJIANG_INLINE float stored(float scale, ScaleType type) {
  return type == ScaleType::kBfloat16  ? nearest_bfloat(scale)
         : type == ScaleType::kFloat16 ? nearest_half(scale)
                                       : scale;
}

// The scale of a block of w [block, 16] that loses least, weighted by importance.
DIJIANG_INLINE void best_scales(const float* __restrict w, const float* __restrict importance, int64_t block,
                                int64_t bits, float least, float* __restrict best) {
  const float bound = static_cast<float>(int64_t{1} << (bits - 1));
  float low[kOutputs], high[kOutputs], start[kOutputs], gain[kOutputs];
  for (int l = 0; l < kOutputs; l++) low[l] = high[l] = w[l], gain[l] = -1.0f;
  for (int64_t k = 1; k < block; k++)
    for (int l = 0; l < kOutputs; l++) {
      const float x = w[k * kOutputs + l];
      low[l] = x < low[l] ? x : low[l];
      high[l] = x > high[l] ? x : high[l];
    }
  for (int l = 0; l < kOutputs; l++) {
    const float covering = (-low[l] >= high[l] ? low[l] : high[l]) / -bound;
    best[l] = start[l] = is_dead(covering, least) ? least : covering;
  }
  if (bits > 4) return;
  for (const float factor : kStarts) {
    float inverse[kOutputs], norm[kOutputs] = {}, fit[kOutputs] = {};
    for (int l = 0; l < kOutputs; l++) inverse[l] = 1.0f / (start[l] * factor);
    for (int64_t k = 0; k < block; k++)
      for (int l = 0; l < kOutputs; l++) {
        const float x = w[k * kOutputs + l], code = nearest_code(x * inverse[l], bound);
        const float weighted = importance[k] * code;
        norm[l] = fused(weighted, code, norm[l]);
        fit[l] = fused(weighted, x, fit[l]);
      }
    for (int l = 0; l < kOutputs; l++) {
      const float found = norm[l] > 0.0f ? fit[l] * fit[l] / norm[l] : 0.0f;
      if (!(found > gain[l])) continue;
      gain[l] = found;
      if (norm[l] > 0.0f && !is_dead(fit[l] / norm[l], least)) best[l] = fit[l] / norm[l];
    }
  }
}

// Outputs 16 tile to 16 tile + 15. room: inputs x 16 numbers; each is a weight until it is an error.
void gptq(const Gptq& g, int64_t tile, float* room) {
  const int64_t first = tile * kOutputs, left = g.outputs - first, count = left < kOutputs ? left : kOutputs;
  const float bound = static_cast<float>(int64_t{1} << (g.bits - 1));
  float* __restrict w = room;
  for (int64_t k = 0; k < g.inputs; k++)
    for (int64_t l = 0; l < kOutputs; l++)
      w[k * kOutputs + l] = l < count ? g.left[(first + l) * g.inputs + k] : 0.0f;
  for (int64_t start = 0; start < g.inputs; start += g.block) {
    float scale[kOutputs];
    best_scales(w + start * kOutputs, g.importance + start, g.block, g.bits, least_of(g.scale_type), scale);
    for (float& one : scale) one = stored(one, g.scale_type);
    for (int64_t l = 0; l < count; l++)
      g.scales[((first + l) * g.inputs + start) / g.block] = scale[l];
    for (int64_t j = 0; j < g.block; j++) {
      const float* upper = g.upper + (start + j) * g.inputs + start;
      float* error = w + (start + j) * kOutputs;
      float code[kOutputs];
      for (int l = 0; l < kOutputs; l++) {
        code[l] = nearest_code(error[l] / scale[l], bound);
        error[l] = (error[l] - code[l] * scale[l]) / upper[j];
      }
      for (int64_t l = 0; l < count; l++)
        g.codes[(first + l) * g.inputs + start + j] = static_cast<uint8_t>(code[l] + bound);
      for (int64_t k = j + 1; k < g.block; k++)
        for (int l = 0; l < kOutputs; l++) {
          float* next = w + (start + k) * kOutputs + l;
          *next = fused(-error[l], upper[k], *next);
        }
    }
    // All later blocks, a few inputs at a time: their numbers stay in registers.
    for (int64_t k = start + g.block; k < g.inputs; k += kNext) {
      float next[kNext][kOutputs];
      std::memcpy(next, w + k * kOutputs, sizeof next);
      for (int64_t j = 0; j < g.block; j++) {
        const float* upper = g.upper + (start + j) * g.inputs + k;
        const float* error = w + (start + j) * kOutputs;
        for (int n = 0; n < kNext; n++)
          for (int l = 0; l < kOutputs; l++) next[n][l] = fused(-error[l], upper[n], next[n][l]);
      }
      std::memcpy(w + k * kOutputs, next, sizeof next);
    }
  }
  for (int64_t l = 0; l < count; l++)
    for (int64_t k = 0; k < g.inputs; k++) g.left[(first + l) * g.inputs + k] = w[k * kOutputs + l];
}

}  // namespace
}  // namespace dijiang
