// The autograd node of a whole call: torch::autograd::Function without the parts that such calls don't need.
#pragma once

#include <c10/util/ArrayRef.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <mutex>
#include <string>
#include <utility>

namespace fastnorm {

// std::shared_ptr in older torch, c10::intrusive_ptr in newer.
using NodePtr = decltype(torch::autograd::Edge::function);

// F, a torch::autograd::Function, has a name and a backward that returns a gradient for each of the node's inputs.
// Compiled autograd treats the node as the CppNode that it is derived from.
template <typename F>
struct CallNode final : torch::autograd::CppNode<F> {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    const std::lock_guard lock(this->mutex_);
    return F::backward(&this->ctx_, std::move(gradients));
  }

  std::string name() const override { return F::name; }
};

// Templates, because some versions of torch lack the functions that they call.
template <typename Pointer, typename Node>
Pointer owned(Node* node) {
  if constexpr (requires { Pointer::unsafe_steal_from_new(node); }) {
    return Pointer::unsafe_steal_from_new(node);
  } else {
    return Pointer(node, [](Node* that) { deleteNode(that); });
  }
}

template <typename Pointer>
void fire_creation_hooks(const Pointer& node) {
  if constexpr (requires { fire_node_creation_hooks(node); }) {
    fire_node_creation_hooks(node);
  }
}

// Makes the outputs results of a new node with these inputs. An input that was not given is undefined, and so is its
// gradient. save(ctx) saves what the backward needs; it is called last, when a saved output is known as an output.
template <typename F, typename Save>
void attach(const torch::autograd::variable_list& inputs, c10::ArrayRef<at::Tensor> outputs, const Save& save) {
  auto* const made = new CallNode<F>();
  const auto node = owned<NodePtr>(made);
  made->set_next_edges(torch::autograd::collect_next_edges(inputs));
  made->set_ctx_grad_fn(node);
  made->is_variable_input_.assign(inputs.size(), true);
  made->ctx_.set_materialize_grads(false);
  for (const at::Tensor& output : outputs) {
    torch::autograd::set_history(output, node);
  }
  save(made->ctx_);
  made->save_variables_to_ctx();
  fire_creation_hooks(node);
}

}  // namespace fastnorm
