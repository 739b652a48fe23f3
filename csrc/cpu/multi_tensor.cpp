// Norms of lists of tensors, and scaling and clamping of them in place, on the CPU: one call for a whole list.
#include "multi_tensor.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>
#include <utility>

#include "tensors.h"

namespace fastnorm::cpu {
namespace {

const RunKernels& kernels(Dtype dtype) { return instruction_set().runs[static_cast<int>(dtype)]; }

double reduce(const Span& run, Reduction reduction, double p = 0, double divisor = 1) {
  return kernels(run.dtype).reduce[static_cast<int>(reduction)](run.data, run.n, p, divisor);
}

// The norm of a span whose powers overflow or underflow in double: divides each |x| by that with the largest power.
double scaled_norm(const Span& span, const PNorm& norm) {
  const Chunks chunks({span});
  std::vector<double> partial(chunks.size());
  const auto folded = [&](const PNorm& fold, Reduction reduction, double unit) {
    chunks.each([&](int64_t i) { partial[i] = reduce(chunks[i].run, reduction, norm.p, unit); });
    return std::accumulate(partial.begin(), partial.end(), fold.start(),
                           [&](double a, double b) { return fold.fold(a, b); });
  };
  const PNorm extreme = norm.extreme();
  const double unit = folded(extreme, extreme.reduction, 1);
  if (!(unit > 0) || std::isinf(unit)) {
    return unit;  // zero, infinite or NaN: so is the norm
  }
  return unit * std::pow(folded(norm, Reduction::powers, unit), 1 / norm.p);
}

double finish(const Span& span, const PNorm& norm, double folded) {
  // no number of squares of floats leaves the range of double
  const bool is_in_range = norm.reduction == Reduction::squares && span.dtype != Dtype::f64;
  const bool needs_scaling = !is_in_range && span.n > 0 && norm.is_doubtful(folded);
  return needs_scaling ? scaled_norm(span, norm) : norm.root(folded);
}

// Applies a kernel to all elements. Spans that share memory are changed one after the other, as by a loop in Python.
template <typename Kernel>
void change(const std::vector<Span>& spans, const Kernel& kernel) {
  const auto run = [&](const std::vector<Span>& disjoint) {
    const Chunks chunks(disjoint);
    chunks.each_backwards([&](int64_t i) { kernel(chunks[i].run); });
  };
  if (!any_overlap(spans)) {
    run(spans);
    return;
  }
  for (const Span& span : spans) {
    run({span});
  }
}

using at::Tensor;

template <typename S>
Tensor scalar(double value) {
  Tensor tensor = empty({}, sizeof(S) == 8 ? at::kDouble : at::kFloat);
  *tensor.mutable_data_ptr<S>() = static_cast<S>(value);
  return tensor;
}

template <typename S>
std::tuple<Tensor, Tensor, Tensor, Tensor> results(const std::vector<double>& norms, double total, double max_norm) {
  Tensor all = empty({static_cast<int64_t>(norms.size())}, sizeof(S) == 8 ? at::kDouble : at::kFloat);
  std::transform(norms.begin(), norms.end(), all.mutable_data_ptr<S>(), [](double n) { return static_cast<S>(n); });
  const S rounded = static_cast<S>(total);
  const S ratio = static_cast<S>(max_norm) / (rounded + static_cast<S>(1e-6));
  return {scalar<S>(rounded), scalar<S>(ratio > 1 ? 1 : ratio), scalar<float>(std::isfinite(rounded) ? 0 : 1), all};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> multi_tensor_norm(at::TensorList tensors, double norm_type,
                                                             double max_norm) {
  const std::vector<Span> spans = spans_of(tensors, "tensors", Access::read);
  const PNorm norm(norm_type);
  const std::vector<double> norms = norms_of(spans, norm);
  const double total = norm_of_norms(norms, norm);
  const bool in_double = std::any_of(spans.begin(), spans.end(), [](const Span& s) { return s.dtype == Dtype::f64; });
  return in_double ? results<double>(norms, total, max_norm) : results<float>(norms, total, max_norm);
}

void multi_tensor_scale_(at::TensorList tensors, const Tensor& coefficient) {
  TORCH_CHECK(coefficient.device().is_cpu() && coefficient.dim() == 0,
              "fastnorm: expected coefficient without dimensions on the CPU");
  const Dtype dtype = dtype_from(coefficient.scalar_type());
  TORCH_CHECK_TYPE(dtype == Dtype::f32 || dtype == Dtype::f64, "fastnorm: expected coefficient in float32 or float64");
  const double factor =
      dtype == Dtype::f64 ? *coefficient.const_data_ptr<double>() : *coefficient.const_data_ptr<float>();
  if (!(factor >= 1)) {
    change(spans_of(tensors, "tensors", Access::write),
           [&](const Span& run) { kernels(run.dtype).scale(run.data, run.n, factor); });
  }
}

void multi_tensor_clamp_(at::TensorList tensors, double bound) {
  change(spans_of(tensors, "tensors", Access::write),
         [&](const Span& run) { kernels(run.dtype).clamp(run.data, run.n, bound); });
}

}  // namespace

std::vector<Span> spans_of(at::TensorList tensors, const char* name, Access access) {
  std::vector<Span> spans;
  spans.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device().is_cpu(), "fastnorm: expected ", name, " on the CPU, got ", tensor.device());
    TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "fastnorm: expected ", name,
                " without gaps and overlaps, got strides ", tensor.strides(), " for the shape ", tensor.sizes());
    const Dtype dtype = dtype_from(tensor.scalar_type());
    // mutable_data_ptr also makes the copy that a lazily cloned (copy-on-write) tensor needs before a write
    void* data = access == Access::write ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
    spans.push_back({static_cast<char*>(data), tensor.numel(), dtype});
  }
  return spans;
}

