// group_norm on the CPU. Unlike those of batch_norm, its parameters differ from sample to sample.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "channel_norms.h"
#include "channel_passes.h"
#include "views.h"

namespace fastnorm::cpu {
namespace {

using at::ScalarType;
using at::Tensor;
using std::optional;

// The sizes of a call, weight and bias, and the parameters (N, C) of a forward pass.
template <typename S>
struct Call {
  Call(const ChannelView& view, int64_t groups, const optional<Tensor>& weight, const optional<Tensor>& bias)
      : view(view),
        samples(view.sizes()[0]),
        channels(view.channels()),
        size(view.sizes()[view.layout() == Layout::pixels ? 1 : 2]),
        groups(groups),
        in_group(channels / groups),
        contiguous_parameters{contiguous(weight), contiguous(bias)},
        weight(contiguous_parameters[0], channels, 1, 0),
        bias(contiguous_parameters[1], channels, 0, 0),
        forward(samples * channels) {}

  double group_size() const { return static_cast<double>(in_group) * static_cast<double>(size); }

  ChannelPlan plan(bool by_channel) const { return ChannelPlan(view.sizes(), view.layout(), groups, by_channel); }

  // The first and the last + 1 of the groups in a bundle, counted over all samples.
  std::pair<int64_t, int64_t> groups_of(const ChannelPlan& plan, int64_t bundle) const {
    const int64_t count = groups / plan.bundles_in_sample();
    return {bundle * count, (bundle + 1) * count};
  }

  // Sets a group's parameters. `correction` is the rounding error of the mean, in units of the standard deviation.
  void set(int64_t group, S mean, S rstd, double correction) const {
    const int64_t first = group % groups * in_group;
    for (int64_t c = first; c < first + in_group; ++c) {
      const int64_t at = group / groups * channels + c;
      forward[0][at] = mean;
      forward[1][at] = rstd * weight.get()[c];
      forward[2][at] = static_cast<S>(bias.get()[c] + correction * weight.get()[c]);
    }
  }

