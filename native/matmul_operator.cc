// Domain `dijiang`, type `MatMul`: x [.., K], codes and scales as MatMulNBits has them, bias.
#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <mutex>
#include <new>
#include <vector>

#include "matmul.h"
#include "operators.h"

namespace dijiang {
namespace {

constexpr std::align_val_t kAligned{64};

struct Release {
  void operator()(uint8_t* data) const { ::operator delete(data, kAligned); }
};

// Room for the rounded inputs of a call: a thread's own, kept for the next.
uint8_t* scratch(size_t bytes) {
  thread_local std::vector<uint8_t> room;
  if (room.size() < bytes) room.resize(bytes);
  return room.data();
}

constexpr const char* kShapes = "MatMul: shapes of codes, scales and bias do not fit K and N";

struct MatMulKernel : OnCpu {
  static constexpr const char* kName = "MatMul";
  static constexpr size_t kInputs = 4, kOptionalFrom = 3, kOutputs = 1;
  static int type(size_t input) { return input == 1 ? ort::kByte : input == 2 ? ort::kAny : ort::kFloat; }

  const ort::Api& api;
  const Kernels& kernels;
  Packed weights{};
  std::unique_ptr<uint8_t, Release> data;
  const void *source = nullptr, *scale_source = nullptr;  // what was packed
  std::atomic<bool> is_packed{false};
  std::mutex packing;

  MatMulKernel(const ort::Api& api, const Kernels& kernels) : api(api), kernels(kernels) {}

  ort::Status* read(const ort::Info* info) {
    CHECK(api.attribute(info, "K", &weights.inputs));
    CHECK(api.attribute(info, "N", &weights.outputs));
    CHECK(api.attribute(info, "bits", &weights.bits));
    CHECK(api.attribute(info, "block_size", &weights.block));
    CHECK(api.attribute(info, "rotation", &weights.rotation));
    if (!weights.sound())
      return api.fail("MatMul: K, N, bits, block_size and rotation do not go together");
    return nullptr;
  }

  // Whether input `index` has these dimensions.
  ort::Status* expect(const ort::Context* context, size_t index, std::initializer_list<int64_t> expected) const {
    int64_t found[3];
    CHECK(dims_of(api, context, index, found, expected.size(), kShapes));
    return std::equal(expected.begin(), expected.end(), found) ? nullptr : api.fail(kShapes);
  }

  // Packs once, in the first run, on all threads: codes and scales are constants of the graph.
  ort::Status* pack(ort::Context* context, const uint8_t* codes, const uint8_t* scales) {
    if (!is_packed.load(std::memory_order_acquire)) {
      const std::lock_guard<std::mutex> lock(packing);
      if (!is_packed.load(std::memory_order_relaxed)) {
        CHECK(expect(context, 1, {weights.outputs, weights.blocks(), weights.block * weights.bits / 8}));
        CHECK(expect(context, 2, {weights.outputs, weights.blocks()}));
        int type;
        CHECK(with_shape(api, context, 2, kShapes, [&](ort::Shape* shape) { return api.element_type(shape, &type); }));
        if (type != ort::kFloat && type != ort::kBrain) return api.fail("MatMul: type of the scales, expected float32 or bfloat16");
        weights.scale_bytes = type == ort::kFloat ? 4 : 2;
        const size_t bytes = weights.tiles() * weights.tile_bytes();
        data.reset(static_cast<uint8_t*>(::operator new(bytes, kAligned, std::nothrow)));
        if (!data) return api.fail("MatMul: no memory for the packed weights; close something, or use a smaller model");
        weights.data = data.get();
        struct Work {
          const Packed& weights;
          const uint8_t* codes;
          const uint8_t* scales;
          std::atomic<bool> failed{false};
        } work{weights, codes, scales};
        CHECK(api.parallel(
            context,
            [](void* data, size_t tile) {
              Work& work = *static_cast<Work*>(data);
              if (!pack_tile(work.weights, tile, work.codes, work.scales)) work.failed = true;
            },
            weights.tiles(), 0, &work));
        if (work.failed) return api.fail("MatMul: a scale is 0 or no number; export the bundle again");
        source = codes, scale_source = scales;
        is_packed.store(true, std::memory_order_release);
      }
    }
    if (source == codes && scale_source == scales) return nullptr;
    return api.fail("MatMul: codes or scales changed; they must be constants of the graph");
  }

  ort::Status* run(ort::Context* context) {
    MatMul m{};
    const uint8_t* codes;
    const uint8_t* scales;
    CHECK(data_of(api, context, 0, &m.input));
    CHECK(data_of(api, context, 1, &codes));
    CHECK(data_of(api, context, 2, &scales));
    CHECK(data_of(api, context, 3, &m.bias));
    int64_t shape[3];
    CHECK(dims_of(api, context, 0, shape, 3, "MatMul: rank of the input, expected 3"));
    if (shape[2] != weights.inputs) return api.fail("MatMul: width of the input, expected K");
    if (m.bias) CHECK(expect(context, 3, {weights.outputs}));
    CHECK(pack(context, codes, scales));
    m.rows = shape[0] * shape[1];
    shape[2] = weights.outputs;
    ort::Value* output;
    CHECK(api.output(context, 0, shape, 3, &output));
    CHECK(api.data(output, reinterpret_cast<void**>(&m.output)));
    if (m.rows == 0) return nullptr;

    m.weights = &weights;
    m.use(scratch(m.room()));

    struct Work {
      const MatMul& m;
      const Kernels& kernels;
    } work{m, kernels};
    const auto round = [](void* data, size_t row) {
      const Work& work = *static_cast<Work*>(data);
      work.kernels.round(work.m, row);
    };
    CHECK(for_each(api, context, round, m.rows, &work));
    return api.parallel(
        context,
        [](void* data, size_t unit) {
          const Work& work = *static_cast<Work*>(data);
          work.kernels.multiply(work.m, unit);
        },
        m.units(), 0, &work);
  }
};

}  // namespace

ort::Op matmul_op() { return make_op<MatMulKernel>(); }

}  // namespace dijiang
