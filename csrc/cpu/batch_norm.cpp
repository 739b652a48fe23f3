// batch_norm on the CPU: whole calls, and the steps between which SyncBatchNorm communicates.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cmath>

#include "channel_norms.h"
#include "channel_passes.h"
#include "views.h"

namespace fastnorm::cpu {
namespace {

using at::ScalarType;
using at::Tensor;
using std::optional;

ChannelPlan plan_of(const ChannelView& view) { return ChannelPlan(view.sizes(), view.layout(), 0, false); }
ChannelPlan elementwise_plan_of(const ChannelView& view) {
  return ChannelPlan::elementwise(view.sizes(), view.layout());
}

// The parameters of a forward pass, from weight, bias and statistics.
template <typename S>
class Affine {
 public:
  Affine(const optional<Tensor>& weight, const optional<Tensor>& bias, int64_t channels)
      : contiguous_{contiguous(weight), contiguous(bias)},
        weight_(contiguous_[0], channels, 1, 0),
        bias_(contiguous_[1], channels, 0, 0),
        arrays_(channels) {}

  S* mean() const { return arrays_[0]; }
  S* scale() const { return arrays_[1]; }
  S* shift() const { return arrays_[2]; }
  S weight(int64_t c) const { return weight_.get()[c]; }
  S bias(int64_t c) const { return bias_.get()[c]; }

  // `correction` is the rounding error of the mean, in units of the standard deviation.
  void set(int64_t c, S mean, S rstd, double correction = 0) const {
    this->mean()[c] = mean;
    scale()[c] = rstd * weight(c);
    shift()[c] = static_cast<S>(bias(c) + correction * weight(c));
  }

 private:
  optional<Tensor> contiguous_[2];  // owns what weight_ and bias_ may point to
  ColumnValues<S> weight_, bias_;
  ChannelArrays<S, 3> arrays_;
};

// running = (1 − factor) · running + factor · value.
void update_running(const optional<Tensor>& running, const double* values, double factor) {
  if (!running || !running->defined()) {
    return;
  }
  const int64_t channels = running->size(0);
  const int dtype = static_cast<int>(dtype_from(running->scalar_type()));
  void* data = running->mutable_data_ptr();
  const ChannelArrays<double, 1> updated(channels);
  kernel_table<double>().load[dtype](data, updated[0], channels);
  for (int64_t c = 0; c < channels; ++c) {
    updated[0][c] = (1 - factor) * updated[0][c] + factor * values[c];
  }
  kernel_table<double>().store[dtype](updated[0], data, channels);
}

// What the three forward functions share: their tensors as 3-D views, and the results in the input's shape.
struct ForwardCall {
  ForwardCall(const Tensor& x, const optional<Tensor>& residual, const optional<Tensor>& weight,
              const optional<Tensor>& bias, at::MemoryFormat format, bool relu, bool wants_mask, ScalarType out_dtype)
      : view(x, format, true),
        x(view.blocks(x)),
        residual(view.checked_blocks(residual.value_or(Tensor()), "residual")),
        y(view.make_result(out_dtype)),
        mask(view.make_mask(relu && wants_mask)),
        activation(relu ? Activation::relu : Activation::none) {
    check_parameter(weight, "weight", {channels()});
    check_parameter(bias, "bias", {channels()});
  }

  int64_t channels() const { return view.channels(); }

  template <typename S>
  ForwardPass<S> pass(const ChannelPlan& plan) const {
    return ForwardPass<S>(plan, activation, x, residual, view.blocks(y), mask);
  }

