// What adaptive clipping's kernel takes, and how a list of gradients is cut into launches. A unit is a row of a tensor,
// or a whole tensor. Free of torch and CUDA: a test compiles it alone and runs the launches that it plans.
#pragma once

#include "plan.h"

namespace fastnorm::cuda {

constexpr int BLOCK_PACKS = 1 << 11;             // that a block keeps in shared memory
constexpr int WARPS = BLOCK / 32;                // of a block
constexpr int WARP_PACKS = BLOCK_PACKS / WARPS;  // that a warp keeps in shared memory
constexpr int64_t LONG_BYTES = 1 << 18;          // a unit that is longer is shared by many blocks
constexpr int GRADIENTS = 1000;                  // of one launch

// A gradient, its parameter, and the number of units that both have.
struct Gradient : Item {
  uint64_t parameter;
  int parameter_dtype;
  int64_t units;

  int64_t length() const { return size / units; }
  int64_t unit_bytes() const { return length() * item_bytes(dtype); }
  bool is_long() const { return length() * std::max(item_bytes(dtype), item_bytes(parameter_dtype)) > LONG_BYTES; }
  bool takes_warps() const { return unit_bytes() <= WARP_PACKS * PACK_BYTES; }
  int64_t blocks() const { return takes_warps() ? (units + WARPS - 1) / WARPS : units; }
};

struct AgcArguments {
  uint64_t gradient[GRADIENTS];
  uint64_t parameter[GRADIENTS];
  int64_t extent[GRADIENTS];  // of a unit: (size << DTYPE_BITS | parameter's dtype) << DTYPE_BITS | gradient's dtype
  uint32_t units[GRADIENTS];
  uint32_t end[GRADIENTS];  // blocks of the tensors up to this one
  double p;
  double clip_factor;
  double eps;
  int count;
  int kind;
};

static_assert(sizeof(AgcArguments) <= 32764);

struct AgcRequest {
  double p;
  double clip_factor;
  double eps;
  int kind;
};

// Calls launch(arguments, blocks) for as few launches as possible. No gradient has long units.
template <class Launch>
void cut_agc(const std::vector<Gradient>& gradients, const AgcRequest& request, Launch launch) {
  for (size_t first = 0; first < gradients.size(); first += GRADIENTS) {
    const auto a = std::make_unique<AgcArguments>();
    a->p = request.p;
    a->clip_factor = request.clip_factor;
    a->eps = request.eps;
    a->kind = request.kind;
    a->count = static_cast<int>(std::min<size_t>(GRADIENTS, gradients.size() - first));
    uint32_t blocks = 0;
    for (int i = 0; i < a->count; ++i) {
      const Gradient& gradient = gradients[first + i];
      a->gradient[i] = gradient.address;
      a->parameter[i] = gradient.parameter;
      a->extent[i] = (gradient.length() << DTYPE_BITS | gradient.parameter_dtype) << DTYPE_BITS | gradient.dtype;
      a->units[i] = static_cast<uint32_t>(gradient.units);
      a->end[i] = blocks += static_cast<uint32_t>(gradient.blocks());
    }
    launch(*a, blocks);
  }
}

// All units of the gradients, then all units of their parameters, each as an item.
inline std::vector<Item> unit_items(const std::vector<Gradient>& gradients) {
  std::vector<Item> items;
  for (const bool parameter : {false, true}) {
    for (const Gradient& gradient : gradients) {
      const int dtype = parameter ? gradient.parameter_dtype : gradient.dtype;
      uint64_t address = parameter ? gradient.parameter : gradient.address;
      for (int64_t unit = 0; unit < gradient.units; ++unit) {
        items.push_back({address, gradient.length(), dtype});
        address += static_cast<uint64_t>(gradient.length()) * item_bytes(dtype);
      }
    }
  }
  return items;
}

}  // namespace fastnorm::cuda
