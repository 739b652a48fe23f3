// How the work of batch_norm and group_norm is split among threads and caches. It follows from the shape alone, not
// from the number of threads; so does the order of all sums.
// - A bundle: the elements whose statistics are computed together. In planes that is one unit, the elements that share
//   statistics: a channel of all samples, or a group of a sample. In pixels a row spans all channels, so a bundle is
//   the whole tensor for batch_norm, or a sample for group_norm, with the statistics of its channels or groups side by
//   side.
// - A chunk: the part of a bundle that one thread takes at a time.
// - A block: the part of a chunk that stays in a cache while a kernel works on it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "tensors.h"

namespace fastnorm::cpu {

// Elements [col, col + n) of `rows` rows of a 3-D tensor: the first is row (first, second), the others follow along
// `axis` (0 or 1).
struct Region {
  int64_t first, second;
  int axis;
  int64_t rows;
  int64_t col, n;
  bool is_cached = false;  // whether a small bundle that this is a part of has just been read
};

// A block, and what is prefetched meanwhile: the block after it, or the last block itself; but of inputs that are in
// the cache the next bundle's block.
struct Block : Region {
  Region next, next_input;
};

// Divides a rectangle of rows × n elements into cells of at most row_step × col_step.
struct Grid {
  Grid(int64_t rows, int64_t n, int64_t row_step, int64_t col_step);
  // Cells of at most `elements`: some whole rows, or a part of one row that starts at a word of a mask.
  static Grid of_cells(int64_t rows, int64_t n, int64_t elements);

  int64_t rows, n;
  int64_t row_step, col_step;
  int64_t across, cells;

  // Cell i of a region that has this grid's rows and n.
  Region cell(const Region& region, int64_t i) const;
};

class ChannelPlan {
 public:
  // sizes: (N, C, S) for planes, (N, S, C) for pixels. groups = 0 is batch_norm. `by_channel`: sums are kept for each
  // channel of a group; a bundle of planes may then be several groups.
  ChannelPlan(at::IntArrayRef sizes, Layout layout, int64_t groups, bool by_channel);
  // For the passes of batch_norm without statistics: planes are then taken in the order of memory, sample by sample.
  static ChannelPlan elementwise(at::IntArrayRef sizes, Layout layout);

  int64_t bundles() const { return bundles_; }
  // For group_norm only.
  int64_t bundles_in_sample() const { return bundles_in_sample_; }
  int64_t chunks() const { return bands_ * grid_.cells; }
  int64_t channels() const { return channels_; }
  Layout layout() const { return layout_; }
  // Elements of a channel in all samples; for batch_norm only.
  double channel_size() const { return channel_size_; }
  // How many statistics of a bundle lie side by side, and the place of a region's first channel among them.
  int64_t width() const { return width_; }
  int64_t place(const Region& region) const { return layout_ == Layout::planes ? region.second % width_ : 0; }
  // How many adjacent channels of pixels share a statistic.
  int64_t in_group() const { return layout_ == Layout::pixels ? channels_ / width_ : 1; }
  // Elements of a chunk that each of these statistics covers.
  double depth(const Region& chunk) const { return chunk.rows * (layout_ == Layout::pixels ? in_group() : chunk.n); }
  Region chunk(int64_t bundle, int64_t i) const;
  // The index of a region's first channel in arrays of parameters: (N, C) for group_norm, (C,) for batch_norm.
  int64_t parameters(const Region& region) const;
  // The distance to the index of the next row's parameters.
  int64_t step() const { return layout_ == Layout::planes && groups_ > 0 ? 1 : 0; }

  // Calls body(block) for the blocks of a chunk.
  template <typename Body>
  void each_block(const Region& chunk, const Body& body) const {
    const bool is_whole = chunk.rows == blocks_.rows && chunk.n == blocks_.n;
    const Grid grid = is_whole ? blocks_ : blocks(chunk.rows, chunk.n);
    const int64_t last = grid.cells - 1;
    for (int64_t i = 0; i <= last; ++i) {
      const Region cell = grid.cell(chunk, i), next = grid.cell(chunk, std::min(i + 1, last));
      body(Block{cell, next, chunk.is_cached ? in_next_bundle(cell) : next});
    }
  }
  // The most elements that a block has.
  int64_t block_elements() const;

  // Calls measure(bundle, i) for all chunks of a bundle, finish(bundle), then apply(chunk) for all chunks, those
  // measured last first, as some of them are still in the cache.
  template <typename Measure, typename Finish, typename Apply>
  void run(const Measure& measure, const Finish& finish, const Apply& apply) const;
  template <typename Measure, typename Finish>
  void run(const Measure& measure, const Finish& finish) const;
  template <typename Apply>
  void each_chunk(const Apply& apply) const;

 private:
  Grid blocks(int64_t rows, int64_t n) const;
  // The same part of the next bundle of planes, to be prefetched only: the last bundle has none.
  Region in_next_bundle(Region region) const {
    region.second += groups_ > 0 ? grid_.rows : 1;
    return region;
  }
  int64_t chunk_elements() const { return grid_.row_step * grid_.col_step; }
  // Whether threads take whole bundles. A bundle that fits into a core's cache is then read from memory once.
  bool by_bundle() const;

  Layout layout_;
  int64_t channels_, groups_;
  int64_t sample_step_;  // between the parameters of two samples
  int64_t bundles_, bundles_in_sample_;
  int64_t bands_;  // samples that a bundle of pixels spans
  int64_t width_;
  double channel_size_;
  Grid grid_, blocks_;  // the chunks of a bundle, and the blocks of all chunks but the last
};

template <typename Measure, typename Finish>
void ChannelPlan::run(const Measure& measure, const Finish& finish) const {
  parallel(bundles_ * chunks(), chunk_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      measure(i / chunks(), i % chunks());
    }
  });
  for (int64_t bundle = 0; bundle < bundles_; ++bundle) {
    finish(bundle);
  }
}

template <typename Apply>
void ChannelPlan::each_chunk(const Apply& apply) const {
  parallel(bundles_ * chunks(), chunk_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {
      apply(chunk(i / chunks(), i % chunks()));
    }
  });
}

template <typename Measure, typename Finish, typename Apply>
void ChannelPlan::run(const Measure& measure, const Finish& finish, const Apply& apply) const {
  if (!by_bundle()) {
    run(measure, finish);
    each_chunk(apply);
    return;
  }
  parallel(bundles_, chunks() * chunk_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t bundle = begin; bundle < end; ++bundle) {
      for (int64_t i = 0; i < chunks(); ++i) {
        measure(bundle, i);
      }
      finish(bundle);
      for (int64_t i = chunks() - 1; i >= 0; --i) {
        Region region = chunk(bundle, i);
        region.is_cached = layout_ == Layout::planes && chunks() == 1;  // the next bundle fits into the cache, too
        apply(region);
      }
    }
  });
}

}  // namespace fastnorm::cpu
