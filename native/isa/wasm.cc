// WebAssembly with its SIMD, plain or relaxed: registers of 4 numbers. The Makefile compiles it, for web/. No weight is rounded
// in a browser.
#include "../lanes/wasm.h"
#include "../matmul_kernel.h"
#include "../norm_kernel.h"
#include "../step_kernel.h"

namespace dijiang {
const Kernels kWasm = {"wasm", attend, finish, activate, multiply_add, add_norm, round_row, multiply, nullptr};
}
