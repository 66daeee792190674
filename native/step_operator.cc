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
  // After what both have: where the tokens of each sequence begin.
  static constexpr size_t kStarts = kCount, kInputs = kCount + 1, kOptionalFrom = kCos, kOutputs = 2;
  static int type(size_t i) { return i == kStarts ? ort::kLong : ort::kFloat; }

  const ort::Api& api;
  const Kernels& kernels;
  StepAttributes node;

  StepKernel(const ort::Api& api, const Kernels& kernels) : api(api), kernels(kernels) {}

  ort::Status* read(const ort::Info* info) { return node.read(api, info); }

  ort::Status* run(ort::Context* context) const {
    float* data[kCount];
    int64_t state[4];
    Step step{};
    CHECK(read_inputs(api, context, node, step, data, kCount, state));
    CHECK(read_starts(context, step, state[0]));
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

  // Every row is of one sequence: nothing is written twice, or outside of the tensors.
  ort::Status* read_starts(const ort::Context* context, Step& step, int64_t sequences) const {
    constexpr const char* kComplaint = "RecurrentStep: where sequences start";
    int64_t* starts;
    CHECK(data_of(api, context, kStarts, &starts));
    step.starts = starts, step.sequences = sequences;
    if (!starts) return sequences == step.batch ? nullptr : api.fail(kComplaint);
    CHECK(expect_count(api, context, kStarts, sequences + 1, kComplaint));
    for (int64_t s = 0; s < sequences; s++)
      if (starts[s] > starts[s + 1]) return api.fail(kComplaint);
    return starts[0] == 0 && starts[sequences] == step.rows() ? nullptr : api.fail(kComplaint);
  }
};

}  // namespace

ort::Op step_op() { return make_op<StepKernel>(); }

}  // namespace dijiang
