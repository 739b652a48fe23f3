// The passes of batch_norm and group_norm over their tensors, chunk by chunk: moments, y, sums for the backward, dx.
#pragma once

#include <optional>

#include "channel_blocks.h"

namespace fastnorm::cpu {

// Partial sums: two numbers for each chunk of a plan and each statistic in it.
class Partials {
 public:
  explicit Partials(const ChannelPlan& plan)
      : chunks_(plan.chunks()), width_(plan.width()), values_(new double[plan.bundles() * chunks_ * 2 * width_]()) {}
  double* at(int64_t bundle, int64_t chunk, int which) const {
    return values_.get() + ((bundle * chunks_ + chunk) * 2 + which) * width_;
  }

 private:
  int64_t chunks_, width_;
  std::unique_ptr<double[]> values_;
};

template <typename S>
const ChannelKernels<S>& channel_kernels(const ChannelPlan& plan, Dtype working) {
  return kernel_table<S>().channel_norms[static_cast<int>(working)].of[static_cast<int>(plan.layout())];
}

// The moments of x: those of each chunk, which `merge` merges in a fixed order.
template <typename S>
class MomentsPass {
 public:
  MomentsPass(const ChannelPlan& plan, const at::Tensor& x)
      : plan_(plan),
        x_(x, dtype_from(x.scalar_type()), plan, Activation::none),
        moments_(channel_kernels<S>(plan, dtype_from(x.scalar_type())).moments),
        partials_(plan) {}

  void measure(int64_t bundle, int64_t i) const {
    const Region chunk = plan_.chunk(bundle, i);
    const BlockScratch<S> scratch(plan_, 0, 3);
    MomentsBlock<S> b{};
    b.mean = partials_.at(bundle, i, 0);
    b.m2 = partials_.at(bundle, i, 1);
    b.scratch = scratch.sums();
    plan_.each_block(chunk, [&](const Block& block) {
      b.x = x_.read(block, nullptr);
      b.rows = block.rows;
      b.n = block.n;
      b.in_group = plan_.in_group();
      moments_(b);
      b.count += plan_.depth(block);
    });
  }

  // Writes the moments of a bundle's statistics [begin, end).
  void merge(int64_t bundle, int64_t begin, int64_t end, double* mean, double* m2) const {
    if (plan_.chunks() == 1) {
      std::copy_n(partials_.at(bundle, 0, 0) + begin, end - begin, mean);
      std::copy_n(partials_.at(bundle, 0, 1) + begin, end - begin, m2);
      return;
    }
    std::fill(mean, mean + (end - begin), 0.0);
    std::fill(m2, m2 + (end - begin), 0.0);
    ChannelMoments all{0, mean, m2};
    for (int64_t i = 0; i < plan_.chunks(); ++i) {
      const double count = plan_.depth(plan_.chunk(bundle, i));
      const ChannelMoments added{count, partials_.at(bundle, i, 0) + begin, partials_.at(bundle, i, 1) + begin};
      instruction_set().merge_moments(all, added, end - begin);
      all.count += count;
    }
  }

 private:
  const ChannelPlan& plan_;
  Blocks3d<S> x_;
  void (*moments_)(const MomentsBlock<S>&);
  Partials partials_;
};

// Calls body(begin, end) for at most channels_at_once channels at a time: arrays of so many fit on the stack.
constexpr int64_t channels_at_once = 512;

template <typename Body>
void each_channels(int64_t channels, int64_t work, const Body& body) {
  if (channels <= channels_at_once) {
    body(0, channels);
    return;
  }
  const int64_t parts = (channels + channels_at_once - 1) / channels_at_once;
  parallel(parts, std::min(channels, channels_at_once) * work, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      body(part * channels_at_once, std::min((part + 1) * channels_at_once, channels));
    }
  });
}

