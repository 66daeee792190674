// x86-64 with AVX-512 as in avx512.cc, and its VNNI.
#define DIJIANG_HARDWARE_FMA
#include "../lanes/avx512vnni.h"
#include "../gptq_kernel.h"
#include "../matmul_kernel.h"
#include "../norm_kernel.h"
#include "../step_kernel.h"

namespace dijiang {
const Kernels kAvx512Vnni = {"avx512vnni", attend, finish, activate, multiply_add, add_norm, round_row, multiply, gptq};
}
