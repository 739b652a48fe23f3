// What the kernels over lists of tensors get, and how a list is cut into pieces and launches. Free of torch and CUDA:
// a test compiles it alone and runs the launches that it plans.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace fastnorm::cuda {

#ifdef __CUDACC__
#define FASTNORM_BOTH __host__ __device__
#else
#define FASTNORM_BOTH
#endif

enum Dtype : int { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };
constexpr int DTYPE_BITS = 2;

FASTNORM_BOTH constexpr int item_bytes(int dtype) { return dtype == FLOAT32 ? 4 : dtype == FLOAT64 ? 8 : 2; }

enum Kind : int { SQUARES, MAGNITUDES, NONZEROS, POWERS, MAXIMUM, MINIMUM };
constexpr int ANY_KIND = -1;  // a kernel that asks at run time

inline int kind_of(double p) {
  if (std::isinf(p)) {
    return p > 0 ? MAXIMUM : MINIMUM;
  }
  return p == 0 ? NONZEROS : p == 1 ? MAGNITUDES : p == 2 ? SQUARES : POWERS;
}

constexpr int BLOCK = 256;  // threads
constexpr int PACK_BYTES = 16;
constexpr int MIN_PIECE_BYTES = 1 << 14;  // four packs of every thread
constexpr int64_t PIECES = 4096;          // that a list is cut into at most, besides one for each tensor

// Arguments travel with the launch, so that nothing has to be copied before it and a CUDA graph can hold it. Kernels
// take 4 KB of them everywhere, and 32,764 bytes from CUDA 12.1 on, older than any toolkit of the torch versions that
// fastnorm supports. Long lists use that: 2,000 tensors go in 2 launches instead of 11. Short ones, where the whole
// clip may take no longer than such a launch, don't pay for it.
constexpr int FEW = 192;
constexpr int MANY = 1600;

// The storage of one tensor.
struct Item {
  uint64_t address;
  int64_t size;  // elements
  int dtype;

  uint64_t start() const { return address & ~uint64_t(PACK_BYTES - 1); }
  uint64_t end() const { return address + static_cast<uint64_t>(size) * item_bytes(dtype); }
};

// N tensors, each cut into pieces of `piece_bytes` from the 16-byte boundary at or before its start on: so only its
// first and last piece begin or end between two boundaries.
template <int N>
struct Table {
  uint64_t address[N];
  int64_t extent[N];  // size << DTYPE_BITS | dtype
  uint32_t end[N];    // pieces of the tensors up to this one
  int count;
  int piece_bytes;
};

template <int N>
struct NormArguments {
  Table<N> table;
  double p;
  double max_norm;
  double* partials;   // one for each piece of this launch
  double* sums;       // one for each tensor of the list: Σ|x|^p, or the extremum
  uint32_t* tickets;  // one for each tensor of the list and one for the list; zero before and after
  void* norms;
  void* total;
  void* coefficient;
  float* nonfinite;
  uint32_t first;  // the list's index of the launch's first tensor
  uint32_t tensors;
  int kind;
  int wide;  // results are float64
};

// CLIP_UNITS: adaptive clipping of units that are too long for one block; each is an item of its own.
enum Change : int { SCALE, CLAMP, CLIP_UNITS };

template <int N>
struct ChangeArguments {
  Table<N> table;
  const void* coefficient;  // SCALE: float32, or float64 if `wide`
  const double* norms;      // CLIP_UNITS: of the gradients' units, behind them of the parameters' units
  double bound;             // CLAMP
  double clip_factor;       // CLIP_UNITS
  double eps;
  uint32_t first;
  uint32_t tensors;
  int wide;
};

static_assert(sizeof(NormArguments<FEW>) <= 4096 && sizeof(ChangeArguments<FEW>) <= 4096);
static_assert(sizeof(NormArguments<MANY>) <= 32764 && sizeof(ChangeArguments<MANY>) <= 32764);

// The same for a list whatever the card, so that results don't depend on it.
inline int piece_bytes(const std::vector<Item>& items) {
  int64_t total = 0;
  for (const Item& item : items) {
    total += item.size * item_bytes(item.dtype);
  }
  int64_t bytes = MIN_PIECE_BYTES;
  while (bytes < total / PIECES && bytes < 1 << 30) {
    bytes *= 2;
  }
  return static_cast<int>(bytes);
}

