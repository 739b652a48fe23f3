// group_norm on the CPU.
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

// Sizes, and the parameters of (samples, channels) that the passes take.
template <typename S>
struct Call {
  Call(const ChannelView& view, int64_t groups, const optional<Tensor>& weight, const optional<Tensor>& bias)
      : view(view),
        samples(view.sizes()[0]),
        channels(view.channels()),
        size(view.sizes()[view.layout() == Layout::pixels ? 1 : 2]),
        groups(groups),
        in_group(channels / groups),
        held{contiguous(weight), contiguous(bias)},
        weight(held[0], channels, 1, 0),
        bias(held[1], channels, 0, 0),
        forward(samples * channels) {}

  Plan plan(bool by_channel) const { return Plan(view.sizes(), view.layout(), groups, by_channel); }

  // The groups of a pool of a plan.
  std::pair<int64_t, int64_t> groups_of(const Plan& plan, int64_t pool) const {
    const int64_t count = groups / plan.pools_in_sample();
    return {pool * count, (pool + 1) * count};
  }

  // Sets the forward parameters of a group of a sample; `lost` as in batch_norm.
  void set(int64_t group, S mean, S rstd, double lost) const {
    const int64_t first = group % groups * in_group;
    for (int64_t c = first; c < first + in_group; ++c) {
      const int64_t at = group / groups * channels + c;
      forward[0][at] = mean;
      forward[1][at] = rstd * weight.get()[c];
      forward[2][at] = static_cast<S>(bias.get()[c] + lost * weight.get()[c]);
    }
  }

  const ChannelView& view;
  int64_t samples, channels, size, groups, in_group;
  optional<Tensor> held[2];  // where the values may lie
  ColumnValues<S> weight, bias;
  ChannelArrays<S, 3> forward;  // mean, scale, shift
};

void check_parameters(int64_t channels, int64_t groups, const optional<Tensor>& weight, const optional<Tensor>& bias) {
  TORCH_CHECK(groups > 0 && channels % groups == 0, "fastnorm: expected a number of channels divisible by ", groups,
              " groups, got ", channels);
  check_parameter(weight, "weight", {channels});
  check_parameter(bias, "bias", {channels});
}

// The statistics of a group whose channels have `depth` elements each; the mean of equal means is exact.
std::pair<double, double> merge_channels(const double* mean, const double* square_sum, int64_t channels, double depth) {
  double group_mean = mean[0], group_square_sum = 0;
  for (int64_t c = 1; c < channels; ++c) {
    group_mean += (mean[c] - mean[0]) / static_cast<double>(channels);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double distance = mean[c] - group_mean;
    group_square_sum += square_sum[c] + depth * distance * distance;
  }
  return {group_mean, group_square_sum};
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
    const Plan plan = call.plan(false);
    const SpreadPass<S> spread(plan, blocks);
    const ForwardPass<S> forward(plan, silu ? Activation::silu : Activation::none, blocks, {}, view.blocks(y), {});
    const ChannelArrays<double, 2> found(plan.pools() * plan.width());
    const double n = static_cast<double>(call.in_group) * static_cast<double>(call.size);
    const auto finish = [&](int64_t pool) {
      double* const pool_mean = found[0] + pool * plan.width();
      double* const pool_square_sum = found[1] + pool * plan.width();
      each_channels(plan.width(), plan.pieces(), [&](int64_t begin, int64_t end) {
        spread.merge(pool, begin, end, pool_mean + begin, pool_square_sum + begin);
      });
      const auto [first, last] = call.groups_of(plan, pool);
      const int64_t parts = plan.width() / (last - first);
      for (int64_t group = first; group < last; ++group) {
        const int64_t at = (group - first) * parts;
        const auto [exact, square_sum] =
            merge_channels(pool_mean + at, pool_square_sum + at, parts, static_cast<double>(call.size));
        const double inverse = 1 / std::sqrt(square_sum / n + eps);
        means[group] = static_cast<S>(exact);
        rstds[group] = static_cast<S>(inverse);
        call.set(group, means[group], rstds[group], (means[group] - exact) * inverse);
      }
    };
    plan.run([&](int64_t pool, int64_t i) { spread.measure(pool, i); }, finish,
             [&](const Region& piece) { forward.apply(piece, call.forward[0], call.forward[1], call.forward[2]); });
    return {y, mean, rstd};
  });
}

namespace {

// Σ_n of what each sample's channel has.
template <typename S>
void sum_samples(const Call<S>& call, const double* values, double* totals) {
  std::fill_n(totals, call.channels, 0.0);
  for (int64_t n = 0; n < call.samples; ++n) {
    rows<double>().add_to_total(values + n * call.channels, totals, call.channels);
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
    check_moments(mean, "mean", {call.samples, groups}, scalar_type_of<S>);
    check_moments(rstd, "rstd", {call.samples, groups}, scalar_type_of<S>);
    const S* rstds = rstd.const_data_ptr<S>();
    for (int64_t group = 0; group < call.samples * groups; ++group) {
      call.set(group, mean.const_data_ptr<S>()[group], rstds[group], 0);
    }
    const Plan plan = call.plan(true);
    const ChannelArrays<S, 3> parameters(call.samples * call.channels);  // gain, slope, level
    const BackwardPass<S> backward(
        plan, silu ? Activation::silu : Activation::none, tensors,
        {call.forward[0], call.forward[1], call.forward[2], parameters[0], parameters[1], parameters[2]});
    const SumsPass<S> sums(plan, backward);
    const ChannelArrays<double, 2> found(call.samples * call.channels);  // Σ dz and Σ dz · x̂ in each sample
    const double n = static_cast<double>(call.in_group) * static_cast<double>(call.size);
    const auto finish = [&](int64_t pool) {
      const auto [first, last] = call.groups_of(plan, pool);
      const int64_t start = first * call.in_group;
      sums.add_up(pool, 0, plan.width(), found[0] + start, found[1] + start);
      for (int64_t group = first; group < last; ++group) {
        const S inverse = n == 1 ? 0 : rstds[group];  // of one element, dx is 0 whatever is rounded
        const S* weight = call.weight.get() + group % groups * call.in_group;
        double sum = 0, product = 0;
        for (int64_t k = 0; k < call.in_group; ++k) {
          const int64_t at = group * call.in_group + k;
          found[1][at] *= inverse;
          sum += found[0][at] * weight[k];
          product += found[1][at] * weight[k];
        }
        for (int64_t k = 0; k < call.in_group; ++k) {
          const int64_t at = group * call.in_group + k;
          parameters[0][at] = inverse * weight[k];
          parameters[1][at] = static_cast<S>(-product / n * inverse * inverse);
          parameters[2][at] = static_cast<S>(-sum / n * inverse);
        }
      }
    };
    plan.run([&](int64_t pool, int64_t i) { sums.measure(pool, i); }, finish,
             [&](const Region& piece) { backward.apply(piece); });
    const ChannelArrays<double, 2> totals(call.channels);
    sum_samples(call, found[0], totals[0]);
    sum_samples(call, found[1], totals[1]);
    return {dx, channel_tensor(totals[1], call.channels, dweight_dtype),
            channel_tensor(totals[0], call.channels, dbias_dtype)};
  });
}

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("group_norm_forward", &group_norm_forward);
  m.impl("group_norm_backward", &group_norm_backward);
}

}  // namespace fastnorm::cpu
