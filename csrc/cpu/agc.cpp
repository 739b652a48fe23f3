// Adaptive gradient clipping on the CPU: the norm of each unit's gradient is limited to a share of its parameter's
// norm. A unit is a row of a tensor, or a whole tensor.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <utility>

#include "multi_tensor.h"
#include "tensors.h"

namespace fastnorm::cpu {
namespace {

struct Rule {
  double clip_factor, eps;
  PNorm norm;
};

// What the gradient is multiplied by: 1 where it is not clipped. The comparisons make a NaN in either norm give NaN.
double factor(const Rule& rule, double grad_norm, double param_norm) {
  const double max_norm = (param_norm < rule.eps ? rule.eps : param_norm) * rule.clip_factor;
  return grad_norm < max_norm ? 1 : max_norm / (grad_norm < 1e-6 ? 1e-6 : grad_norm);
}

void scale(const Span& run, double by) {
  if (by != 1) {
    instruction_set().runs[static_cast<int>(run.dtype)].scale(run.data, run.n, by);
  }
}

struct Units {
  std::vector<Span> grads, params;
};

// Units of at most a chunk: one thread computes the norms and scales the gradient while it is in the cache.
void clip_small(const Units& units, const Rule& rule) {
  int64_t elements = 0;
  std::vector<size_t> ends;
  for (size_t i = 0, in_task = 0; i < units.grads.size(); ++i) {
    elements += units.grads[i].n;
    in_task += units.grads[i].n;
    if (in_task >= chunk_elements / 2 || i + 1 == units.grads.size()) {
      ends.push_back(i + 1);
      in_task = 0;
    }
  }
  share_out(static_cast<int64_t>(ends.size()), elements, [&](int64_t task) {
    for (size_t i = task == 0 ? 0 : ends[task - 1]; i < ends[task]; ++i) {
      scale(units.grads[i], factor(rule, norm_of(units.grads[i], rule.norm), norm_of(units.params[i], rule.norm)));
    }
  });
}

// Longer units, which several threads share.
void clip_large(const Units& units, const Rule& rule) {
  const std::vector<double> grad_norms = norms_of(units.grads, rule.norm);
  const std::vector<double> param_norms = norms_of(units.params, rule.norm);
  const Chunks chunks(units.grads);
  chunks.each_backwards([&](int64_t i) {
    const auto& chunk = chunks[i];
    scale(chunk.run, factor(rule, grad_norms[chunk.span], param_norms[chunk.span]));
  });
}

void multi_tensor_agc_(at::TensorList grads, at::TensorList params, at::IntArrayRef units, double clip_factor,
                       double eps, double norm_type) {
  TORCH_CHECK(grads.size() == params.size() && grads.size() == units.size(),
              "fastnorm: expected as many grads as params and units");
  const std::vector<Span> grad_spans = spans_of(grads, "grads", Access::write);
  const std::vector<Span> param_spans = spans_of(params, "params", Access::read);
  const Rule rule{clip_factor, eps, PNorm(norm_type)};
  const bool one_by_one = any_overlap(grad_spans);  // gradients that share memory are clipped one after the other
  Units small, large;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Span &grad = grad_spans[i], &param = param_spans[i];
    TORCH_CHECK(grads[i].sizes() == params[i].sizes(), "fastnorm: expected grads and params of the same shapes");
    TORCH_CHECK(units[i] >= 1 && grad.n % units[i] == 0, "fastnorm: expected units of equal size, got ", units[i],
                " of ", grad.n, " elements");
    const int64_t n = grad.n / units[i];
    Units& some = n <= chunk_elements ? small : large;
    for (int64_t unit = 0; n > 0 && unit < units[i]; ++unit) {
      some.grads.push_back({grad.data + unit * n * bytes_of(grad.dtype), n, grad.dtype});
      some.params.push_back({param.data + unit * n * bytes_of(param.dtype), n, param.dtype});
    }
    if (one_by_one || i + 1 == grads.size()) {
      clip_small(std::exchange(small, {}), rule);
      clip_large(std::exchange(large, {}), rule);
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) { m.impl("multi_tensor_agc_", &multi_tensor_agc_); }

}  // namespace fastnorm::cpu
