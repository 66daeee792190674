// The few entries of ONNX Runtime's C interface that a custom operator needs.
//
// ONNX Runtime ships no header in its Python packages. Its interface is a table of function pointers
// that only grows: positions never change (the tables of versions 1 and 17 are checked against that by
// ONNX Runtime's own build). So a position and a signature are enough, for any version from 1.17 on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;  // the first with ParallelFor

struct Status;     // null: success
struct Value;      // a tensor
struct Shape;      // type and dimensions of a tensor
struct Info;       // a node, while its kernel is made
struct Context;    // a node, while it runs
struct Domain;
struct Options;

struct Api {
  void* entries[275];

  template <int position, class Result, class... Arguments>
  Result call(Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(entries[position])(arguments...);
  }

  Status* fail(const char* message) const {
    return call<0, Status*, int, const char*>(2 /* invalid argument */, message);
  }
  Status* create_domain(const char* name, Domain** out) const { return call<26, Status*>(name, out); }
  Status* add_op(Domain* domain, const struct Op* op) const { return call<27, Status*>(domain, op); }
  Status* add_domain(Options* options, Domain* domain) const { return call<28, Status*>(options, domain); }
  Status* data(Value* value, void** out) const { return call<51, Status*>(value, out); }
  Status* element_type(const Shape* shape, int* out) const { return call<60, Status*>(shape, out); }
  Status* rank(const Shape* shape, size_t* out) const { return call<61, Status*>(shape, out); }
  Status* dims(const Shape* shape, int64_t* out, size_t rank) const {
    return call<62, Status*>(shape, out, rank);
  }
  Status* count(const Shape* shape, size_t* out) const { return call<64, Status*>(shape, out); }
  Status* shape(const Value* value, Shape** out) const { return call<65, Status*>(value, out); }
  Status* attribute(const Info* info, const char* name, float* out) const {
    return call<85, Status*>(info, name, out);
  }
  Status* attribute(const Info* info, const char* name, int64_t* out) const {
    return call<86, Status*>(info, name, out);
  }
  Status* input(const Context* context, size_t index, const Value** out) const {
    return call<90, Status*>(context, index, out);
  }
  Status* output(Context* context, size_t index, const int64_t* dims, size_t rank, Value** out) const {
    return call<91, Status*>(context, index, dims, rank, out);
  }
  // The CUstream of the provider that runs a node.
  Status* stream(const Context* context, void** out) const { return call<193, Status*>(context, out); }
  void release(Shape* shape) const { call<99, void>(shape); }
  // Runs work(data, i) for i in 0..total on the session's threads, in `batches` runs of neighbours
  // (0: as many as threads).
  Status* parallel(const Context* context, void (*work)(void*, size_t), size_t total, size_t batches,
                   void* data) const {
    return call<274, Status*>(context, work, total, batches, data);
  }
};

struct ApiBase {
  const Api* (*get)(uint32_t version);
  const char* (*version)();
};

// A custom operator as ONNX Runtime 1.17 and later read it. Entries left null are not asked for.
struct Op {
  uint32_t version;
  void* (*create_v1)(const Op*, const Api*, const Info*);
  const char* (*name)(const Op*);
  const char* (*provider)(const Op*);
  int (*input_type)(const Op*, size_t);
  size_t (*input_count)(const Op*);
  int (*output_type)(const Op*, size_t);
  size_t (*output_count)(const Op*);
  void (*compute_v1)(void*, Context*);
  void (*destroy)(void*);
  int (*input_kind)(const Op*, size_t);
  int (*output_kind)(const Op*, size_t);
  int (*input_memory)(const Op*, size_t);
  int (*variadic_input_least)(const Op*);
  int (*variadic_input_same)(const Op*);
  int (*variadic_output_least)(const Op*);
  int (*variadic_output_same)(const Op*);
  Status* (*create)(const Op*, const Api*, const Info*, void**);
  Status* (*compute)(void*, Context*);
  Status* (*infer_shape)(const Op*, void*);
  int (*first_version)(const Op*);
  int (*last_version)(const Op*);
  size_t (*in_place)(int**, int**);
  void (*release_in_place)(int*, int*);
  size_t (*alias)(int**, int**);
  void (*release_alias)(int*, int*);
};

// Element types: float32, uint8, int64, float16, float64, bfloat16; kAny: as the one input of this type is.
constexpr int kAny = 0, kFloat = 1, kByte = 2, kLong = 7, kHalf = 10, kDouble = 11, kBrain = 16;
constexpr int kRequired = 0, kOptional = 1;     // kind of input

}  // namespace ort
