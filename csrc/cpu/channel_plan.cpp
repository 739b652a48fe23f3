#include "channel_plan.h"

namespace fastnorm::cpu {
namespace {

constexpr int64_t word = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The most elements of a block of planes, and the most rows of a block of pixels.
constexpr int64_t plane_block = 1 << 13;
int64_t pixel_rows(int64_t channels) { return std::clamp<int64_t>((1 << 14) / channels, 32, 64); }

// How many groups of a sample make a bundle: as many as fit into a block, but at least one.
int64_t groups_at_once(int64_t groups, int64_t group_elements) {
  int64_t count = std::clamp<int64_t>(plane_block / group_elements, 1, groups);
  while (groups % count != 0) {
    --count;
  }
  return count;
}

}  // namespace

Grid::Grid(int64_t rows, int64_t n, int64_t row_step, int64_t col_step)
    : rows(rows),
      n(n),
      row_step(row_step),
      col_step(col_step),
      across(divide_up(n, col_step)),
      cells(divide_up(rows, row_step) * across) {}

Grid Grid::of_cells(int64_t rows, int64_t n, int64_t elements) {
  if (n > elements) {
    const int64_t across = divide_up(n, elements);
    return {rows, n, 1, divide_up(divide_up(n, across), word) * word};
  }
  const int64_t down = divide_up(rows, elements / n);
  return {rows, n, divide_up(rows, down), n};
}

Region Grid::cell(const Region& region, int64_t i) const {
  const int64_t row = across == 1 ? i * row_step : i / across * row_step;
  const int64_t col = across == 1 ? 0 : i % across * col_step;
  Region cell = region;
  (region.axis == 0 ? cell.first : cell.second) += row;
  cell.rows = std::min(row_step, rows - row);
  cell.col += col;
  cell.n = std::min(col_step, n - col);
  return cell;
}

ChannelPlan::ChannelPlan(at::IntArrayRef sizes, Layout layout, int64_t groups, bool by_channel)
    : layout_(layout),
      channels_(layout == Layout::pixels ? sizes[2] : sizes[1]),
      groups_(groups),
      sample_step_(groups > 0 ? channels_ : 0),
      bundles_in_sample_(1),
      bands_(1),
      grid_(1, 1, 1, 1),
      blocks_(grid_) {
  const int64_t samples = sizes[0];
  if (layout == Layout::pixels) {
    const int64_t pixels = sizes[1];
    bundles_ = groups > 0 ? samples : 1;
    bands_ = groups > 0 ? 1 : samples;
    // At least two chunks, of half a MiB of float. Below 64 rows, writing and reading their sums takes too long.
    const int64_t rows = std::max<int64_t>(64, (1 << 17) / channels_);
    const int64_t cells = std::max(std::min<int64_t>(2, pixels), divide_up(pixels, rows));
    grid_ = {pixels, channels_, divide_up(pixels, cells), channels_};
    width_ = groups > 0 && !by_channel ? groups : channels_;
    channel_size_ = static_cast<double>(samples * pixels);
  } else {
    int64_t rows = samples;
    bundles_ = channels_;
    if (groups > 0) {
      const int64_t in_group = channels_ / groups;
      bundles_in_sample_ = by_channel ? groups / groups_at_once(groups, in_group * sizes[2]) : groups;
      rows = channels_ / bundles_in_sample_;
      bundles_ = samples * bundles_in_sample_;
    }
    grid_ = Grid::of_cells(rows, sizes[2], 1 << 16);
    width_ = groups > 0 && by_channel ? rows : 1;
    channel_size_ = static_cast<double>(rows * sizes[2]);
  }
  blocks_ = blocks(std::min(grid_.row_step, grid_.rows), std::min(grid_.col_step, grid_.n));
}

ChannelPlan ChannelPlan::elementwise(at::IntArrayRef sizes, Layout layout) {
  ChannelPlan plan(sizes, layout, layout == Layout::planes ? 1 : 0, false);
  plan.sample_step_ = 0;
  return plan;
}

Region ChannelPlan::chunk(int64_t bundle, int64_t i) const {
  Region region{0, 0, 1, grid_.rows, 0, grid_.n};
  if (layout_ == Layout::pixels) {
    region.first = groups_ > 0 ? bundle : i / grid_.cells;
  } else if (groups_ > 0) {
    region.first = bundle / bundles_in_sample_;
    region.second = bundle % bundles_in_sample_ * grid_.rows;
  } else {
    region.second = bundle;
    region.axis = 0;
  }
  return chunks() == 1 ? region : grid_.cell(region, bands_ == 1 ? i : i % grid_.cells);
}

int64_t ChannelPlan::parameters(const Region& region) const {
  return region.first * sample_step_ + (layout_ == Layout::planes ? region.second : 0);
}

// Blocks of planes stay in the L1 cache, those of pixels in the L2: it takes more rows to pay for the cost of a block.
Grid ChannelPlan::blocks(int64_t rows, int64_t n) const {
  if (layout_ == Layout::pixels) {
    return {rows, n, divide_up(rows, divide_up(rows, pixel_rows(channels_))), n};
  }
  return Grid::of_cells(rows, n, plane_block);
}

int64_t ChannelPlan::block_elements() const {
  const int64_t most = layout_ == Layout::pixels ? pixel_rows(channels_) * channels_ : plane_block;
  return std::min(most, chunk_elements());
}

bool ChannelPlan::by_bundle() const {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return bundles_ >= 8 * threads || bundles_ % threads == 0;
}

}  // namespace fastnorm::cpu
