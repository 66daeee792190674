// x86-64 with AVX2 and FMA: registers of 8 numbers.
#define DIJIANG_HARDWARE_FMA
#include "../lanes/avx2.h"
#include "../gptq_kernel.h"
#include "../matmul_kernel.h"
#include "../norm_kernel.h"
#include "../step_kernel.h"

namespace dijiang {
const Kernels kAvx2 = {"avx2", attend, finish, activate, multiply_add, add_norm, round_row, multiply, gptq};
}