bool any_overlap(const std::vector<Span>& spans) {
  std::vector<std::pair<const char*, const char*>> ranges;
  ranges.reserve(spans.size());
  for (const Span& span : spans) {
    if (span.n > 0) {
      ranges.emplace_back(span.data, span.data + span.n * bytes_of(span.dtype));
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) {
      return true;
    }
  }
  return false;
}

Chunks::Chunks(const std::vector<Span>& spans) {
  chunks_.reserve(spans.size());
  int64_t in_task = 0;
  for (size_t s = 0; s < spans.size(); ++s) {
    const Span& span = spans[s];
    for (int64_t first = 0; first < span.n; first += chunk_elements) {
      const int64_t n = std::min(chunk_elements, span.n - first);
      chunks_.push_back({{span.data + first * bytes_of(span.dtype), n, span.dtype}, static_cast<int64_t>(s)});
      in_task += n;
      if (in_task >= chunk_elements / 2) {
        task_ends_.push_back(size());
        in_task = 0;
      }
    }
    elements_ += span.n;
  }
  if (in_task > 0) {
    task_ends_.push_back(size());
  }
}

std::vector<double> norms_of(const std::vector<Span>& spans, const PNorm& norm) {
  const Chunks chunks(spans);
  std::vector<double> partial(chunks.size());
  chunks.each([&](int64_t i) { partial[i] = reduce(chunks[i].run, norm.reduction, norm.p); });
  std::vector<double> norms(spans.size(), norm.start());
  for (int64_t i = 0; i < chunks.size(); ++i) {
    norms[chunks[i].span] = norm.fold(norms[chunks[i].span], partial[i]);
  }
  for (size_t s = 0; s < spans.size(); ++s) {
    norms[s] = finish(spans[s], norm, norms[s]);
  }
  return norms;
}

double norm_of(const Span& span, const PNorm& norm) { return finish(span, norm, reduce(span, norm.reduction, norm.p)); }

double norm_of_norms(const std::vector<double>& norms, const PNorm& norm) {
  double unit = 1;
  if (norm.reduction == Reduction::squares || norm.reduction == Reduction::powers) {
    const PNorm extreme = norm.extreme();
    unit = std::accumulate(norms.begin(), norms.end(), extreme.start(),
                           [&](double a, double b) { return extreme.fold(a, b); });
    if (!(unit > 0) || std::isinf(unit)) {
      return unit;
    }
  }
  double folded = norm.start();
  for (const double each : norms) {
    switch (norm.reduction) {
      case Reduction::squares:
        folded += (each / unit) * (each / unit);
        break;
      case Reduction::powers:
        folded += std::pow(each / unit, norm.p);
        break;
      case Reduction::nonzeros:
        folded += each != 0;
        break;
      default:
        folded = norm.fold(folded, each);
    }
  }
  return unit * norm.root(folded);
}

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("multi_tensor_norm", &multi_tensor_norm);
  m.impl("multi_tensor_scale_", &multi_tensor_scale_);
  m.impl("multi_tensor_clamp_", &multi_tensor_clamp_);
}

}  // namespace fastnorm::cpu
