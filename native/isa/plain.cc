// What every processor of its family runs: the twin that all other sets must equal bit for bit.
#include "../lanes/plain.h"
#include "../gptq_kernel.h"
#include "../matmul_kernel.h"
#include "../norm_kernel.h"
#include "../step_kernel.h"

namespace dijiang {
const Kernels kPlain = {"plain", attend, finish, activate, multiply_add, add_norm, round_row, multiply, gptq};
}
