// Domain `dijiang`, type `RecurrentStep`: all of a layer that stands between the projections.
#include <cstring>

#include "operators.h"
#include "step.h"

namespace dijiang {
namespace {

enum Input { kPacked, kProjection, kLogDecay, kMask, kState, kWeight, kBias, kCos, kSin, kScales, kCount };

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

struct StepKernel {
  static constexpr const char* kName = "RecurrentStep";
  static constexpr size_t kInputs = kCount, kOptionalFrom = kCos, kOutputs = 2;
  static int type(size_t) { return ort::kFloat; }

  const ort::Api& api;
  const Kernels& kernels;
  int64_t heads = 0, groups = 0, activation = 0;
  float epsilon = 0.0f;

  StepKernel(const ort::Api& api, const Kernels& kernels) : api(api), kernels(kernels) {}

  ort::Status* read(const ort::Info* info) {
    CHECK(api.attribute(info, "num_heads", &heads));
    CHECK(api.attribute(info, "kv_num_heads", &groups));
    CHECK(api.attribute(info, "activation", &activation));
    if (activation && !is_activation(activation))
      return api.fail("RecurrentStep: unknown activation; this library is older than the graph");
    if (groups < 1 || heads < groups || heads % groups)
      return api.fail("RecurrentStep: num_heads and kv_num_heads do not go together");
    return api.attribute(info, "epsilon", &epsilon);
  }

  ort::Status* run(ort::Context* context) const {
    float* data[kInputs];
    for (size_t i = 0; i < kInputs; i++) CHECK(data_of(api, context, i, &data[i]));
    int64_t packed[3], state[4], angles[3] = {0, 0, 0};
    constexpr const char* kRank = "RecurrentStep: rank";
    CHECK(dims_of(api, context, kPacked, packed, 3, kRank));
    CHECK(dims_of(api, context, kState, state, 4, kRank));
    if (data[kCos]) CHECK(dims_of(api, context, kCos, angles, 3, kRank));

    Step step{};
    step.batch = packed[0], step.tokens = packed[1];
    step.heads = heads, step.groups = groups, step.size = state[2], step.rotary = 2 * angles[2];
    step.mlp = packed[2] - (2 * heads + 2 * groups) * step.size;
    step.activation = activation, step.epsilon = epsilon;
    // No more heads than channels: then no product here overflows.
    if (heads > packed[2] || state[0] != step.batch || state[1] != groups || state[3] != step.size ||
        step.mlp < 0 || (step.mlp > 0 && !activation) || step.size < 1 || step.size > kLongestHead)
      return api.fail("RecurrentStep: shapes of packed and state");
    // A graph may come from anybody: nothing outside of its tensors is read.
    if (step.rotary > step.size || !data[kCos] != !data[kSin]) return api.fail("RecurrentStep: rotary angles");
    const struct {
      Input input;
      int64_t numbers;
    } sizes[] = {
        {kProjection, step.size * step.size},
        {kLogDecay, step.rows() * groups},
        {kMask, step.rows()},
        {kWeight, step.width()},
        {kBias, step.width()},
        {kCos, step.rows() * angles[2]},
        {kSin, step.rows() * angles[2]},
        {kScales, step.rows() * (heads + groups)},
    };
    for (const auto& [input, numbers] : sizes)
      if (input < kOptionalFrom || data[input])
        CHECK(expect_count(api, context, input, numbers, "RecurrentStep: sizes of its inputs"));
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