// At least one, so that every tensor gets its norm.
inline uint32_t pieces(const Item& item, int bytes) {
  const uint64_t span = item.end() - item.start();
  return item.size == 0 ? 1 : static_cast<uint32_t>((span + bytes - 1) / bytes);
}

inline int64_t pieces(const std::vector<Item>& items, int bytes) {
  int64_t total = 0;
  for (const Item& item : items) {
    total += pieces(item, bytes);
  }
  return total;
}

// Calls launch(arguments, blocks) for as few launches as the list fits in. `make` gives the arguments without their
// table, for the list's first tensor and the number of pieces before it.
template <int N, class Make, class Launch>
void cut(const std::vector<Item>& items, int bytes, Make make, Launch launch) {
  int64_t pieces_before = 0;
  for (size_t first = 0; first < items.size(); first += N) {
    const auto arguments = make(static_cast<uint32_t>(first), pieces_before);  // on the heap: up to 32 KB
    arguments->first = static_cast<uint32_t>(first);
    Table<N>& table = arguments->table;
    table.count = static_cast<int>(std::min<size_t>(N, items.size() - first));
    table.piece_bytes = bytes;
    uint32_t blocks = 0;
    for (int i = 0; i < table.count; ++i) {
      const Item& item = items[first + i];
      table.address[i] = item.address;
      table.extent[i] = item.size << DTYPE_BITS | item.dtype;
      table.end[i] = blocks += pieces(item, bytes);
    }
    launch(*arguments, blocks);
    pieces_before += blocks;
  }
}

// Everything of NormArguments but the table.
struct NormRequest {
  double p;
  double max_norm;
  double* workspace;  // norm_workspace(items) doubles
  uint32_t* tickets;  // items + 1
  void* norms;
  void* total;
  void* coefficient;
  float* nonfinite;
  int kind;
  int wide;
};

inline int64_t norm_workspace(const std::vector<Item>& items) {
  return static_cast<int64_t>(items.size()) + pieces(items, piece_bytes(items));
}

template <int N, class Launch>
void cut_norm(const std::vector<Item>& items, const NormRequest& request, Launch launch) {
  const auto make = [&](uint32_t, int64_t pieces_before) {
    auto arguments = std::make_unique<NormArguments<N>>();
    arguments->p = request.p;
    arguments->max_norm = request.max_norm;
    arguments->sums = request.workspace;
    arguments->partials = request.workspace + items.size() + pieces_before;
    arguments->tickets = request.tickets;
    arguments->norms = request.norms;
    arguments->total = request.total;
    arguments->coefficient = request.coefficient;
    arguments->nonfinite = request.nonfinite;
    arguments->tensors = static_cast<uint32_t>(items.size());
    arguments->kind = request.kind;
    arguments->wide = request.wide;
    return arguments;
  };
  cut<N>(items, piece_bytes(items), make, launch);
}

// Everything of ChangeArguments but the table.
struct ChangeRequest {
  const void* coefficient;
  const double* norms;
  double bound;
  double clip_factor;
  double eps;
  int wide;
};

template <int N, class Launch>
void cut_change(const std::vector<Item>& items, const ChangeRequest& request, Launch launch) {
  const auto make = [&](uint32_t, int64_t) {
    auto arguments = std::make_unique<ChangeArguments<N>>();
    arguments->coefficient = request.coefficient;
    arguments->norms = request.norms;
    arguments->bound = request.bound;
    arguments->clip_factor = request.clip_factor;
    arguments->eps = request.eps;
    arguments->wide = request.wide;
    arguments->tensors = static_cast<uint32_t>(items.size());
    return arguments;
  };
  cut<N>(items, piece_bytes(items), make, launch);
}

// The list in parts none of which touches a byte twice: a tensor that is there twice is changed twice, by launches
// that follow each other.
template <class T>
std::vector<std::vector<T>> disjoint(std::vector<T> items) {
  items.erase(std::remove_if(items.begin(), items.end(), [](const T& item) { return item.size == 0; }), items.end());
  std::stable_sort(items.begin(), items.end(), [](const T& a, const T& b) { return a.address < b.address; });
  std::vector<std::vector<T>> parts;
  for (const T& item : items) {
    const auto fits = [&](const std::vector<T>& part) { return part.back().end() <= item.address; };
    const auto part = std::find_if(parts.begin(), parts.end(), fits);
    (part == parts.end() ? parts.emplace_back() : *part).push_back(item);
  }
  return parts;
}

}  // namespace fastnorm::cuda
