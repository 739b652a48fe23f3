// The passes over the tensors of batch_norm and group_norm, piece by piece.
#pragma once

#include <optional>

#include "channel_blocks.h"

namespace fastnorm::cpu {

// Two numbers for each of a plan's pieces and the channels that lie side by side in it.
class Partials {
 public:
  explicit Partials(const Plan& plan)
      : pieces_(plan.pieces()), width_(plan.width()), values_(new double[plan.pools() * pieces_ * 2 * width_]()) {}
  double* at(int64_t pool, int64_t piece, int which) const {
    return values_.get() + ((pool * pieces_ + piece) * 2 + which) * width_;
  }

 private:
  int64_t pieces_, width_;
  std::unique_ptr<double[]> values_;
};

template <typename S>
const ChannelKernels<S>& channel_kernels(const Plan& plan, Dtype working) {
  return rows<S>().channels[static_cast<int>(working)].of[static_cast<int>(plan.layout())];
}

// The statistics of x's pieces.
template <typename S>
class SpreadPass {
 public:
  SpreadPass(const Plan& plan, const at::Tensor& x)
      : plan_(plan),
        x_(x, dtype_from(x.scalar_type())),
        spread_(channel_kernels<S>(plan, dtype_from(x.scalar_type())).spread),
        partials_(plan) {}

  void measure(int64_t pool, int64_t i) const {
    const Region piece = plan_.piece(pool, i);
    const BlockScratch<S> scratch(plan_, 0, 3);
    SpreadBlock<S> b{};
    b.mean = partials_.at(pool, i, 0);
    b.square_sum = partials_.at(pool, i, 1);
    b.scratch = scratch.sums();
    plan_.each_block(piece, [&](const Block& block) {
      b.x = x_.read(block, nullptr);
      b.rows = block.rows;
      b.n = block.n;
      spread_(b);
      b.count += plan_.depth(block);
    });
  }

  // Writes the means and the sums of squared differences from them of a pool's channels [begin, end).
  void merge(int64_t pool, int64_t begin, int64_t end, double* mean, double* square_sum) const {
    if (plan_.pieces() == 1) {
      std::copy_n(partials_.at(pool, 0, 0) + begin, end - begin, mean);
      std::copy_n(partials_.at(pool, 0, 1) + begin, end - begin, square_sum);
      return;
    }
    std::fill(mean, mean + (end - begin), 0.0);
    std::fill(square_sum, square_sum + (end - begin), 0.0);
    Spreads all{0, mean, square_sum};
    for (int64_t i = 0; i < plan_.pieces(); ++i) {
      const double count = plan_.depth(plan_.piece(pool, i));
      const Spreads part{count, partials_.at(pool, i, 0) + begin, partials_.at(pool, i, 1) + begin};
      instruction_set().merge_spreads(all, part, end - begin);
      all.count += count;
    }
  }

 private:
  const Plan& plan_;
  Blocks3d<S> x_;
  void (*spread_)(const SpreadBlock<S>&);
  Partials partials_;
};

// Calls body(begin, end) for some channels at a time, so few that their numbers fit on the stack.
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

// y of pieces.
template <typename S>
class ForwardPass {
 public:
  ForwardPass(const Plan& plan, Activation activation, const at::Tensor& x, const at::Tensor& residual,
              const at::Tensor& y, const at::Tensor& mask)
      : ForwardPass(plan, activation, x, residual, y, mask, working_dtype<S>({&x, &residual, &y})) {}

