// Domain `dijiang.cuda`: `RecurrentStep`, `AddNorm` and `RotaryAngles` on a GPU, and their naive twins on the CPU, made of
// the same source (cuda/kernels.cu). Python compiles it for the GPU at hand and hands it over (dijiang_cuda_load).
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <memory>

#include "norm_inputs.h"
#include "step_inputs.h"
#ifdef DIJIANG_CUDA_THREADS
#include "cuda/threads.h"
#endif

namespace dijiang {
namespace cuda {
namespace {

#include "cuda/kernels.cu"

// Threads of a block; numbers that a block has room for, 48 KB, and those that a tile of `recur` should fill; tokens of a
// tile at most.
// A grid has no more blocks along its last axis.
constexpr int kMostBatch = 65535;
constexpr int kThreads = 256, kNormThreads = 1024, kMostRoom = 12288, kRoom = 11000, kTile = 16;

enum Kernel { kFeatures, kRecur, kDecode, kMix, kAddNorm, kAngles, kKernels };
constexpr const char* kNames[kKernels] = {"features", "recur", "decode", "mix", "add_norm", "angles"};
struct Type {
  int number;
  const char* suffix;
};
constexpr Type kTypes[] = {{ort::kFloat, "_fp32"}, {ort::kHalf, "_fp16"}, {ort::kBrain, "_bf16"}};
constexpr size_t kTypeCount = 3;

#define TWINS(name) \
  { name##_fp32, name##_fp16, name##_bf16 }
void (*const kStepTwins[][kTypeCount])(Step) = {TWINS(features), TWINS(recur), TWINS(decode), TWINS(mix)};
void (*const kNormTwins[kTypeCount])(Norm) = TWINS(add_norm);

struct Grid {
  int x, y, z, threads, floats;  // floats: that its blocks have room for
};

// What Python loaded: the kernels in every type, and the driver's way to launch one.
void* loaded[kKernels][kTypeCount];
int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);

struct OnGpu {
  static constexpr const char* kProvider = "CUDAExecutionProvider";

  template <class Arguments>
  static ort::Status* run(const ort::Api& api, const ort::Context* context, Kernel kernel, size_t type, Grid grid,
                          Arguments arguments) {
    void *stream, *parameters[] = {&arguments};
    if (!loaded[kernel][type]) return api.fail("the kernels of the cuda graph were not loaded");
    CHECK(api.stream(context, &stream));
    const int status = launch(loaded[kernel][type], grid.x, grid.y, grid.z, grid.threads, 1, 1,
                              grid.floats * sizeof(float), stream, parameters, nullptr);
    return status ? api.fail("CUDA did not launch a kernel of the cuda graph") : nullptr;
  }
};

// Block after block.
struct Twin : OnCpu {
  template <class Arguments>
  static ort::Status* run(const ort::Api&, const ort::Context*, Kernel kernel, size_t type, Grid grid,
                          Arguments arguments) {
#ifdef DIJIANG_CUDA_THREADS
    launch_threads({grid.x, grid.y, grid.z}, grid.threads, grid.floats, [&] { call(kernel, type, arguments); });
#else
    static thread_local const std::unique_ptr<float[]> numbers(new float[1 << 14]);
    threads = grid.threads, room = numbers.get();
    for (int z = 0; z < grid.z; z++)
      for (int y = 0; y < grid.y; y++)
        for (int x = 0; x < grid.x; x++) {
          block = {x, y, z};
          call(kernel, type, arguments);
        }
#endif
    return nullptr;
  }
  static void call(Kernel kernel, size_t type, const Step& s) { kStepTwins[kernel][type](s); }
  static void call(Kernel, size_t type, const Norm& n) { kNormTwins[type](n); }
  static void call(Kernel, size_t, const Angles& a) { angles_fp32(a); }
};

// Which row of kTypes input `index` has.
ort::Status* type_of(const ort::Api& api, const ort::Context* context, size_t index, size_t* out) {
  return with_shape(api, context, index, "no input", [&](ort::Shape* shape) -> ort::Status* {
    int number;
    CHECK(api.element_type(shape, &number));
    for (size_t i = 0; i < kTypeCount; i++)
      if (kTypes[i].number == number) {
        *out = i;
        return nullptr;
      }
    return api.fail("the cuda graph has float32, float16 and bfloat16 only");
  });
}

// Output `index` of this shape: where its numbers lie.
template <class T>
ort::Status* result(const ort::Api& api, ort::Context* context, size_t index, const int64_t* shape, size_t rank,
                    T** out) {
  ort::Value* value;
  CHECK(api.output(context, index, shape, rank, &value));
  return api.data(value, reinterpret_cast<void**>(out));
}

template <class Place>
struct StepKernel : Place {
  static constexpr const char* kName = "RecurrentStep";
  static constexpr size_t kInputs = kCount + 1, kOptionalFrom = kCos, kOutputs = 3;
  static int type(size_t i) { return i == kPacked ? ort::kAny : ort::kFloat; }
  static int output_type(size_t i) { return i == 0 ? ort::kAny : ort::kFloat; }