  ChannelView view;
  Tensor x, residual, y, mask;
  Activation activation;
};

void check_running(const optional<Tensor>& running, const char* name, int64_t channels) {
  if (running) {
    check_columns(*running, name, channels);
  }
}

double update_factor(const optional<Tensor>& factor, double momentum) {
  if (!factor) {
    return momentum;
  }
  TORCH_CHECK(factor->device().is_cpu() && factor->dim() == 0 && factor->scalar_type() == at::kFloat,
              "fastnorm: expected factor in float32 without dimensions on the CPU");
  return *factor->const_data_ptr<float>();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& x, const optional<Tensor>& residual, const optional<Tensor>& weight, const optional<Tensor>& bias,
    const optional<Tensor>& running_mean, const optional<Tensor>& running_var, const optional<Tensor>& factor,
    double momentum, double eps, at::MemoryFormat memory_format, bool relu, ScalarType out_dtype) {
  const ForwardCall call(x, residual, weight, bias, memory_format, relu, true, out_dtype);
  const int64_t channels = call.channels();
  check_running(running_mean, "running_mean", channels);
  check_running(running_var, "running_var", channels);
  const double update = update_factor(factor, momentum);
  return in_compute_type(x, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using S = decltype(zero);
    const Tensor mean = empty({channels}, scalar_type_of<S>), rstd = empty({channels}, scalar_type_of<S>);
    S* means = mean.mutable_data_ptr<S>();
    S* rstds = rstd.mutable_data_ptr<S>();
    const ChannelPlan plan = plan_of(call.view);
    const MomentsPass<S> moments_pass(plan, call.x);
    const ForwardPass<S> forward = call.pass<S>(plan);
    const Affine<S> affine(weight, bias, channels);
    const ChannelArrays<double, 2> moments(channels);  // mean and m2, then the unbiased variance
    const double n = plan.channel_size();
    plan.run([&](int64_t bundle, int64_t i) { moments_pass.measure(bundle, i); },
             [&](int64_t bundle) {
               each_channels(plan.width(), plan.chunks(), [&](int64_t begin, int64_t end) {
                 const int64_t first = bundle + begin;
                 moments_pass.merge(bundle, begin, end, moments[0] + first, moments[1] + first);
                 for (int64_t c = first; c < bundle + end; ++c) {
                   const double exact_rstd = 1 / std::sqrt(moments[1][c] / n + eps);
                   means[c] = static_cast<S>(moments[0][c]);
                   rstds[c] = static_cast<S>(exact_rstd);
                   affine.set(c, means[c], rstds[c], (means[c] - moments[0][c]) * exact_rstd);
                   moments[1][c] /= n - 1;
                 }
               });
             },
             [&](const Region& chunk) { forward.apply(chunk, affine.mean(), affine.scale(), affine.shift()); });
    update_running(running_mean, moments[0], update);
    update_running(running_var, moments[1], update);
    return {call.y, call.mask, mean, rstd};
  });
}

std::tuple<Tensor, Tensor> batch_norm_evaluation(const Tensor& x, const optional<Tensor>& residual,
                                                 const optional<Tensor>& weight, const optional<Tensor>& bias,
                                                 const Tensor& running_mean, const Tensor& running_var, double eps,
                                                 at::MemoryFormat memory_format, bool relu, bool wants_mask,
                                                 ScalarType out_dtype) {
  const ForwardCall call(x, residual, weight, bias, memory_format, relu, wants_mask, out_dtype);
  const int64_t channels = call.channels();
  check_columns(running_mean, "running_mean", channels);
  check_columns(running_var, "running_var", channels);
  return in_compute_type(x, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using S = decltype(zero);
    const ChannelPlan plan = elementwise_plan_of(call.view);
    const ForwardPass<S> forward = call.pass<S>(plan);
    const Affine<S> affine(weight, bias, channels);
    const ColumnValues<double> mean(running_mean, channels, 0, 0), var(running_var, channels, 1, 0);
    for (int64_t c = 0; c < channels; ++c) {
      const double scale = affine.weight(c) / std::sqrt(var.get()[c] + eps);
      affine.mean()[c] = 0;
      affine.scale()[c] = static_cast<S>(scale);
      affine.shift()[c] = static_cast<S>(affine.bias(c) - mean.get()[c] * scale);
    }
    plan.each_chunk([&](const Region& chunk) { forward.apply(chunk, affine.mean(), affine.scale(), affine.shift()); });
    return {call.y, call.mask};
  });
}

namespace {

Tensor batch_norm_statistics(const Tensor& x, at::MemoryFormat memory_format) {
  const ChannelView view(x, memory_format, true);
  const Tensor blocks = view.blocks(x);
  return in_compute_type(x, [&](auto zero) {
    using S = decltype(zero);
    const int64_t channels = view.channels();
    const Tensor result = empty({2, channels}, scalar_type_of<S>);
    S* results = result.mutable_data_ptr<S>();
    const ChannelPlan plan = plan_of(view);
    const MomentsPass<S> moments_pass(plan, blocks);
    plan.run([&](int64_t bundle, int64_t i) { moments_pass.measure(bundle, i); },
             [&](int64_t bundle) {
               each_channels(plan.width(), plan.chunks(), [&](int64_t begin, int64_t end) {
                 double mean[channels_at_once], m2[channels_at_once];
                 moments_pass.merge(bundle, begin, end, mean, m2);
                 std::copy_n(mean, end - begin, results + bundle + begin);
                 std::copy_n(m2, end - begin, results + channels + bundle + begin);
               });
             });
    return result;
  });
}

std::tuple<Tensor, Tensor> batch_norm_normalize(const Tensor& x, const optional<Tensor>& residual,
                                                const optional<Tensor>& weight, const optional<Tensor>& bias,
                                                const Tensor& mean, const Tensor& rstd, at::MemoryFormat memory_format,
                                                bool relu, ScalarType out_dtype) {
  const ForwardCall call(x, residual, weight, bias, memory_format, relu, true, out_dtype);
  const int64_t channels = call.channels();
  return in_compute_type(x, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using S = decltype(zero);
    check_statistics(mean, "mean", {channels}, scalar_type_of<S>);
    check_statistics(rstd, "rstd", {channels}, scalar_type_of<S>);
    const ChannelPlan plan = elementwise_plan_of(call.view);
    const ForwardPass<S> forward = call.pass<S>(plan);
    const Affine<S> affine(weight, bias, channels);
    for (int64_t c = 0; c < channels; ++c) {
      affine.set(c, mean.const_data_ptr<S>()[c], rstd.const_data_ptr<S>()[c]);
    }
    plan.each_chunk([&](const Region& chunk) { forward.apply(chunk, affine.mean(), affine.scale(), affine.shift()); });
    return {call.y, call.mask};
  });
}

