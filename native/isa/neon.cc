// aarch64, whose every processor has NEON and a fused multiply-add: registers of 4 numbers.
#define DIJIANG_HARDWARE_FMA
#include "../lanes/neon.h"
#include "../gptq_kernel.h"
#include "../matmul_kernel.h"
#include "../norm_kernel.h"
#include "../step_kernel.h"

namespace dijiang {
const Kernels kNeon = {"neon", attend, finish, activate, multiply_add, add_norm, round_row, multiply, gptq};
}