  // The parameters are arrays of all channels, as plan.parameters() counts them.
  void apply(const Region& piece, const S* mean, const S* scale, const S* shift) const {
    y_.prepare(piece);
    const BlockScratch<S> scratch(plan_, converts_ ? 3 : 0, 0);
    plan_.each_block(piece, [&](const Block& block) {
      const int64_t at = plan_.parameters(block);
      ForwardBlock<S> b{};
      b.x = x_.read(block, scratch.block(0));
      b.residual = residual_.read(block, scratch.block(1));
      b.y = y_.write(block, scratch.block(2));
      b.mask = mask_.strip(block);
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
  ForwardPass(const Plan& plan, Activation activation, const at::Tensor& x, const at::Tensor& residual,
              const at::Tensor& y, const at::Tensor& mask, Dtype working)
      : plan_(plan),
        x_(x, working),
        residual_(residual, working),
        y_(y, working),
        mask_(mask),
        converts_(x_.converts() || residual_.converts() || y_.converts()),
        forward_(channel_kernels<S>(plan, working).forward[static_cast<int>(activation)]) {}

  const Plan& plan_;
  Blocks3d<S> x_, residual_, y_;
  MaskBlocks mask_;
  bool converts_;
  void (*forward_)(const ForwardBlock<S>&);
};

// Gradients of pieces; tensors that a call does not have are undefined.
struct BackwardTensors {
  at::Tensor dy, mask, x, dx, dresidual;
};

// Arrays of all channels, as plan.parameters() counts them; see BackwardBlock.
template <typename S>
struct BackwardParameters {
  const S *mean, *scale, *shift, *gain, *slope, *level;
};

template <typename S>
class BackwardPass {
 public:
  BackwardPass(const Plan& plan, Activation activation, const BackwardTensors& tensors,
               const BackwardParameters<S>& parameters)
      : BackwardPass(plan, activation, tensors, parameters,
                     working_dtype<S>({&tensors.dy, &tensors.x, &tensors.dx, &tensors.dresidual})) {}

  // Adds Σ dz and Σ dz · (x − mean) of a piece's channels, which have their places in the plan's width.
  void measure(const Region& piece, double* sum, double* product) const {
    const BlockScratch<S> scratch(plan_, converts_ ? 4 : 0, 2);
    plan_.each_block(piece, [&](const Block& block) {
      BackwardBlock<S> b = inputs(block, scratch);
      b.sum = sum + plan_.place(block);
      b.product = product + plan_.place(block);
      b.scratch = scratch.sums();
      sums_(b);
    });
  }

  void apply(const Region& piece) const {
    dx_.prepare(piece);
    dresidual_.prepare(piece);
    const BlockScratch<S> scratch(plan_, converts_ ? 4 : 0, 0);
    plan_.each_block(piece, [&](const Block& block) {
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
  BackwardPass(const Plan& plan, Activation activation, const BackwardTensors& tensors,
               const BackwardParameters<S>& parameters, Dtype working)
      : plan_(plan),
        dy_(tensors.dy, working),
        x_(tensors.x, working),
        dx_(tensors.dx, working),
        dresidual_(tensors.dresidual, working),
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
    b.mask = mask_.strip(block);
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

  const Plan& plan_;
  Blocks3d<S> dy_, x_, dx_, dresidual_;
  MaskBlocks mask_;
  bool converts_;
  BackwardParameters<S> parameters_;
  void (*sums_)(const BackwardBlock<S>&);
  void (*backward_)(const BackwardBlock<S>&);
};

// The sums of all pieces of a backward call.
template <typename S>
class SumsPass {
 public:
  SumsPass(const Plan& plan, const BackwardPass<S>& pass) : plan_(plan), pass_(pass), partials_(plan) {}

  void measure(int64_t pool, int64_t i) const {
    pass_.measure(plan_.piece(pool, i), partials_.at(pool, i, 0), partials_.at(pool, i, 1));
  }

  // Writes the sums over a pool's pieces of its channels [begin, end).
  void add_up(int64_t pool, int64_t begin, int64_t end, double* sum, double* product) const {
    double* totals[] = {sum, product};
    for (int which = 0; which < 2; ++which) {
      std::copy_n(partials_.at(pool, 0, which) + begin, end - begin, totals[which]);
      for (int64_t i = 1; i < plan_.pieces(); ++i) {
        rows<double>().add_to_total(partials_.at(pool, i, which) + begin, totals[which], end - begin);
      }
    }
  }

 private:
  const Plan& plan_;
  const BackwardPass<S>& pass_;
  Partials partials_;
};

// Stores numbers of channels in a fresh tensor (C,) of the dtype; undefined without one.
at::Tensor channel_tensor(const double* values, int64_t channels, std::optional<at::ScalarType> type);

// Calls f with a float or a double: what x's statistics are kept in.
template <typename F>
auto in_compute_type(const at::Tensor& x, const F& f) {
  return x.scalar_type() == at::kDouble ? f(double{}) : f(float{});
}

}  // namespace fastnorm::cpu