  const ort::Api& api;
  StepAttributes node;

  StepKernel(const ort::Api& api, const Kernels&) : api(api) {}

  ort::Status* read(const ort::Info* info) { return node.read(api, info); }

  ort::Status* run(ort::Context* context) const {
    float* data[kInputs];
    int64_t state[4];
    size_t type;
    Step s{};
    CHECK(type_of(api, context, kPacked, &type));
    CHECK(read_inputs(api, context, node, s, data, kInputs, state));
    if (state[0] != s.batch) return api.fail("RecurrentStep: states of another batch");
    s.packed = data[kPacked], s.packed_bias = data[kCount], s.cos = data[kCos], s.sin = data[kSin];
    s.projection = data[kProjection], s.scales = data[kScales], s.log_decay = data[kLogDecay];
    s.mask = data[kMask], s.weight = data[kWeight], s.bias = data[kBias], s.past = data[kState];

    const int d = s.heads * s.size, all = s.heads + s.groups, rows = s.batch * s.tokens;
    const int64_t output[] = {s.batch, s.tokens, d + s.mlp}, room[] = {s.batch, s.tokens, all * s.size + d};
    CHECK(result(api, context, 0, output, 3, &s.output));
    CHECK(result(api, context, 1, state, 4, &s.present));
    CHECK(result(api, context, 2, room, 3, &s.attended));
    s.features = s.attended + static_cast<int64_t>(rows) * d;

    // A thread has kRows rows of a column. A tile is as long as its numbers have room.
    const int slices = (s.size + kRows - 1) / kRows, sharing = s.heads / s.groups, made = kTogether * s.size;
    const int most = std::max(1, std::min({s.size, kThreads / slices, kRoom / 2 / (sharing * slices)}));
    const int parts = (s.size + most - 1) / most;
    s.columns = (s.size + parts - 1) / parts;
    const int token = (1 + sharing) * slices * kRows + s.columns + 1 + sharing * slices * s.columns;
    s.tile = std::max(1, std::min(kTile, kRoom / token));
    const int partial = std::max({kTogether * kThreads, made, kTogether * slices * s.columns});
    if (s.tokens == 1) {
      CHECK(go(context, kDecode, type, {s.groups, parts, s.batch, kThreads, 2 * made + partial}, s));
    } else {
      CHECK(go(context, kFeatures, type, {rows, (all + kTogether - 1) / kTogether, 1, kThreads, made + partial}, s));
      CHECK(go(context, kRecur, type, {s.groups, parts, s.batch, kThreads, s.tile * token}, s));
    }
    return go(context, kMix, type, {rows, (d + s.mlp + kThreads - 1) / kThreads, 1, kThreads, 0}, s);
  }

  ort::Status* go(ort::Context* context, Kernel kernel, size_t type, Grid grid, const cuda::Step& s) const {
    if (grid.floats > kMostRoom)
      return api.fail("RecurrentStep: more query heads than the kernels have room for; use another graph");
    if (grid.z > kMostBatch) return api.fail("RecurrentStep: more than 65535 sequences; use a smaller batch");
    return grid.x && grid.y && grid.z ? Place::template run<cuda::Step>(api, context, kernel, type, grid, s) : nullptr;
  }
};

template <class Place>
struct NormKernel : Place {
  static constexpr const char* kName = "AddNorm";
  static constexpr size_t kInputs = 5, kOptionalFrom = 3, kOutputs = 2;
  static int type(size_t i) { return i == 1 ? ort::kAny : ort::kFloat; }
  static int output_type(size_t i) { return i == 0 ? ort::kAny : ort::kFloat; }

  const ort::Api& api;
  NormAttributes node;

  NormKernel(const ort::Api& api, const Kernels&) : api(api) {}

  ort::Status* read(const ort::Info* info) { return node.read(api, info); }

