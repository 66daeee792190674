// Domain `dijiang`, type `AddNorm`: a, b, weight, bias -> norm of a + b, a + b.
#include "norm.h"
#include "norm_inputs.h"

namespace dijiang {
namespace {

struct NormKernel : OnCpu {
  static constexpr const char* kName = "AddNorm";
  static constexpr size_t kInputs = 4, kOptionalFrom = 3, kOutputs = 2;
  static int type(size_t) { return ort::kFloat; }

  const ort::Api& api;
  const Kernels& kernels;
  NormAttributes node;

  NormKernel(const ort::Api& api, const Kernels& kernels) : api(api), kernels(kernels) {}

  ort::Status* read(const ort::Info* info) { return node.read(api, info); }

  ort::Status* run(ort::Context* context) const {
    float* data[kInputs];
    int64_t shape[3];
    CHECK(read_norm_inputs(api, context, data, kInputs, shape));
    Norm norm{};
    norm.rows = shape[0] * shape[1], norm.width = shape[2];
    norm.centred = node.centred != 0, norm.epsilon = node.epsilon;
    norm.a = data[0], norm.b = data[1], norm.weight = data[2], norm.bias = data[3];
    ort::Value *output, *sum;
    CHECK(api.output(context, 0, shape, 3, &output));
    CHECK(api.output(context, 1, shape, 3, &sum));
    CHECK(api.data(output, reinterpret_cast<void**>(&norm.output)));
    CHECK(api.data(sum, reinterpret_cast<void**>(&norm.sum)));

    struct Work {
      const Norm& norm;
      const Kernels& kernels;
    } work{norm, kernels};
    return for_each(
        api, context,
        [](void* data, size_t row) {
          const Work& work = *static_cast<Work*>(data);
          work.kernels.add_norm(work.norm, row);
        },
        norm.rows, &work);
  }
};

}  // namespace

ort::Op norm_op() { return make_op<NormKernel>(); }

}  // namespace dijiang
