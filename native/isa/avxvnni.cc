// x86-64 with AVX2 and AVX-VNNI, as processors without AVX-512 have it.
#define DIJIANG_HARDWARE_FMA
#include "../lanes/avxvnni.h"
#include "../gptq_kernel.h"
#include "../matmul_kernel.h"
#include "../norm_kernel.h"
#include "../step_kernel.h"

namespace dijiang {
const Kernels kAvxVnni = {"avxvnni", attend, finish, activate, multiply_add, add_norm, round_row, multiply, gptq};
}
