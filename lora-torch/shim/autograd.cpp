// A node of autograd's graph whose backward pass is a function of the Rust side: libtorch offers this to C++ alone.
//
// Linked into lora-torch; the Rust side is src/backward.rs and nothing else includes this. Tensors cross as owned
// `at::Tensor*`, as in tch.

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <string>

namespace {

// The gradient of the input for that of the output, or null with a reason in the buffer; takes the gradient over.
using Slope = at::Tensor* (*)(void* state, at::Tensor* gradient, char* reason, size_t capacity);
using Free = void (*)(void* state);

struct Backward : torch::autograd::Node {
  Backward(Slope slope, std::unique_ptr<void, Free> state) : slope(slope), state(std::move(state)) {}

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    if (!gradients[0].defined() || !task_should_compute_output(0)) {
      return {at::Tensor()};
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    char reason[512] = {0};
    const std::unique_ptr<at::Tensor> result(
        slope(state.get(), new at::Tensor(std::move(gradients[0])), reason, sizeof(reason)));
    TORCH_CHECK(result, reason);
    return {*result};
  }

  Slope slope;
  std::unique_ptr<void, Free> state;
};

}  // namespace

extern "C" {

// Gives `value`, which has no history, one: its gradient goes on to `input` by way of `slope`. Does nothing where no
// gradient is asked for. Takes `state` over in every case. Returns 0, or 1 with a reason in the buffer.
int lora_autograd_attach(const at::Tensor* value, const at::Tensor* input, Slope slope, void* state, Free free_state,
                         char* reason, size_t capacity) {
  std::unique_ptr<void, Free> owned(state, free_state);
  try {
    if (torch::autograd::compute_requires_grad(*input)) {
      const std::shared_ptr<torch::autograd::Node> node(new Backward(slope, std::move(owned)),
                                                        torch::autograd::deleteNode);
      node->set_next_edges(torch::autograd::collect_next_edges(*input));
      torch::autograd::set_history(*value, node);
    }
    return 0;
  } catch (const std::exception& error) {
    const size_t length = std::min(std::strlen(error.what()), capacity - 1);
    std::memcpy(reason, error.what(), length);
    reason[length] = 0;
    return 1;
  }
}

}  // extern "C"