// Writes y, and a ReLU's mask.
template <typename S>
class ForwardPass {
 public:
  ForwardPass(const ChannelPlan& plan, Activation activation, const at::Tensor& x, const at::Tensor& residual,
              const at::Tensor& y, const at::Tensor& mask)
      : ForwardPass(plan, activation, x, residual, y, mask, working_dtype<S>({&x, &residual, &y})) {}

  // The parameters are arrays that plan.parameters() indexes.
  void apply(const Region& chunk, const S* mean, const S* scale, const S* shift) const {
    y_.prepare(chunk);
    const BlockScratch<S> scratch(plan_, converts_ ? 3 : 0, 0);
    plan_.each_block(chunk, [&](const Block& block) {
      const int64_t at = plan_.parameters(block);
      ForwardBlock<S> b{};
      b.x = x_.read(block, scratch.block(0));
      b.residual = residual_.read(block, scratch.block(1));
      b.y = y_.write(block, scratch.block(2));
      b.mask = mask_.view(block);
      b.rows = block.rows;
      b.n = block.n;
      b.step = plan_.step();
      b.mean = mean + at;
      b.scale = scale + at;
      b.shift = shift + at;
      forward_(b);
      y_.finish(block, b.y);
    });
    y_.publish();
  }

 private:
  ForwardPass(const ChannelPlan& plan, Activation activation, const at::Tensor& x, const at::Tensor& residual,
              const at::Tensor& y, const at::Tensor& mask, Dtype working)
      : plan_(plan),
        x_(x, working, plan, activation),
        residual_(residual, working, plan, activation),
        y_(y, working, plan, activation),
        mask_(mask),
        converts_(x_.converts() || residual_.converts() || y_.converts()),
        forward_(channel_kernels<S>(plan, working).forward[static_cast<int>(activation)]) {}

  const ChannelPlan& plan_;
  Blocks3d<S> x_, residual_, y_;
  MaskBlocks mask_;
  bool converts_;
  void (*forward_)(const ForwardBlock<S>&);
};

// The tensors of a backward; those that a call does not have are undefined.
struct BackwardTensors {
  at::Tensor dy, mask, x, dx, dresidual;
};

// Arrays that plan.parameters() indexes: dx = gain · dz + slope · (x − mean) + level; scale and shift are SiLU's.
template <typename S>
struct BackwardParameters {
  const S *mean, *scale, *shift, *gain, *slope, *level;
};

// Writes dx and dresidual, or adds up the sums that dx, dweight and dbias need.
template <typename S>
class BackwardPass {
 public:
  BackwardPass(const ChannelPlan& plan, Activation activation, const BackwardTensors& tensors,
               const BackwardParameters<S>& parameters)
      : BackwardPass(plan, activation, tensors, parameters,
                     working_dtype<S>({&tensors.dy, &tensors.x, &tensors.dx, &tensors.dresidual})) {}

  // Adds Σ dz and Σ dz · (x − mean) of a chunk's channels at their places among the bundle's.
  void measure(const Region& chunk, double* dz_sum, double* product_sum) const {
    const BlockScratch<S> scratch(plan_, converts_ ? 4 : 0, 2);
    plan_.each_block(chunk, [&](const Block& block) {
      BackwardBlock<S> b = inputs(block, scratch);
      b.dz_sum = dz_sum + plan_.place(block);
      b.product_sum = product_sum + plan_.place(block);
      b.scratch = scratch.sums();
      sums_(b);
    });
  }

  void apply(const Region& chunk) const {
    dx_.prepare(chunk);
    dresidual_.prepare(chunk);
    const BlockScratch<S> scratch(plan_, converts_ ? 4 : 0, 0);
    plan_.each_block(chunk, [&](const Block& block) {
      BackwardBlock<S> b = inputs(block, scratch);
      b.dx = dx_.write(block, scratch.block(2));
      b.dresidual = dresidual_.write(block, scratch.block(3));
      backward_(b);
      dx_.finish(block, b.dx);
      dresidual_.finish(block, b.dresidual);
    });
    dx_.publish();
    dresidual_.publish();
  }