// What the three backward functions share: their tensors as 3-D views. mean and rstd: (C,).
struct BackwardCall {
  BackwardCall(const Tensor& dy, const optional<Tensor>& mask, const Tensor& x, const optional<Tensor>& weight,
               const Tensor& mean, const Tensor& rstd, at::MemoryFormat format)
      : view(x, format, true),
        dy(view.checked_blocks(dy, "dy")),
        mask(mask.value_or(Tensor())),
        x(view.blocks(x)),
        mean(mean),
        rstd(rstd) {
    if (mask) {
      view.check_mask(*mask);
    }
    check_parameter(weight, "weight", {channels()});
    const ScalarType type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    check_statistics(mean, "mean", {channels()}, type);
    check_statistics(rstd, "rstd", {channels()}, type);
  }

  int64_t channels() const { return view.channels(); }
  ChannelPlan plan() const { return plan_of(view); }
  Activation activation() const { return mask.defined() ? Activation::relu : Activation::none; }

  Tensor make_dx() const { return view.make_result(x.scalar_type()); }
  Tensor make_dresidual(optional<ScalarType> type) const { return type ? view.make_result(*type) : Tensor(); }

  BackwardTensors tensors(const Tensor& dx, const Tensor& dresidual) const {
    return {dy, mask, x, view.blocks(dx), view.blocks(dresidual)};
  }

  ChannelView view;
  Tensor dy, mask, x;
  const Tensor &mean, &rstd;
};

// dx = (dz − c2 − x̂ · c1) · rstd · w with c1 = mean(dz · x̂) and c2 = mean(dz), as gain, slope and level.
template <typename S>
class Gradients {
 public:
  Gradients(const BackwardCall& call, const optional<Tensor>& weight)
      : contiguous_(contiguous(weight)),
        weight_(contiguous_, call.channels(), 1, 0),
        mean_(call.mean.const_data_ptr<S>()),
        rstd_(call.rstd.const_data_ptr<S>()),
        arrays_(call.channels()) {}

  void set(int64_t c, double c1, double c2) const {
    const double gain = static_cast<double>(rstd_[c]) * weight_.get()[c];
    arrays_[0][c] = static_cast<S>(gain);
    arrays_[1][c] = static_cast<S>(-gain * rstd_[c] * c1);
    arrays_[2][c] = static_cast<S>(-gain * c2);
  }

  BackwardParameters<S> parameters() const { return {mean_, nullptr, nullptr, arrays_[0], arrays_[1], arrays_[2]}; }

 private:
  optional<Tensor> contiguous_;  // owns what weight_ may point to
  ColumnValues<S> weight_;
  const S* mean_;
  const S* rstd_;
  ChannelArrays<S, 3> arrays_;
};

