// What SessionOptions.register_custom_ops_library calls: the operators of the domain `dijiang`.
#include "operators.h"

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(
    ort::Options* options, const ort::ApiBase* base) {
  static const ort::Op ops[] = {dijiang::step_op(), dijiang::matmul_op(), dijiang::norm_op()};
  const ort::Api* api = base->get(ort::kApiVersion);
  if (!api) return base->get(1)->fail("the native graph needs onnxruntime 1.17 or newer");
  if (const char* error = dijiang::choice().error) return api->fail(error);
  ort::Domain *domain, *cuda;
  CHECK(api->create_domain("dijiang", &domain));
  for (const ort::Op& op : ops) CHECK(api->add_op(domain, &op));
  CHECK(api->add_domain(options, domain));
  static const auto cuda_ops = dijiang::cuda_ops();
  CHECK(api->create_domain("dijiang.cuda", &cuda));
  for (const ort::Op& op : cuda_ops) CHECK(api->add_op(cuda, &op));
  return api->add_domain(options, cuda);
}