 private:
  BackwardPass(const ChannelPlan& plan, Activation activation, const BackwardTensors& tensors,
               const BackwardParameters<S>& parameters, Dtype working)
      : plan_(plan),
        dy_(tensors.dy, working, plan, activation),
        x_(tensors.x, working, plan, activation),
        dx_(tensors.dx, working, plan, activation),
        dresidual_(tensors.dresidual, working, plan, activation),
        mask_(tensors.mask),
        converts_(dy_.converts() || x_.converts() || dx_.converts() || dresidual_.converts()),
        parameters_(parameters),
        sums_(channel_kernels<S>(plan, working).sums[static_cast<int>(activation)]),
        backward_(channel_kernels<S>(plan, working).backward[static_cast<int>(activation)]) {}

  BackwardBlock<S> inputs(const Block& block, const BlockScratch<S>& scratch) const {
    const int64_t at = plan_.parameters(block);
    const auto here = [&](const S* values) { return values == nullptr ? nullptr : values + at; };
    BackwardBlock<S> b{};
    b.dy = dy_.read(block, scratch.block(0));
    b.x = x_.read(block, scratch.block(1));
    b.mask = mask_.view(block);
    b.rows = block.rows;
    b.n = block.n;
    b.step = plan_.step();
    b.mean = here(parameters_.mean);
    b.scale = here(parameters_.scale);
    b.shift = here(parameters_.shift);
    b.gain = here(parameters_.gain);
    b.slope = here(parameters_.slope);
    b.level = here(parameters_.level);
    return b;
  }

  const ChannelPlan& plan_;
  Blocks3d<S> dy_, x_, dx_, dresidual_;
  MaskBlocks mask_;
  bool converts_;
  BackwardParameters<S> parameters_;
  void (*sums_)(const BackwardBlock<S>&);
  void (*backward_)(const BackwardBlock<S>&);
};

// The sums of a backward: those of each chunk, which `add_up` adds in a fixed order.
template <typename S>
class SumsPass {
 public:
  SumsPass(const ChannelPlan& plan, const BackwardPass<S>& pass) : plan_(plan), pass_(pass), partials_(plan) {}

  void measure(int64_t bundle, int64_t i) const {
    pass_.measure(plan_.chunk(bundle, i), partials_.at(bundle, i, 0), partials_.at(bundle, i, 1));
  }

  // Writes Σ dz and Σ dz · (x − mean) of a bundle's channels [begin, end).
  void add_up(int64_t bundle, int64_t begin, int64_t end, double* dz_sum, double* product_sum) const {
    double* totals[] = {dz_sum, product_sum};
    for (int which = 0; which < 2; ++which) {
      std::copy_n(partials_.at(bundle, 0, which) + begin, end - begin, totals[which]);
      for (int64_t i = 1; i < plan_.chunks(); ++i) {
        kernel_table<double>().add_to_total(partials_.at(bundle, i, which) + begin, totals[which], end - begin);
      }
    }
  }

 private:
  const ChannelPlan& plan_;
  const BackwardPass<S>& pass_;
  Partials partials_;
};

// A new tensor (C,) with these values; undefined without a dtype.
inline at::Tensor channel_tensor(const double* values, int64_t channels, std::optional<at::ScalarType> type) {
  if (!type) {
    return {};
  }
  at::Tensor tensor = empty({channels}, *type);
  kernel_table<double>().store[static_cast<int>(dtype_from(*type))](values, tensor.mutable_data_ptr(), channels);
  return tensor;
}

// Calls f with a zero of the type that statistics are kept in: double for a double input, float otherwise.
template <typename F>
auto in_compute_type(const at::Tensor& x, const F& f) {
  return x.scalar_type() == at::kDouble ? f(double{}) : f(float{});
}

}  // namespace fastnorm::cpu