// Writes Σ dz and Σ dz · x̂ of a bundle's channels, and calls body(c) for each channel.
template <typename S, typename Body>
void add_up_sums(const SumsPass<S>& sums_pass, const ChannelPlan& plan, int64_t bundle, const S* rstd, double* dz_sum,
                 double* x_hat_sum, const Body& body) {
  each_channels(plan.width(), plan.chunks(), [&](int64_t begin, int64_t end) {
    const int64_t first = bundle + begin;
    sums_pass.add_up(bundle, begin, end, dz_sum + first, x_hat_sum + first);
    for (int64_t c = first; c < bundle + end; ++c) {
      x_hat_sum[c] *= rstd[c];
      body(c);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& dy, const optional<Tensor>& mask, const Tensor& x, const optional<Tensor>& weight, const Tensor& mean,
    const Tensor& rstd, bool training, at::MemoryFormat memory_format, optional<ScalarType> dresidual_dtype,
    optional<ScalarType> dweight_dtype, optional<ScalarType> dbias_dtype) {
  const BackwardCall call(dy, mask, x, weight, mean, rstd, memory_format);
  const Tensor dx = call.make_dx(), dresidual = call.make_dresidual(dresidual_dtype);
  return in_compute_type(x, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using S = decltype(zero);
    const int64_t channels = call.channels();
    const ChannelPlan plan = call.plan();
    const Gradients<S> gradients(call, weight);
    BackwardTensors tensors = call.tensors(dx, dresidual);
    if (!training) {
      tensors.x = Tensor();  // dx = dz · rstd · w, which takes no sums either
    }
    const BackwardPass<S> backward(plan, call.activation(), tensors, gradients.parameters());
    const auto apply = [&](const Region& chunk) { backward.apply(chunk); };
    const ChannelArrays<double, 2> sums(channels);  // Σ dz and Σ dz · x̂
    const double n = plan.channel_size();
    if (training || dweight_dtype || dbias_dtype) {
      const BackwardPass<S> inputs(plan, call.activation(), call.tensors({}, {}), gradients.parameters());
      const SumsPass<S> sums_pass(plan, training ? backward : inputs);
      plan.run([&](int64_t bundle, int64_t i) { sums_pass.measure(bundle, i); },
               [&](int64_t bundle) {
                 add_up_sums(sums_pass, plan, bundle, rstd.const_data_ptr<S>(), sums[0], sums[1], [&](int64_t c) {
                   gradients.set(c, training ? sums[1][c] / n : 0, training ? sums[0][c] / n : 0);
                 });
               },
               apply);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        gradients.set(c, 0, 0);
      }
      plan.each_chunk(apply);
    }
    return {dx, dresidual, channel_tensor(sums[1], channels, dweight_dtype),
            channel_tensor(sums[0], channels, dbias_dtype)};
  });
}

namespace {

Tensor batch_norm_backward_sums(const Tensor& dy, const optional<Tensor>& mask, const Tensor& x, const Tensor& mean,
                                const Tensor& rstd, at::MemoryFormat memory_format) {
  const BackwardCall call(dy, mask, x, {}, mean, rstd, memory_format);
  return in_compute_type(x, [&](auto zero) {
    using S = decltype(zero);
    const int64_t channels = call.channels();
    const ChannelPlan plan = call.plan();
    const BackwardPass<S> backward(plan, call.activation(), call.tensors({}, {}),
                                   {mean.const_data_ptr<S>(), nullptr, nullptr, nullptr, nullptr, nullptr});
    const SumsPass<S> sums_pass(plan, backward);
    const ChannelArrays<double, 2> sums(channels);  // Σ dz and Σ dz · x̂
    plan.run([&](int64_t bundle, int64_t i) { sums_pass.measure(bundle, i); },
             [&](int64_t bundle) {
               add_up_sums(sums_pass, plan, bundle, rstd.const_data_ptr<S>(), sums[0], sums[1], [](int64_t) {});
             });
    const Tensor result = empty({2, channels}, scalar_type_of<S>);
    std::copy_n(sums[0], 2 * channels, result.mutable_data_ptr<S>());
    return result;
  });
}

std::tuple<Tensor, Tensor> batch_norm_backward_apply(const Tensor& dy, const optional<Tensor>& mask, const Tensor& x,
                                                     const optional<Tensor>& weight, const Tensor& mean,
                                                     const Tensor& rstd, const Tensor& means,
                                                     at::MemoryFormat memory_format,
                                                     optional<ScalarType> dresidual_dtype) {
  const BackwardCall call(dy, mask, x, weight, mean, rstd, memory_format);
  check_statistics(means, "means", {2, call.channels()}, mean.scalar_type());
  const Tensor dx = call.make_dx(), dresidual = call.make_dresidual(dresidual_dtype);
  in_compute_type(x, [&](auto zero) {
    using S = decltype(zero);
    const ChannelPlan plan = elementwise_plan_of(call.view);
    const Gradients<S> gradients(call, weight);
    const S* values = means.const_data_ptr<S>();
    for (int64_t c = 0; c < call.channels(); ++c) {
      gradients.set(c, values[means.stride(0) + c], values[c]);
    }
    const BackwardPass<S> backward(plan, call.activation(), call.tensors(dx, dresidual), gradients.parameters());
    plan.each_chunk([&](const Region& chunk) { backward.apply(chunk); });
  });
  return {dx, dresidual};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("batch_norm_forward", &batch_norm_forward);
  m.impl("batch_norm_evaluation", &batch_norm_evaluation);
  m.impl("batch_norm_backward", &batch_norm_backward);
  m.impl("batch_norm_statistics", &batch_norm_statistics);
  m.impl("batch_norm_normalize", &batch_norm_normalize);
  m.impl("batch_norm_backward_sums", &batch_norm_backward_sums);
  m.impl("batch_norm_backward_apply", &batch_norm_backward_apply);
}

}  // namespace fastnorm::cpu
