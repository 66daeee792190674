// Domain `dijiang`, type `AddNorm`: a, b, weight, bias -> norm of a + b, a + b.
#include "norm.h"
#include "operators.h"

namespace dijiang {
namespace {

struct NormKernel : OnCpu {
  static constexpr const char* kName = "AddNorm";
  static constexpr size_t kInputs = 4, kOptionalFrom = 3, kOutputs = 2;
  static int type(size_t) { return ort::kFloat; }

  const ort::Api& api;
  const Kernels& kernels;
  int64_t centred = 0;
  float epsilon = 0.0f;

  NormKernel(const ort::Api& api, const Kernels& kernels) : api(api), kernels(kernels) {}

  ort::Status* read(const ort::Info* info) {
    CHECK(api.attribute(info, "centred", &centred));
    return api.attribute(info, "epsilon", &epsilon);
  }

  ort::Status* run(ort::Context* context) const {
    float* data[kInputs];
    for (size_t i = 0; i < kInputs; i++) CHECK(data_of(api, context, i, &data[i]));
    int64_t shape[3];
    CHECK(dims_of(api, context, 0, shape, 3, "AddNorm: rank of the input, expected 3"));
    Norm norm{};
    norm.rows = shape[0] * shape[1], norm.width = shape[2], norm.centred = centred != 0, norm.epsilon = epsilon;
    const int64_t numbers[kInputs] = {norm.rows * norm.width, norm.rows * norm.width, norm.width, norm.width};
    for (size_t i = 1; i < kInputs; i++)
      if (i < kOptionalFrom || data[i]) CHECK(expect_count(api, context, i, numbers[i], "AddNorm: sizes of its inputs"));
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
