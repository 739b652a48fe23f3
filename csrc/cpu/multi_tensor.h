// Lists of tensors, for norms and clipping on the CPU: their spans of memory, the split of these into chunks and tasks
// for threads, and p-norms.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "rows.h"

namespace fastnorm::cpu {

// The elements of a tensor, or some of them, that lie one after the other in memory.
struct Span {
  char* data;
  int64_t n;
  Dtype dtype;
};

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

enum class Access { read, write };

// A tensor's span, in storage order. Raises unless it is on the CPU, dense, and of one of the four dtypes.
Span span_of(const at::Tensor& tensor, const char* name, Access access);

// Each tensor's span.
std::vector<Span> spans_of(at::TensorList tensors, const char* name, Access access);

// Whether two spans share memory, as those of a tensor that is listed twice.
bool any_overlap(const std::vector<Span>& spans);

// Runs body(i) for every i of [0, count) on all threads, each of which takes the next i when it is free.
template <typename Body>
void share_out(int64_t count, int64_t elements, const Body& body) {
  constexpr int64_t worthwhile = 32768;  // one thread finishes fewer elements before another has woken up
  const int64_t threads = std::min<int64_t>({at::get_num_threads(), count, 1 + elements / worthwhile});
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) {
      body(i);
    }
  });
}

// Spans cut into chunks, and chunks gathered into tasks. How follows from the spans' sizes alone, not from the number
// of threads.
class Chunks {
 public:
  explicit Chunks(const std::vector<Span>& spans);

  struct Chunk {
    Span run;
    int64_t span;
  };

  int64_t size() const { return static_cast<int64_t>(chunks_.size()); }
  const Chunk& operator[](int64_t i) const { return chunks_[i]; }

  template <typename Body>
  void each(const Body& body) const {
    const int64_t tasks = static_cast<int64_t>(task_ends_.size());
    share_out(tasks, elements_, [&](int64_t task) {
      for (int64_t i = task == 0 ? 0 : task_ends_[task - 1]; i < task_ends_[task]; ++i) {
        body(i);
      }
    });
  }

  // As `each`, but from the last task to the first: what a pass before read last may still be in the cache.
  template <typename Body>
  void each_backwards(const Body& body) const {
    const int64_t tasks = static_cast<int64_t>(task_ends_.size());
    share_out(tasks, elements_, [&](int64_t task) {
      const int64_t reversed = tasks - 1 - task;
      for (int64_t i = reversed == 0 ? 0 : task_ends_[reversed - 1]; i < task_ends_[reversed]; ++i) {
        body(i);
      }
    });
  }

 private:
  std::vector<Chunk> chunks_;
  std::vector<int64_t> task_ends_;
  int64_t elements_ = 0;
};

// Every span's norm, in double, bitwise the same for any number of threads.
std::vector<double> norms_of(const std::vector<Span>& spans, const PNorm& norm);

constexpr int64_t chunk_elements = 65536;

// The norm of a span of at most chunk_elements, on this thread alone; bitwise as norms_of has it.
double norm_of(const Span& span, const PNorm& norm);

// The norm of norms, on this thread alone; for p = 0, as in torch, the number of norms that are not zero.
double norm_of_norms(const std::vector<double>& norms, const PNorm& norm);

}  // namespace fastnorm::cpu
