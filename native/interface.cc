// The library's plain C interface, which Python reads by ctypes (dijiang/runtime/operators.py), so that
// nothing that C++ knows is written down twice. RegisterCustomOps, for ONNX Runtime, is in registration.cc.
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "dispatch.h"
#include "gptq.h"
#include "step.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// The instruction sets that this processor runs, best first, with spaces between.
EXPORT const char* dijiang_isa_names() { return dijiang::isa_names(); }

// The one that is used; null: DIJIANG_ISA asks for what cannot be had, and dijiang_isa_error says why.
EXPORT const char* dijiang_isa() {
  const dijiang::Kernels* kernels = dijiang::choice().kernels;
  return kernels ? kernels->name : nullptr;
}

// Why there is none, in one line; null: there is one.
EXPORT const char* dijiang_isa_error() { return dijiang::choice().error; }

// The largest head size that the step has room for.
EXPORT int64_t dijiang_longest_head() { return dijiang::kLongestHead; }

// All activations, with spaces between.
EXPORT const char* dijiang_activation_names() {
#define NAME(name, number) #name " "
  static const char names[] = DIJIANG_ACTIVATIONS(NAME);
#undef NAME
  return names;
}

// The number that a graph stores for an activation; -1: none has this name.
EXPORT int64_t dijiang_activation_number(const char* asked) {
#define NUMBER(name, number) \
  if (!std::strcmp(asked, #name)) return number;
  DIJIANG_ACTIVATIONS(NUMBER)
#undef NUMBER
  return -1;
}

// y[i] = f(x[i]) of the activation with this number. -1: there is none, or no instruction set.
EXPORT int dijiang_activation(int64_t number, const float* x, float* y, int64_t n) {
  const dijiang::Kernels* kernels = dijiang::choice().kernels;
  if (!kernels || !dijiang::is_activation(number)) return -1;
  kernels->activate(number, x, y, n);
  return 0;
}

// out[i] = a[i] b[i] + c[i], rounded once: what all sets build on. -1: no instruction set.
EXPORT int dijiang_multiply_add(const float* a, const float* b, const float* c, float* out, int64_t n) {
  const dijiang::Kernels* kernels = dijiang::choice().kernels;
  if (!kernels) return -1;
  kernels->multiply_add(a, b, c, out, n);
  return 0;
}

// GPTQ of `outputs` rows of a weight [outputs, inputs], see gptq.h. -1: shapes, no memory or no instruction set.
EXPORT int dijiang_gptq(float* left, const float* upper, const float* importance, uint8_t* codes,
                        float* scales, int64_t outputs, int64_t inputs, int64_t block, int64_t bits,
                        int64_t scale_type) {
  const dijiang::Kernels* kernels = dijiang::choice().kernels;
  constexpr int64_t kMost = int64_t{1} << 40;
  if (outputs < 1 || inputs < 1 || inputs > kMost) return -1;
  if (!kernels || block < 4 || block % 4 || inputs % block || bits < 2 || bits > 8 || scale_type < 0 || scale_type > 2) return -1;
  const auto type = static_cast<dijiang::ScaleType>(scale_type);
  const dijiang::Gptq g{outputs, inputs, block, bits, upper, importance, left, codes, scales, type};
  std::unique_ptr<float[]> room(new (std::nothrow) float[inputs * dijiang::kOutputsTogether]);
  if (!room) return -1;
  for (int64_t tile = 0; tile * dijiang::kOutputsTogether < outputs; tile++) kernels->gptq(g, tile, room.get());
  return 0;
}
