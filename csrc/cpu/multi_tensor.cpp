// Norms of lists of tensors, and scaling and clamping of them in place, on the CPU: one call for a whole list.
#include "multi_tensor.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <bit>
#include <numeric>
#include <tuple>
#include <utility>

#include "../policy_arguments.h"
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

// Calls kernel(run, span's index) for runs of all elements. Spans that share memory are changed one after the other, as
// by a loop in Python.
template <typename Kernel>
void change(const std::vector<Span>& spans, const Kernel& kernel) {
  const auto run = [&](const std::vector<Span>& disjoint, int64_t first) {
    const Chunks chunks(disjoint);
    chunks.each_backwards([&](int64_t i) { kernel(chunks[i].run, first + chunks[i].span); });
  };
  if (!any_overlap(spans)) {
    run(spans, 0);
    return;
  }
  for (size_t i = 0; i < spans.size(); ++i) {
    run({spans[i]}, static_cast<int64_t>(i));
  }
}

using at::Tensor;

template <typename S>
Tensor scalar(double value) {
  Tensor tensor = empty({}, scalar_type_of<S>);
  *tensor.mutable_data_ptr<S>() = static_cast<S>(value);
  return tensor;
}

template <typename S>
Tensor vector(const std::vector<double>& values) {
  Tensor tensor = empty({static_cast<int64_t>(values.size())}, scalar_type_of<S>);
  std::transform(values.begin(), values.end(), tensor.mutable_data_ptr<S>(),
                 [](double x) { return static_cast<S>(x); });
  return tensor;
}

struct Norms {
  std::vector<double> each;
  double total;
};

