// How the work of batch_norm and group_norm is split: pools of elements that share their statistics, pieces of pools
// that threads take, and blocks of pieces that stay in a cache. All of it follows from the shape alone.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "tensors.h"

namespace fastnorm::cpu {

// Rows [0, rows) of a 3-D tensor, from (first, second) on along `axis` (0 or 1), and their elements [col, col + n).
struct Region {
  int64_t first, second;
  int axis;
  int64_t rows;
  int64_t col, n;
};

// A part of a piece that is worked on in one go, and the one after it, or the same where it is the last.
struct Block : Region {
  Region next;
};

// A division of a rectangle into cells of at most row_step × col_step.
struct Grid {
  Grid(int64_t rows, int64_t n, int64_t row_step, int64_t col_step);
  // Cells of at most `elements`: several whole rows, or a part of one that starts at a word of a mask.
  static Grid of_cells(int64_t rows, int64_t n, int64_t elements);

  int64_t rows, n;
  int64_t row_step, col_step;
  int64_t across, cells;

  // `region` has this grid's rows and n.
  Region cell(const Region& region, int64_t i) const;
};

class Plan {
 public:
  // sizes: (N, C, S) for planes, (N, S, C) for pixels. groups = 0 pools over the samples. `by_channel`: a group's
  // channels have statistics of their own, as those of pixels do anyway; a pool may then be several groups.
  Plan(at::IntArrayRef sizes, Layout layout, int64_t groups, bool by_channel);

  int64_t pools() const { return pools_; }
  // With groups.
  int64_t pools_in_sample() const { return pools_in_sample_; }
  int64_t pieces() const { return bands_ * grid_.cells; }
  int64_t channels() const { return channels_; }
  Layout layout() const { return layout_; }
  // Elements of a pool, without groups.
  double pool_size() const { return pool_size_; }
  // Channels of a pool whose statistics lie side by side, and where among them those of a region's first channel do.
  int64_t width() const { return width_; }
  int64_t place(const Region& region) const { return layout_ == Layout::planes ? region.second % width_ : 0; }
  // Elements of each of these channels in a piece.
  double depth(const Region& piece) const { return layout_ == Layout::pixels ? piece.rows : piece.rows * piece.n; }
  Region piece(int64_t pool, int64_t i) const;
  // Where the parameters of a piece's or block's first channel lie, in arrays of (N, C) with groups, of (C) without.
  int64_t parameters(const Region& region) const;
  // How far the next row's lie behind them.
  int64_t step() const { return layout_ == Layout::planes && groups_ > 0 ? 1 : 0; }

  // Calls body(block) for the blocks of a piece.
  template <typename Body>
  void each_block(const Region& piece, const Body& body) const {
    const bool is_whole = piece.rows == blocks_.rows && piece.n == blocks_.n;
    const Grid grid = is_whole ? blocks_ : blocks(piece.rows, piece.n);
    const int64_t last = grid.cells - 1;
    for (int64_t i = 0; i <= last; ++i) {
      body(Block{grid.cell(piece, i), grid.cell(piece, std::min(i + 1, last))});
    }
  }
  // No block has more elements.
  int64_t block_elements() const;

  // measure(pool, i) for all pieces of a pool, finish(pool), then apply(piece), which starts with the pieces that were
  // measured last: a part of them is still in the cache.
  template <typename Measure, typename Finish, typename Apply>
  void run(const Measure& measure, const Finish& finish, const Apply& apply) const;
  template <typename Measure, typename Finish>
  void run(const Measure& measure, const Finish& finish) const;
  template <typename Apply>
  void each_piece(const Apply& apply) const;

 private:
  Grid blocks(int64_t rows, int64_t n) const;
  int64_t piece_elements() const { return grid_.row_step * grid_.col_step; }
  // Whether threads take whole pools, each of which then comes from memory once if it fits into a core's cache.
  bool by_pool() const;

  Layout layout_;
  int64_t channels_, groups_;
  int64_t pools_, pools_in_sample_, bands_, width_;
  double pool_size_;
  Grid grid_, blocks_;  // the pieces of a pool, and the blocks of all pieces but the last
};

template <typename Measure, typename Finish>
void Plan::run(const Measure& measure, const Finish& finish) const {
  parallel(pools_ * pieces(), piece_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      measure(i / pieces(), i % pieces());
    }
  });
  for (int64_t pool = 0; pool < pools_; ++pool) {
    finish(pool);
  }
}

template <typename Apply>
void Plan::each_piece(const Apply& apply) const {
  parallel(pools_ * pieces(), piece_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {
      apply(piece(i / pieces(), i % pieces()));
    }
  });
}

template <typename Measure, typename Finish, typename Apply>
void Plan::run(const Measure& measure, const Finish& finish, const Apply& apply) const {
  if (!by_pool()) {
    run(measure, finish);
    each_piece(apply);
    return;
  }
  parallel(pools_, pieces() * piece_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t pool = begin; pool < end; ++pool) {
      for (int64_t i = 0; i < pieces(); ++i) {
        measure(pool, i);
      }
      finish(pool);
      for (int64_t i = pieces() - 1; i >= 0; --i) {
        apply(piece(pool, i));
      }
    }
  });
}

}  // namespace fastnorm::cpu
