// The step as an ONNX Runtime custom operator: domain `dijiang`, type `RecurrentStep`.
#include <cstring>
#include <memory>

#include "dispatch.h"
#include "onnxruntime_abi.h"
#include "step.h"

namespace {

using dijiang::Step;

enum Input { kPacked, kProjection, kLogDecay, kMask, kState, kWeight, kBias, kCos, kSin, kScales, kInputs };

#define CHECK(call) \
  if (ort::Status* failed = (call)) return failed

// What ONNX Runtime's threads are handed.
struct Work {
  const Step& step;
  const dijiang::Kernels& kernels;

  static void attend(void* data, size_t unit) {
    const Work& work = *static_cast<Work*>(data);
    work.kernels.attend(work.step, unit);
  }
  static void finish(void* data, size_t row) {
    const Work& work = *static_cast<Work*>(data);
    work.kernels.finish(work.step, row);
  }
};

struct Kernel {
  const ort::Api& api;
  const dijiang::Kernels& kernels;
  int64_t heads, groups, activation;
  float epsilon;

  ort::Status* read(const ort::Info* info) {
    CHECK(api.attribute(info, "num_heads", &heads));
    CHECK(api.attribute(info, "kv_num_heads", &groups));
    CHECK(api.attribute(info, "activation", &activation));
    if (activation && !dijiang::is_activation(activation))
      return api.fail("RecurrentStep: unknown activation; this library is older than the graph");
    return api.attribute(info, "epsilon", &epsilon);
  }

  ort::Status* dims(const ort::Value* value, int64_t* out, size_t rank) const {
    ort::Shape* shape;
    CHECK(api.shape(value, &shape));
    size_t found;
    ort::Status* status = api.rank(shape, &found);
    if (!status) status = found == rank ? api.dims(shape, out, rank) : api.fail("RecurrentStep: rank");
    api.release(shape);
    return status;
  }

  ort::Status* run(ort::Context* context) const {
    const ort::Value* values[kInputs];
    float* data[kInputs];
    for (size_t i = 0; i < kInputs; i++) {
      CHECK(api.input(context, i, &values[i]));
      data[i] = nullptr;  // stays so where an optional input is left out
      if (values[i])
        CHECK(api.data(const_cast<ort::Value*>(values[i]), reinterpret_cast<void**>(&data[i])));
    }
    int64_t packed[3], state[4], angles[3] = {0, 0, 0};
    CHECK(dims(values[kPacked], packed, 3));
    CHECK(dims(values[kState], state, 4));
    if (values[kCos]) CHECK(dims(values[kCos], angles, 3));

    Step step{};
    step.batch = packed[0], step.tokens = packed[1];
    step.heads = heads, step.groups = groups, step.size = state[2], step.rotary = 2 * angles[2];
    step.mlp = packed[2] - (2 * heads + 2 * groups) * step.size;
    step.activation = activation, step.epsilon = epsilon;
    if (state[0] != step.batch || state[1] != groups || state[3] != step.size || step.mlp < 0 ||
        (step.mlp > 0 && !activation) || step.size > dijiang::kLongestHead)
      return api.fail("RecurrentStep: shapes of packed and state");
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
    if (step.rows() > 1) return api.parallel(context, Work::finish, step.rows(), 0, &work);
    Work::finish(&work, 0);  // shorter than waking the threads
    return nullptr;
  }
};

ort::Status* create(const ort::Op*, const ort::Api* api, const ort::Info* info, void** out) {
  auto kernel = std::make_unique<Kernel>(Kernel{*api, *dijiang::choice().kernels, 0, 0, 0, 0.0f});
  CHECK(kernel->read(info));
  *out = kernel.release();
  return nullptr;
}

ort::Op make_op() {
  ort::Op op{};
  op.version = ort::kApiVersion;
  op.name = [](const ort::Op*) { return "RecurrentStep"; };
  op.provider = [](const ort::Op*) -> const char* { return nullptr; };  // CPU
  op.input_type = op.output_type = [](const ort::Op*, size_t) { return ort::kFloat; };
  op.input_count = [](const ort::Op*) -> size_t { return kInputs; };
  op.output_count = [](const ort::Op*) -> size_t { return 2; };
  op.input_kind = [](const ort::Op*, size_t i) { return i < kCos ? ort::kRequired : ort::kOptional; };
  op.output_kind = [](const ort::Op*, size_t) { return ort::kRequired; };
  op.input_memory = [](const ort::Op*, size_t) { return 0; };
  op.create = create;
  op.compute = [](void* kernel, ort::Context* context) {
    return static_cast<Kernel*>(kernel)->run(context);
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.first_version = [](const ort::Op*) { return 1; };
  op.last_version = [](const ort::Op*) { return 1 << 30; };
  return op;
}

}  // namespace

// What SessionOptions.register_custom_ops_library calls.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(
    ort::Options* options, const ort::ApiBase* base) {
  static const ort::Op op = make_op();
  const ort::Api* api = base->get(ort::kApiVersion);
  if (!api) return base->get(1)->fail("the native graph needs onnxruntime 1.17 or newer");
  if (const char* error = dijiang::choice().error) return api->fail(error);
  ort::Domain* domain;
  CHECK(api->create_domain("dijiang", &domain));
  CHECK(api->add_op(domain, &op));
  return api->add_domain(options, domain);
}
