// Domain `dijiang`, type `RecurrentStep`: all of a layer that stands between the projections.
#include <cstring>

#include "step_inputs.h"

namespace dijiang {
namespace {

// What ONNX Runtime's threads are handed.
struct Work {
  const Step& step;
  const Kernels& kernels;

  static void attend(void* data, size_t unit) {
    const Work& work = *static_cast<Work*>(data);
    work.kernels.attend(work.step, unit);
  }
  static void finish(void* data, size_t row) {
    const Work& work = *static_cast<Work*>(data);
    work.kernels.finish(work.step, row);
  }
};

struct StepKernel : OnCpu {
  static constexpr const char* kName = "RecurrentStep";
  static constexpr size_t kInputs = kCount, kOptionalFrom = kCos, kOutputs = 2;
  static int type(size_t) { return ort::kFloat; }

  const ort::Api& api;
  const Kernels& kernels;
  StepAttributes node;

  StepKernel(const ort::Api& api, const Kernels& kernels) : api(api), kernels(kernels) {}

  ort::Status* read(const ort::Info* info) { return node.read(api, info); }

  ort::Status* run(ort::Context* context) const {
    float* data[kInputs];
    int64_t state[4];
    Step step{};
    CHECK(read_inputs(api, context, node, step, data, kInputs, state));
    step.packed = data[kPacked], step.cos = data[kCos], step.sin = data[kSin];
    step.projection = data[kProjection], step.scales = data[kScales];
    step.log_decay = data[kLogDecay], step.mask = data[kMask];
    step.weight = data[kWeight], step.bias = data[kBias];

    ort::Value *output, *present;
    const int64_t shape[3] = {step.batch, step.tokens, step.output_width()};
    CHECK(api.output(context, 0, shape, 3, &output));
    CHECK(api.output(context, 1, state, 4, &present));
    CHECK(api.data(output, reinterpret_cast<void**>(&step.output)));
    CHECK(api.data(present, reinterpret_cast<void**>(&step.state)));
    if (step.state != data[kState])
      std::memcpy(step.state, data[kState], step.units() * step.size * step.size * sizeof(float));

    Work work{step, kernels};
    CHECK(api.parallel(context, Work::attend, step.units(), 0, &work));
    return for_each(api, context, Work::finish, step.rows(), &work);
  }
};

}  // namespace

ort::Op step_op() { return make_op<StepKernel>(); }

}  // namespace dijiang
