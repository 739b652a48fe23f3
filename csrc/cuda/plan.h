// What the kernels over lists of tensors take, and how a list is cut into chunks and launches. Free of torch and CUDA:
// a test compiles it alone and runs the launches that it plans.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "../policy_rules.h"

namespace fastnorm::cuda {

#ifdef __CUDACC__
#define FASTNORM_BOTH __host__ __device__
#else
#define FASTNORM_BOTH
#endif

enum Dtype : int { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };
constexpr int DTYPE_BITS = 2;

FASTNORM_BOTH constexpr int item_bytes(int dtype) { return dtype == FLOAT32 ? 4 : dtype == FLOAT64 ? 8 : 2; }

// The p-norms by what they sum or compare.
enum Kind : int { SQUARES, MAGNITUDES, NONZEROS, POWERS, MAXIMUM, MINIMUM };
constexpr int ANY_KIND = -1;  // of a kernel that reads the kind at run time

inline int kind_of(double p) {
  if (std::isinf(p)) {
    return p > 0 ? MAXIMUM : MINIMUM;
  }
  return p == 0 ? NONZEROS : p == 1 ? MAGNITUDES : p == 2 ? SQUARES : POWERS;
}

constexpr int BLOCK = 256;  // threads
constexpr int PACK_BYTES = 16;
constexpr int MIN_CHUNK_BYTES = 1 << 14;  // four packs of every thread
constexpr int64_t MAX_CHUNKS = 4096;      // of a list at most, besides one for each tensor

// The most tensors of a launch. Tables of tensors are kernel arguments, so that no copy precedes the launch and a CUDA
// graph can capture it. Arguments may take 4 KB, and 32,764 bytes from CUDA 12.1 on, which all torch versions that
// fastnorm supports have. Long lists use that: 2,000 tensors take 2 launches instead of 11. Short lists don't, as a
// launch with so many arguments may take as long as their whole clip.
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

// N tensors, each cut into chunks of `chunk_bytes`, counted from the 16-byte boundary at or before its start: so all
// inner limits of chunks are 16-byte boundaries.
template <int N>
struct Table {
  uint64_t address[N];
  int64_t extent[N];  // size << DTYPE_BITS | dtype
  uint32_t end[N];    // chunks of the tensors up to this one
  int count;
  int chunk_bytes;
};

template <int N>
struct NormArguments {
  Table<N> table;
  double p;
  double max_norm;  // without a policy
  policy::Policy policy;
  double* partials;   // one for each chunk of this launch
  double* sums;       // one for each tensor of the list: Σ|x|^p, or the extremum
  uint32_t* tickets;  // finished chunks of each tensor, then the finished tensors; zero before and after
  void* norms;
  void* total;
  void* coefficient;  // one, or a policy's for each tensor
  float* nonfinite;   // or whether a policy skips the step
  uint32_t first;     // the list's index of the launch's first tensor
  uint32_t tensors;
  int kind;
  int wide;  // results are float64
};

// What the kernel of changes does. CLIP_UNITS: adaptive clipping of units too long for one block, each an item.
enum Change : int { SCALE, CLAMP, CLIP_UNITS };

template <int N>
struct ChangeArguments {
  Table<N> table;
  const void* coefficient;  // SCALE: float32, or float64 if `wide`; one, or one for each tensor of the list
  const double* norms;      // CLIP_UNITS: of the gradients' units, behind them of the parameters' units
  double bound;             // CLAMP
  double clip_factor;       // CLIP_UNITS
  double eps;
  uint32_t first;
  uint32_t tensors;
  int per_tensor;
  int wide;
};

static_assert(sizeof(NormArguments<FEW>) <= 4096 && sizeof(ChangeArguments<FEW>) <= 4096);
static_assert(sizeof(NormArguments<MANY>) <= 32764 && sizeof(ChangeArguments<MANY>) <= 32764);

// The size of a list's chunks. It doesn't depend on the card, so that results don't either.
inline int chunk_bytes(const std::vector<Item>& items) {
  int64_t total = 0;
  for (const Item& item : items) {
    total += item.size * item_bytes(item.dtype);
  }
  int64_t bytes = MIN_CHUNK_BYTES;
  while (bytes < total / MAX_CHUNKS && bytes < 1 << 30) {
    bytes *= 2;
  }
  return static_cast<int>(bytes);
}

// The number of a tensor's chunks: at least one, so that every tensor gets its norm.
inline uint32_t chunk_count(const Item& item, int bytes) {
  const uint64_t span = item.end() - item.start();
  return item.size == 0 ? 1 : static_cast<uint32_t>((span + bytes - 1) / bytes);
}

inline int64_t chunk_count(const std::vector<Item>& items, int bytes) {
  int64_t total = 0;
  for (const Item& item : items) {
    total += chunk_count(item, bytes);
  }
  return total;
}

// Calls launch(arguments, blocks) for as few launches as possible. make(first, chunks_before) returns the arguments of
// the launch whose first tensor is number `first` of the items, without their table. before: tensors of the list before
// the items.
template <int N, class Make, class Launch>
void cut(const std::vector<Item>& items, uint32_t before, int bytes, Make make, Launch launch) {
  int64_t chunks_before = 0;
  for (size_t first = 0; first < items.size(); first += N) {
    const auto arguments = make(static_cast<uint32_t>(first), chunks_before);  // on the heap: up to 32 KB
    arguments->first = before + static_cast<uint32_t>(first);
    Table<N>& table = arguments->table;
    table.count = static_cast<int>(std::min<size_t>(N, items.size() - first));
    table.chunk_bytes = bytes;
    uint32_t blocks = 0;
    for (int i = 0; i < table.count; ++i) {
      const Item& item = items[first + i];
      table.address[i] = item.address;
      table.extent[i] = item.size << DTYPE_BITS | item.dtype;
      table.end[i] = blocks += chunk_count(item, bytes);
    }
    launch(*arguments, blocks);
    chunks_before += blocks;
  }
}

// Everything of NormArguments but the table.
struct NormRequest {
  double p;
  double max_norm;
  policy::Policy policy;
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
  return static_cast<int64_t>(items.size()) + chunk_count(items, chunk_bytes(items));
}

template <int N, class Launch>
void cut_norm(const std::vector<Item>& items, const NormRequest& request, Launch launch) {
  const auto make = [&](uint32_t, int64_t chunks_before) {
    auto arguments = std::make_unique<NormArguments<N>>();
    arguments->p = request.p;
    arguments->max_norm = request.max_norm;
    arguments->policy = request.policy;
    arguments->sums = request.workspace;
    arguments->partials = request.workspace + items.size() + chunks_before;
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
  cut<N>(items, 0, chunk_bytes(items), make, launch);
}

// Everything of ChangeArguments but the table. first: the list's index of the first item.
struct ChangeRequest {
  const void* coefficient;
  const double* norms;
  double bound;
  double clip_factor;
  double eps;
  uint32_t first;
  int per_tensor;
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
    arguments->per_tensor = request.per_tensor;
    arguments->wide = request.wide;
    arguments->tensors = static_cast<uint32_t>(items.size());
    return arguments;
  };
  cut<N>(items, request.first, chunk_bytes(items), make, launch);
}

// Whether no two tensors share memory.
template <class T>
bool are_disjoint(const std::vector<T>& items) {
  std::vector<std::pair<uint64_t, uint64_t>> spans;
  spans.reserve(items.size());
  for (const T& item : items) {
    if (item.size > 0) {
      spans.emplace_back(item.address, item.end());
    }
  }
  std::sort(spans.begin(), spans.end());
  const auto overlap = [](const auto& a, const auto& b) { return b.first < a.second; };
  return std::adjacent_find(spans.begin(), spans.end(), overlap) == spans.end();
}

// Cuts the list where a tensor shares memory with one before it. A tensor that is listed twice is changed twice, by
// launches that follow each other.
template <class T>
std::vector<std::vector<T>> disjoint(const std::vector<T>& items) {
  if (are_disjoint(items)) {
    return {items};
  }
  std::vector<std::vector<T>> parts(1);
  std::map<uint64_t, uint64_t> taken;  // the ends of the last part's tensors by their starts
  for (const T& item : items) {
    const auto next = taken.lower_bound(item.end());  // the first that begins behind this tensor
    if (item.size > 0 && next != taken.begin() && std::prev(next)->second > item.address) {
      parts.emplace_back();
      taken.clear();
    }
    if (item.size > 0) {
      taken.emplace(item.address, item.end());
    }
    parts.back().push_back(item);
  }
  return parts;
}

}  // namespace fastnorm::cuda