  ort::Status* run(ort::Context* context) const {
    float* data[kInputs];
    int64_t shape[3];
    size_t type;
    CHECK(type_of(api, context, 1, &type));
    CHECK(read_norm_inputs(api, context, data, kInputs, shape));
    const int64_t rows = shape[0] * shape[1], width = shape[2];
    cuda::Norm n{};
    n.width = width, n.centred = node.centred != 0, n.epsilon = node.epsilon;
    n.a = data[0], n.b = data[1], n.weight = data[2], n.shift = data[3], n.bias = data[4];
    CHECK(result(api, context, 0, shape, 3, &n.output));
    CHECK(result(api, context, 1, shape, 3, &n.sum));
    if (width > kChannels * kNormThreads)
      return api.fail("AddNorm: more channels than the kernels have room for; use another graph");
    const int threads = std::min<int64_t>(kNormThreads, (width + 31) / 32 * 32);
    const Grid grid{static_cast<int>(rows), 1, 1, threads, 64};
    return rows ? Place::template run<cuda::Norm>(api, context, kAddNorm, type, grid, n) : nullptr;
  }
};

// Positions [B, T] int64 and frequencies [pairs] float64 -> cos and sin [B, T, pairs].
template <class Place>
struct AnglesKernel : Place {
  static constexpr const char* kName = "RotaryAngles";
  static constexpr size_t kInputs = 2, kOptionalFrom = 2, kOutputs = 2;
  static int type(size_t i) { return i == 0 ? ort::kLong : ort::kDouble; }
  static int output_type(size_t) { return ort::kFloat; }

  const ort::Api& api;

  AnglesKernel(const ort::Api& api, const Kernels&) : api(api) {}

  ort::Status* read(const ort::Info*) { return nullptr; }

  ort::Status* run(ort::Context* context) const {
    cuda::Angles a{};
    int64_t shape[3];
    CHECK(dims_of(api, context, 0, shape, 2, "RotaryAngles: rank of the positions, expected 2"));
    CHECK(dims_of(api, context, 1, shape + 2, 1, "RotaryAngles: rank of the frequencies, expected 1"));
    CHECK(data_of(api, context, 0, &a.positions));
    CHECK(data_of(api, context, 1, &a.frequencies));
    CHECK(result(api, context, 0, shape, 3, &a.cos));
    CHECK(result(api, context, 1, shape, 3, &a.sin));
    a.pairs = shape[2];
    const int rows = shape[0] * shape[1];
    return rows ? Place::template run<cuda::Angles>(api, context, kAngles, 0, {rows, 1, 1, 64, 0}, a) : nullptr;
  }
};

}  // namespace

// Loads the compiled kernels. 0, or what the driver says; -1: no driver, or one before CUDA 12.
int load(const void* image) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  const auto find = [&](const char* name) { return driver ? dlsym(driver, name) : nullptr; };
  using LoadData = int (*)(void**, const void*, void*, void*, unsigned, void*, void*, unsigned);
  using GetKernel = int (*)(void**, void*, const char*);
  const auto load_data = reinterpret_cast<LoadData>(find("cuLibraryLoadData"));
  const auto get_kernel = reinterpret_cast<GetKernel>(find("cuLibraryGetKernel"));
  launch = reinterpret_cast<decltype(launch)>(find("cuLaunchKernel"));
  if (!load_data || !get_kernel || !launch) return -1;
  void* library;
  if (const int status = load_data(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0)) return status;
  for (int kernel = 0; kernel < kKernels; kernel++)
    for (size_t type = 0; type < kTypeCount; type++) {
      char name[32];
      std::snprintf(name, sizeof name, "%s%s", kNames[kernel], kTypes[type].suffix);
      if (kernel == kAngles && type > 0) continue;
      if (const int status = get_kernel(&loaded[kernel][type], library, name)) return status;
    }
  return 0;
}

}  // namespace cuda

std::array<ort::Op, 6> cuda_ops() {
  using namespace cuda;
  return {make_op<StepKernel<OnGpu>>(), make_op<StepKernel<Twin>>(), make_op<NormKernel<OnGpu>>(),
          make_op<NormKernel<Twin>>(), make_op<AnglesKernel<OnGpu>>(), make_op<AnglesKernel<Twin>>()};
}

}  // namespace dijiang

// For Python: see load.
extern "C" __attribute__((visibility("default"))) int dijiang_cuda_load(const void* image) {
  return dijiang::cuda::load(image);
}
