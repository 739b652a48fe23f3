#include "channel_plan.h"

namespace fastnorm::cpu {
namespace {

constexpr int64_t word = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The most elements that a block of planes has, and the most rows that one of pixels has.
constexpr int64_t plane_block = 1 << 13;
int64_t pixel_rows(int64_t channels) { return std::clamp<int64_t>((1 << 14) / channels, 32, 64); }

}  // namespace

Grid Grid::of_cells(int64_t rows, int64_t n, int64_t elements) {
  if (n > elements) {
    const int64_t across = divide_up(n, elements);
    return {rows, n, 1, divide_up(divide_up(n, across), word) * word};
  }
  const int64_t down = divide_up(rows, elements / n);
  return {rows, n, divide_up(rows, down), n};
}

Region Grid::cell(const Region& region, int64_t i) const {
  const int64_t row = i / across() * row_step, col = i % across() * col_step;
  Region cell = region;
  (region.axis == 0 ? cell.first : cell.second) += row;
  cell.rows = std::min(row_step, rows - row);
  cell.col += col;
  cell.n = std::min(col_step, n - col);
  return cell;
}

Plan::Plan(at::IntArrayRef sizes, Layout layout, int64_t groups, bool single_rows)
    : layout_(layout), channels_(layout == Layout::pixels ? sizes[2] : sizes[1]), groups_(groups), bands_(1) {
  const int64_t samples = sizes[0];
  if (layout == Layout::pixels) {
    const int64_t pixels = sizes[1];
    pools_ = groups > 0 ? samples : 1;
    bands_ = groups > 0 ? 1 : samples;
    // Half a MiB of float. Below 64 rows writing and reading the pieces' sums takes too long; two pieces there are.
    const int64_t rows = std::max<int64_t>(64, (1 << 17) / channels_);
    const int64_t cells = std::max(std::min<int64_t>(2, pixels), divide_up(pixels, rows));
    grid_ = {pixels, channels_, divide_up(pixels, cells), channels_};
    pool_size_ = static_cast<double>(groups > 0 ? pixels * (channels_ / groups) : samples * pixels);
  } else {
    const int64_t rows = groups > 0 ? channels_ / groups : samples;
    pools_ = groups > 0 ? samples * groups : channels_;
    grid_ = Grid::of_cells(rows, sizes[2], 1 << 16);
    if (single_rows) {
      grid_.row_step = 1;
    }
    pool_size_ = static_cast<double>(rows * sizes[2]);
  }
}

Region Plan::piece(int64_t pool, int64_t i) const {
  Region region{0, 0, 1, grid_.rows, 0, grid_.n};
  if (layout_ == Layout::pixels) {
    region.first = groups_ > 0 ? pool : i / grid_.cells();
  } else if (groups_ > 0) {
    region.first = pool / groups_;
    region.second = pool % groups_ * grid_.rows;
  } else {
    region.second = pool;
    region.axis = 0;
  }
  return grid_.cell(region, i % grid_.cells());
}

int64_t Plan::parameters(const Region& region) const {
  return (groups_ > 0 ? region.first * channels_ : 0) + (layout_ == Layout::planes ? region.second : 0);
}

// Blocks of planes stay in the first-level cache, those of pixels in the second; longer ones spread the cost of a block
// over more rows.
Grid Plan::blocks(const Region& piece, bool mixed) const {
  if (layout_ == Layout::pixels) {
    const int64_t blocks = divide_up(piece.rows, pixel_rows(channels_));
    return {piece.rows, piece.n, divide_up(piece.rows, blocks), piece.n};
  }
  Grid grid = Grid::of_cells(piece.rows, piece.n, plane_block);
  if (groups_ > 0 && !mixed) {
    grid.row_step = 1;
  }
  return grid;
}

int64_t Plan::block_elements() const {
  const int64_t most = layout_ == Layout::pixels ? pixel_rows(channels_) * channels_ : plane_block;
  return std::min(most, piece_elements());
}

bool Plan::by_pool() const {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return pools_ >= 8 * threads || pools_ % threads == 0;
}

}  // namespace fastnorm::cpu
