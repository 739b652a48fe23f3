// batch_norm on the CPU: whole calls, and the pieces between which a distributed one communicates.
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

Plan plan_of(const ChannelView& view) { return Plan(view.sizes(), view.layout(), 0, false); }

// Weight and bias, and how they and the statistics make up the parameters of a forward pass.
template <typename S>
class Affine {
 public:
  Affine(const optional<Tensor>& weight, const optional<Tensor>& bias, int64_t channels)
      : held_{contiguous(weight), contiguous(bias)},
        weight_(held_[0], channels, 1, 0),
        bias_(held_[1], channels, 0, 0),
        arrays_(channels) {}

  S* mean() const { return arrays_[0]; }
  S* scale() const { return arrays_[1]; }
  S* shift() const { return arrays_[2]; }
  S weight(int64_t c) const { return weight_.get()[c]; }
  S bias(int64_t c) const { return bias_.get()[c]; }

  // `lost` is what rounding the mean took from it, in units of the standard deviation.
  void set(int64_t c, S mean, S rstd, double lost = 0) const {
    this->mean()[c] = mean;
    scale()[c] = rstd * weight(c);
    shift()[c] = static_cast<S>(bias(c) + lost * weight(c));
  }

 private:
  optional<Tensor> held_[2];  // where the values may lie
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
  rows<double>().load[dtype](data, updated[0], channels);
  for (int64_t c = 0; c < channels; ++c) {
    updated[0][c] = (1 - factor) * updated[0][c] + factor * values[c];
  }
  rows<double>().store[dtype](updated[0], data, channels);
}

