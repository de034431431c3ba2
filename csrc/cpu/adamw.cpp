// The step of AdamW on the CPU: checks and the split over threads; arithmetic is in adamw_rows.inl.
#include "../common/tensors.h"
#include "adamw_rows.h"
#include "isa.h"

#include <cmath>

namespace ditscale::cpu {
namespace {

constexpr int64_t NUMBERS_A_THREAD = 1 << 14;

float* floats_of(Tensor& t, const Tensor& weight, const char* name) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == weight.numel(), name,
      ": expected float32 numbers without gaps, as many as weight has");
  check_device(t, weight, name);
  return static_cast<float*>(t.mutable_data_ptr());
}

// All of one shape. `step` counts from 1; scalars are rounded once, to float32.
void adamw_average(
    Tensor weight, Tensor gradient, Tensor first, Tensor second, std::optional<Tensor> average, int64_t step, double lr,
    double beta1, double beta2, double eps, double weight_decay, double clip, double decay) {
  AdamwArgs a{};
  a.weight = floats_of(weight, weight, "weight");
  a.first = floats_of(first, weight, "first");
  a.second = floats_of(second, weight, "second");
  if (average.has_value()) a.average = floats_of(*average, weight, "average");
  Tensor dense = torch::stable::contiguous(gradient);
  a.gradient = floats_of(dense, weight, "gradient");
  a.clip = static_cast<float>(clip);
  a.keep = static_cast<float>(1.0 - lr * weight_decay);
  a.beta1 = static_cast<float>(beta1);
  a.rest1 = static_cast<float>(1.0 - beta1);
  a.beta2 = static_cast<float>(beta2);
  a.rest2 = static_cast<float>(1.0 - beta2);
  a.rate = static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(step))));
  a.correction = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(step))));
  a.eps = static_cast<float>(eps);
  a.decay = static_cast<float>(decay);
  a.share = static_cast<float>(1.0 - decay);
  const AdamwKernels& k = DS_BY_ISA(adamw);
  torch::stable::parallel_for(
      0, weight.numel(), NUMBERS_A_THREAD, [&](int64_t begin, int64_t end) { k.step(a, begin, end); });
}

}  // namespace
}  // namespace ditscale::cpu

STABLE_TORCH_LIBRARY_IMPL(ditscale, CPU, m) {
  m.impl("adamw_average_", TORCH_BOX(&ditscale::cpu::adamw_average));
}