  const ChannelView& view;
  int64_t samples, channels, size, groups, in_group;
  optional<Tensor> contiguous_parameters[2];  // owns what weight and bias may point to
  ColumnValues<S> weight, bias;
  ChannelArrays<S, 3> forward;  // mean, scale, shift
};

void check_parameters(int64_t channels, int64_t groups, const optional<Tensor>& weight, const optional<Tensor>& bias) {
  TORCH_CHECK(groups > 0 && channels % groups == 0, "fastnorm: expected a number of channels divisible by ", groups,
              " groups, got ", channels);
  check_parameter(weight, "weight", {channels});
  check_parameter(bias, "bias", {channels});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm_forward(const Tensor& x, int64_t groups, const optional<Tensor>& weight,
                                                      const optional<Tensor>& bias, double eps,
                                                      at::MemoryFormat memory_format, bool silu, ScalarType out_dtype) {
  const ChannelView view(x, memory_format, false);
  check_parameters(view.channels(), groups, weight, bias);
  const Tensor blocks = view.blocks(x), y = view.make_result(out_dtype);
  return in_compute_type(x, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using S = decltype(zero);
    const Call<S> call(view, groups, weight, bias);
    const Tensor mean = empty({call.samples, groups}, scalar_type_of<S>);
    const Tensor rstd = empty({call.samples, groups}, scalar_type_of<S>);
    S* means = mean.mutable_data_ptr<S>();
    S* rstds = rstd.mutable_data_ptr<S>();
    const ChannelPlan plan = call.plan(false);
    const MomentsPass<S> moments_pass(plan, blocks);
    const ForwardPass<S> forward(plan, silu ? Activation::silu : Activation::none, blocks, {}, view.blocks(y), {});
    const ChannelArrays<double, 2> moments(call.samples * groups);
    const double n = call.group_size();
    const auto finish = [&](int64_t bundle) {
      const auto [first, last] = call.groups_of(plan, bundle);
      moments_pass.merge(bundle, 0, plan.width(), moments[0] + first, moments[1] + first);
      for (int64_t group = first; group < last; ++group) {
        const double exact = moments[0][group], exact_rstd = 1 / std::sqrt(moments[1][group] / n + eps);
        means[group] = static_cast<S>(exact);
        rstds[group] = static_cast<S>(exact_rstd);
        call.set(group, means[group], rstds[group], (means[group] - exact) * exact_rstd);
      }
    };
    plan.run([&](int64_t bundle, int64_t i) { moments_pass.measure(bundle, i); }, finish,
             [&](const Region& chunk) { forward.apply(chunk, call.forward[0], call.forward[1], call.forward[2]); });
    return {y, mean, rstd};
  });
}

namespace {

// dx = (w·dz − c2 − x̂ · c1) · rstd with c1 = mean(x̂ · w·dz) and c2 = mean(w·dz) of a group, as gain, slope and level.
// On entry sums[1] is Σ dz · (x − mean) of each channel, afterwards Σ dz · x̂.
template <typename S>
void set_gradients(const Call<S>& call, int64_t group, S rstd, const ChannelArrays<double, 2>& sums,
                   const ChannelArrays<S, 3>& parameters) {
  const double n = call.group_size();
  const S scale = n == 1 ? 0 : rstd;  // dx of a group of one element is 0, whatever is rounded
  const S* weight = call.weight.get() + group % call.groups * call.in_group;
  const int64_t first = group * call.in_group;
  double c1 = 0, c2 = 0;
  for (int64_t c = 0; c < call.in_group; ++c) {
    sums[1][first + c] *= scale;
    c1 += sums[1][first + c] * weight[c];
    c2 += sums[0][first + c] * weight[c];
  }
  c1 /= n;
  c2 /= n;
  for (int64_t c = 0; c < call.in_group; ++c) {
    parameters[0][first + c] = scale * weight[c];
    parameters[1][first + c] = static_cast<S>(-c1 * scale * scale);
    parameters[2][first + c] = static_cast<S>(-c2 * scale);
  }
}

// Sums values (N, C) over the samples.
template <typename S>
void sum_samples(const Call<S>& call, const double* values, double* totals) {
  std::fill_n(totals, call.channels, 0.0);
  for (int64_t n = 0; n < call.samples; ++n) {
    kernel_table<double>().add_to_total(values + n * call.channels, totals, call.channels);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(const Tensor& dy, const Tensor& x, int64_t groups,
                                                       const optional<Tensor>& weight, const optional<Tensor>& bias,
                                                       const Tensor& mean, const Tensor& rstd,
                                                       at::MemoryFormat memory_format, bool silu,
                                                       optional<ScalarType> dweight_dtype,
                                                       optional<ScalarType> dbias_dtype) {
  const ChannelView view(x, memory_format, false);
  check_parameters(view.channels(), groups, weight, bias);
  const Tensor dx = view.make_result(x.scalar_type());
  const BackwardTensors tensors{view.checked_blocks(dy, "dy"), {}, view.blocks(x), view.blocks(dx), {}};
  return in_compute_type(x, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using S = decltype(zero);
    const Call<S> call(view, groups, weight, bias);
    check_statistics(mean, "mean", {call.samples, groups}, scalar_type_of<S>);
    check_statistics(rstd, "rstd", {call.samples, groups}, scalar_type_of<S>);
    const S* rstds = rstd.const_data_ptr<S>();
    for (int64_t group = 0; group < call.samples * groups; ++group) {
      call.set(group, mean.const_data_ptr<S>()[group], rstds[group], 0);
    }
    const ChannelPlan plan = call.plan(true);
    const ChannelArrays<S, 3> parameters(call.samples * call.channels);  // gain, slope, level
    const BackwardPass<S> backward(
        plan, silu ? Activation::silu : Activation::none, tensors,
        {call.forward[0], call.forward[1], call.forward[2], parameters[0], parameters[1], parameters[2]});
    const SumsPass<S> sums_pass(plan, backward);
    const ChannelArrays<double, 2> sums(call.samples * call.channels);  // Σ dz and Σ dz · x̂ in each sample
    const auto finish = [&](int64_t bundle) {
      const auto [first, last] = call.groups_of(plan, bundle);
      const int64_t start = first * call.in_group;
      sums_pass.add_up(bundle, 0, plan.width(), sums[0] + start, sums[1] + start);
      for (int64_t group = first; group < last; ++group) {
        set_gradients(call, group, rstds[group], sums, parameters);
      }
    };
    plan.run([&](int64_t bundle, int64_t i) { sums_pass.measure(bundle, i); }, finish,
             [&](const Region& chunk) { backward.apply(chunk); });
    const ChannelArrays<double, 2> totals(call.channels);
    sum_samples(call, sums[0], totals[0]);
    sum_samples(call, sums[1], totals[1]);
    return {dx, channel_tensor(totals[1], call.channels, dweight_dtype),
            channel_tensor(totals[0], call.channels, dbias_dtype)};
  });
}

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("group_norm_forward", &group_norm_forward);
  m.impl("group_norm_backward", &group_norm_backward);
}

}  // namespace fastnorm::cpu
