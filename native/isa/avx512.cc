// x86-64 with AVX-512 F, BW, CD, DQ and VL: registers of 16 numbers.
#define DIJIANG_HARDWARE_FMA
#include "../lanes/avx2.h"
#include "../gptq_kernel.h"
#include "../matmul_kernel.h"
#include "../norm_kernel.h"
#include "../step_kernel.h"

namespace dijiang {
const Kernels kAvx512 = {"avx512", attend, finish, activate, multiply_add, add_norm, round_row, multiply, gptq};
}
