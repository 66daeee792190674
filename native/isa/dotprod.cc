// aarch64 with the dot product of ARMv8.2.
#define DIJIANG_HARDWARE_FMA
#include "../lanes/neon.h"
#include "../gptq_kernel.h"
#include "../matmul_kernel.h"
#include "../norm_kernel.h"
#include "../step_kernel.h"

namespace dijiang {
const Kernels kDotprod = {"dotprod", attend, finish, activate, multiply_add, add_norm, round_row, multiply, gptq};
}