// What the three forward functions share: their tensors as blocks, and the results in the input's shape.
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
  ForwardPass<S> pass(const Plan& plan) const {
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
    const Plan plan = plan_of(call.view);
    const SpreadPass<S> spread(plan, call.x);
    const ForwardPass<S> forward = call.pass<S>(plan);
    const Affine<S> affine(weight, bias, channels);
    const ChannelArrays<double, 2> found(channels);
    const double n = plan.pool_size();
    plan.run([&](int64_t pool, int64_t i) { spread.measure(pool, i); },
             [&](int64_t pool) {
               each_channels(plan.width(), plan.pieces(), [&](int64_t begin, int64_t end) {
                 const int64_t first = pool + begin;
                 spread.merge(pool, begin, end, found[0] + first, found[1] + first);
                 for (int64_t c = first; c < pool + end; ++c) {
                   const double inverse = 1 / std::sqrt(found[1][c] / n + eps);
                   means[c] = static_cast<S>(found[0][c]);
                   rstds[c] = static_cast<S>(inverse);
                   affine.set(c, means[c], rstds[c], (means[c] - found[0][c]) * inverse);
                   found[1][c] /= n - 1;
                 }
               });
             },
             [&](const Region& piece) { forward.apply(piece, affine.mean(), affine.scale(), affine.shift()); });
    update_running(running_mean, found[0], update);
    update_running(running_var, found[1], update);
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
    const Plan plan = plan_of(call.view);
    const ForwardPass<S> forward = call.pass<S>(plan);
    const Affine<S> affine(weight, bias, channels);
    const ColumnValues<double> mean(running_mean, channels, 0, 0), var(running_var, channels, 1, 0);
    for (int64_t c = 0; c < channels; ++c) {
      const double scale = affine.weight(c) / std::sqrt(var.get()[c] + eps);
      affine.mean()[c] = 0;
      affine.scale()[c] = static_cast<S>(scale);
      affine.shift()[c] = static_cast<S>(affine.bias(c) - mean.get()[c] * scale);
    }
    plan.each_piece([&](const Region& piece) { forward.apply(piece, affine.mean(), affine.scale(), affine.shift()); });
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
    const Plan plan = plan_of(view);
    const SpreadPass<S> spread(plan, blocks);
    plan.run([&](int64_t pool, int64_t i) { spread.measure(pool, i); },
             [&](int64_t pool) {
               each_channels(plan.width(), plan.pieces(), [&](int64_t begin, int64_t end) {
                 double mean[channels_at_once], square_sum[channels_at_once];
                 spread.merge(pool, begin, end, mean, square_sum);
                 std::copy_n(mean, end - begin, results + pool + begin);
                 std::copy_n(square_sum, end - begin, results + channels + pool + begin);
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
    check_moments(mean, "mean", {channels}, scalar_type_of<S>);
    check_moments(rstd, "rstd", {channels}, scalar_type_of<S>);
    const Plan plan = plan_of(call.view);
    const ForwardPass<S> forward = call.pass<S>(plan);
    const Affine<S> affine(weight, bias, channels);
    for (int64_t c = 0; c < channels; ++c) {
      affine.set(c, mean.const_data_ptr<S>()[c], rstd.const_data_ptr<S>()[c]);
    }
    plan.each_piece([&](const Region& piece) { forward.apply(piece, affine.mean(), affine.scale(), affine.shift()); });
    return {call.y, call.mask};
  });
}

// What the three backward functions share: their tensors as blocks. Shapes: mean, rstd: (C,).
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
    check_moments(mean, "mean", {channels()}, type);
    check_moments(rstd, "rstd", {channels()}, type);
  }

  int64_t channels() const { return view.channels(); }
  Plan plan() const { return plan_of(view); }
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

// The parameters of dx = (dz − sum − x̂ · product) · rstd · w, with means of dz and dz · x̂.
template <typename S>
class Gradients {
 public:
  Gradients(const BackwardCall& call, const optional<Tensor>& weight)
      : held_(contiguous(weight)),
        weight_(held_, call.channels(), 1, 0),
        mean_(call.mean.const_data_ptr<S>()),
        rstd_(call.rstd.const_data_ptr<S>()),
        arrays_(call.channels()) {}

  void set(int64_t c, double sum, double product) const {
    const double gain = static_cast<double>(rstd_[c]) * weight_.get()[c];
    arrays_[0][c] = static_cast<S>(gain);
    arrays_[1][c] = static_cast<S>(-gain * rstd_[c] * product);
    arrays_[2][c] = static_cast<S>(-gain * sum);
  }

  BackwardParameters<S> parameters() const { return {mean_, nullptr, nullptr, arrays_[0], arrays_[1], arrays_[2]}; }

 private:
  optional<Tensor> held_;  // as above
  ColumnValues<S> weight_;
  const S* mean_;
  const S* rstd_;
  ChannelArrays<S, 3> arrays_;
};

// Writes Σ dz and Σ dz · x̂ of a pool's channels, and calls body(c) for each.
template <typename S, typename Body>
void add_up_sums(const SumsPass<S>& sums, const Plan& plan, int64_t pool, const S* rstd, double* sum, double* product,
                 const Body& body) {
  each_channels(plan.width(), plan.pieces(), [&](int64_t begin, int64_t end) {
    const int64_t first = pool + begin;
    sums.add_up(pool, begin, end, sum + first, product + first);
    for (int64_t c = first; c < pool + end; ++c) {
      product[c] *= rstd[c];
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
    const Plan plan = call.plan();
    const Gradients<S> gradients(call, weight);
    BackwardTensors tensors = call.tensors(dx, dresidual);
    if (!training) {
      tensors.x = Tensor();  // dx = dz · rstd · w, which takes no sums either
    }
    const BackwardPass<S> backward(plan, call.activation(), tensors, gradients.parameters());
    const auto apply = [&](const Region& piece) { backward.apply(piece); };
    const ChannelArrays<double, 2> found(channels);
    const double n = plan.pool_size();
    if (training || dweight_dtype || dbias_dtype) {
      const BackwardPass<S> inputs(plan, call.activation(), call.tensors({}, {}), gradients.parameters());
      const SumsPass<S> sums(plan, training ? backward : inputs);
      plan.run([&](int64_t pool, int64_t i) { sums.measure(pool, i); },
               [&](int64_t pool) {
                 add_up_sums(sums, plan, pool, rstd.const_data_ptr<S>(), found[0], found[1], [&](int64_t c) {
                   gradients.set(c, training ? found[0][c] / n : 0, training ? found[1][c] / n : 0);
                 });
               },
               apply);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        gradients.set(c, 0, 0);
      }
      plan.each_piece(apply);
    }
    return {dx, dresidual, channel_tensor(found[1], channels, dweight_dtype),
            channel_tensor(found[0], channels, dbias_dtype)};
  });
}

namespace {

Tensor batch_norm_backward_sums(const Tensor& dy, const optional<Tensor>& mask, const Tensor& x, const Tensor& mean,
                                const Tensor& rstd, at::MemoryFormat memory_format) {
  const BackwardCall call(dy, mask, x, {}, mean, rstd, memory_format);
  return in_compute_type(x, [&](auto zero) {
    using S = decltype(zero);
    const int64_t channels = call.channels();
    const Plan plan = call.plan();
    const BackwardPass<S> backward(plan, call.activation(), call.tensors({}, {}),
                                   {mean.const_data_ptr<S>(), nullptr, nullptr, nullptr, nullptr, nullptr});
    const SumsPass<S> sums(plan, backward);
    const ChannelArrays<double, 2> found(channels);
    plan.run([&](int64_t pool, int64_t i) { sums.measure(pool, i); },
             [&](int64_t pool) {
               add_up_sums(sums, plan, pool, rstd.const_data_ptr<S>(), found[0], found[1], [](int64_t) {});
             });
    const Tensor result = empty({2, channels}, scalar_type_of<S>);
    std::copy_n(found[0], 2 * channels, result.mutable_data_ptr<S>());
    return result;
  });
}

std::tuple<Tensor, Tensor> batch_norm_backward_apply(const Tensor& dy, const optional<Tensor>& mask, const Tensor& x,
                                                     const optional<Tensor>& weight, const Tensor& mean,
                                                     const Tensor& rstd, const Tensor& means,
                                                     at::MemoryFormat memory_format,
                                                     optional<ScalarType> dresidual_dtype) {
  const BackwardCall call(dy, mask, x, weight, mean, rstd, memory_format);
  check_moments(means, "means", {2, call.channels()}, mean.scalar_type());
  const Tensor dx = call.make_dx(), dresidual = call.make_dresidual(dresidual_dtype);
  in_compute_type(x, [&](auto zero) {
    using S = decltype(zero);
    const Plan plan = call.plan();
    const Gradients<S> gradients(call, weight);
    const S* values = means.const_data_ptr<S>();
    for (int64_t c = 0; c < call.channels(); ++c) {
      gradients.set(c, values[c], values[means.stride(0) + c]);
    }
    const BackwardPass<S> backward(plan, call.activation(), call.tensors(dx, dresidual), gradients.parameters());
    plan.each_piece([&](const Region& piece) { backward.apply(piece); });
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
