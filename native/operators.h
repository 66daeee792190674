// What our custom operators share.
#pragma once

#include <array>
#include <memory>

#include "dispatch.h"
#include "onnxruntime_abi.h"

namespace dijiang {

#define CHECK(call) \
  if (ort::Status* failed = (call)) return failed

// What `look` finds in the shape of input `index`; an error unless the input is there.
template <class Look>
ort::Status* with_shape(const ort::Api& api, const ort::Context* context, size_t index, const char* complaint, Look look) {
  const ort::Value* value;
  CHECK(api.input(context, index, &value));
  if (!value) return api.fail(complaint);
  ort::Shape* shape;
  CHECK(api.shape(value, &shape));
  ort::Status* status = look(shape);
  api.release(shape);
  return status;
}

// Dimensions of input `index`; an error unless it is there and has this rank.
inline ort::Status* dims_of(const ort::Api& api, const ort::Context* context, size_t index, int64_t* out,
                            size_t rank, const char* complaint) {
  return with_shape(api, context, index, complaint, [&](ort::Shape* shape) {
    size_t found;
    if (ort::Status* failed = api.rank(shape, &found)) return failed;
    return found == rank ? api.dims(shape, out, rank) : api.fail(complaint);
  });
}

// An error unless input `index` is there and holds so many numbers, in whatever shape.
inline ort::Status* expect_count(const ort::Api& api, const ort::Context* context, size_t index, int64_t expected,
                                 const char* complaint) {
  return with_shape(api, context, index, complaint, [&](ort::Shape* shape) -> ort::Status* {
    size_t found;
    CHECK(api.count(shape, &found));
    return static_cast<int64_t>(found) == expected ? nullptr : api.fail(complaint);
  });
}

// Input `index` of a node; null where it is left out.
template <class T>
ort::Status* data_of(const ort::Api& api, const ort::Context* context, size_t index, T** out) {
  const ort::Value* value;
  CHECK(api.input(context, index, &value));
  void* data = nullptr;
  if (value) CHECK(api.data(const_cast<ort::Value*>(value), &data));
  *out = static_cast<T*>(data);
  return nullptr;
}

// work(data, i) for i in 0..count on the session's threads; of one alone here: that is shorter than waking them.
inline ort::Status* for_each(const ort::Api& api, ort::Context* context, void (*work)(void*, size_t), int64_t count,
                             void* data) {
  if (count > 1) return api.parallel(context, work, count, 0, data);
  if (count == 1) work(data, 0);
  return nullptr;
}

// Where an operator runs, and what it gives, unless its kernel says something else.
struct OnCpu {
  static constexpr const char* kProvider = nullptr;
  static int output_type(size_t) { return ort::kFloat; }
};

// An operator: Kernel has `kProvider`, `kName`, `kInputs`, `kOptionalFrom`, `kOutputs`, `type(input)`,
// `output_type(output)`, a constructor from (api, kernels), `read(info)` and `run(context)`.
template <class Kernel>
ort::Op make_op() {
  ort::Op op{};
  op.version = ort::kApiVersion;
  op.name = [](const ort::Op*) { return Kernel::kName; };
  op.provider = [](const ort::Op*) -> const char* { return Kernel::kProvider; };
  op.input_type = [](const ort::Op*, size_t i) { return Kernel::type(i); };
  op.output_type = [](const ort::Op*, size_t i) { return Kernel::output_type(i); };
  op.input_count = [](const ort::Op*) -> size_t { return Kernel::kInputs; };
  op.output_count = [](const ort::Op*) -> size_t { return Kernel::kOutputs; };
  op.input_kind = [](const ort::Op*, size_t i) { return i < Kernel::kOptionalFrom ? ort::kRequired : ort::kOptional; };
  op.output_kind = [](const ort::Op*, size_t) { return ort::kRequired; };
  op.input_memory = [](const ort::Op*, size_t) { return 0; };
  op.create = [](const ort::Op*, const ort::Api* api, const ort::Info* info, void** out) -> ort::Status* {
    auto kernel = std::make_unique<Kernel>(*api, *choice().kernels);
    CHECK(kernel->read(info));
    *out = kernel.release();
    return nullptr;
  };
  op.compute = [](void* kernel, ort::Context* context) { return static_cast<Kernel*>(kernel)->run(context); };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.first_version = [](const ort::Op*) { return 1; };
  op.last_version = [](const ort::Op*) { return 1 << 30; };
  return op;
}

// One in each file NAME_operator.cc.
ort::Op step_op();
ort::Op matmul_op();
ort::Op norm_op();

// Those of domain `dijiang.cuda`, each for CUDA and for the CPU: cuda_operators.cc.
std::array<ort::Op, 6> cuda_ops();

}  // namespace dijiang