// Calls finish(S(), norms, p-norm): S is double if a tensor is, else float.
template <typename Finish>
auto with_norms(at::TensorList tensors, double norm_type, const Finish& finish) {
  const std::vector<Span> spans = spans_of(tensors, "tensors", Access::read);
  const PNorm norm(norm_type);
  Norms norms{norms_of(spans, norm), 0};
  norms.total = norm_of_norms(norms.each, norm);
  const bool in_double = std::any_of(spans.begin(), spans.end(), [](const Span& s) { return s.dtype == Dtype::f64; });
  return in_double ? finish(double(), norms, norm) : finish(float(), norms, norm);
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results multi_tensor_norm(at::TensorList tensors, double norm_type, double max_norm) {
  return with_norms(tensors, norm_type, [&](auto zero, const Norms& norms, const PNorm&) -> Results {
    using S = decltype(zero);
    const S rounded = static_cast<S>(norms.total);
    const S ratio = static_cast<S>(max_norm) / (rounded + static_cast<S>(1e-6));
    const float nonfinite = std::isfinite(rounded) ? 0 : 1;
    return {scalar<S>(rounded), scalar<S>(ratio > 1 ? 1 : ratio), scalar<float>(nonfinite), vector<S>(norms.each)};
  });
}

// This thread alone, as a team that decides (policy_rules.h).
template <typename S>
class Decision {
 public:
  Decision(const Norms& norms, const PNorm& norm, bool is_per_tensor)
      : total_(static_cast<S>(norms.total)),
        norm_(norm),
        each_(vector<S>(norms.each)),
        norms_(each_.const_data_ptr<S>()),
        coefficient_(is_per_tensor ? empty({tensors()}, scalar_type_of<S>) : empty({}, scalar_type_of<S>)),
        coefficients_(coefficient_.mutable_data_ptr<S>()) {}

  double total() const { return total_; }
  int64_t tensors() const { return each_.numel(); }
  double norm(int64_t i) const { return norms_[i]; }
  bool is_first() const { return true; }
  void sync() const {}
  bool any(bool flag) const { return flag; }

  template <typename Body>
  void each(int64_t count, const Body& body) const {
    for (int64_t i = 0; i < count; ++i) {
      body(i);
    }
  }

  template <typename Value>
  double norm_of(const Value& value) const {
    std::vector<double> values(tensors());
    each(tensors(), [&](int64_t i) { values[i] = value(i); });
    return norm_of_norms(values, norm_);
  }

  void neighbours(const double* values, int64_t count, int64_t rank, double& low, double& high) const {
    // the bits of values that are not negative are in the order of the values, and NaN has a place among them
    const auto is_below = [](double a, double b) { return std::bit_cast<int64_t>(a) < std::bit_cast<int64_t>(b); };
    std::vector<double> parted(values, values + count);
    const auto place = parted.begin() + rank;
    std::nth_element(parted.begin(), place, parted.end(), is_below);
    low = *place;
    high = place + 1 == parted.end() ? low : *std::min_element(place + 1, parted.end(), is_below);
  }

  bool write(int64_t i, double coefficient) {
    coefficients_[i] = static_cast<S>(coefficient);
    return coefficients_[i] < 1;
  }

  void write_skip(bool skip) { skip_ = skip; }

  Results results() const { return {scalar<S>(total_), coefficient_, scalar<float>(skip_), each_}; }

 private:
  const S total_;
  const PNorm& norm_;
  const Tensor each_;
  const S* const norms_;
  const Tensor coefficient_;
  S* const coefficients_;
  bool skip_ = false;
};

Results multi_tensor_policy(at::TensorList tensors, double norm_type, const Tensor& state, int64_t rule,
                            at::ArrayRef<double> constants) {
  TORCH_CHECK(state.device().is_cpu(), "fastnorm: expected state on the CPU");
  const policy::Policy policy = policy::policy_of(state, rule, constants, tensors.size());
  return with_norms(tensors, norm_type, [&](auto zero, const Norms& norms, const PNorm& norm) {
    Decision<decltype(zero)> decision(norms, norm, rule == policy::ADAGC);
    policy::decide(policy, decision);
    return decision.results();
  });
}

void multi_tensor_scale_(at::TensorList tensors, const Tensor& coefficient) {
  const bool is_per_tensor = coefficient.dim() == 1 && coefficient.size(0) == static_cast<int64_t>(tensors.size());
  TORCH_CHECK(coefficient.device().is_cpu() && (coefficient.dim() == 0 || is_per_tensor),
              "fastnorm: expected coefficient on the CPU, without dimensions or with one number for each tensor");
  const Dtype dtype = dtype_from(coefficient.scalar_type());
  TORCH_CHECK_TYPE(dtype == Dtype::f32 || dtype == Dtype::f64, "fastnorm: expected coefficient in float32 or float64");
  const Tensor values = coefficient.contiguous();
  const double* const wide = dtype == Dtype::f64 ? values.const_data_ptr<double>() : nullptr;
  const float* const narrow = wide == nullptr ? values.const_data_ptr<float>() : nullptr;
  std::vector<Span> spans;
  std::vector<double> factors;
  spans.reserve(tensors.size());
  factors.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const size_t place = is_per_tensor ? i : 0;
    const double factor = wide != nullptr ? wide[place] : narrow[place];
    if (!(factor >= 1)) {
      spans.push_back(span_of(tensors[i], "tensors", Access::write));
      factors.push_back(factor);
    }
  }
  change(spans, [&](const Span& run, int64_t span) { kernels(run.dtype).scale(run.data, run.n, factors[span]); });
}

void multi_tensor_clamp_(at::TensorList tensors, double bound) {
  change(spans_of(tensors, "tensors", Access::write),
         [&](const Span& run, int64_t) { kernels(run.dtype).clamp(run.data, run.n, bound); });
}

}  // namespace

Span span_of(const Tensor& tensor, const char* name, Access access) {
  TORCH_CHECK(tensor.device().is_cpu(), "fastnorm: expected ", name, " on the CPU, got ", tensor.device());
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "fastnorm: expected ", name,
              " without gaps and overlaps, got strides ", tensor.strides(), " for the shape ", tensor.sizes());
  const Dtype dtype = dtype_from(tensor.scalar_type());
  // mutable_data_ptr also makes the copy that a lazily cloned (copy-on-write) tensor needs before a write
  void* data = access == Access::write ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  return {static_cast<char*>(data), tensor.numel(), dtype};
}

std::vector<Span> spans_of(at::TensorList tensors, const char* name, Access access) {
  std::vector<Span> spans;
  spans.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    spans.push_back(span_of(tensor, name, access));
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
  const auto* const data = reinterpret_cast<const char*>(norms.data());
  return norm_of({const_cast<char*>(data), static_cast<int64_t>(norms.size()), Dtype::f64}, norm);
}

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("multi_tensor_norm", &multi_tensor_norm);
  m.impl("multi_tensor_policy", &multi_tensor_policy);
  m.impl("multi_tensor_scale_", &multi_tensor_scale_);
  m.impl("multi_tensor_clamp_", &multi_tensor_clamp_);
}

}  // namespace fastnorm::cpu
