// The pages of new memory. Most of the time that a large new output takes goes into making them.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastnorm::cpu {

// Whether a new tensor's memory is large and came from the system just now, so that its pages are still to be made.
// They will then be huge ones, where this machine makes those faster.
bool is_fresh(const at::Tensor& tensor);

// Makes the pages of fresh memory that will be written to, a MiB or so at a time. One fault a page takes 1.6 times as
// long.
void fault_in(void* data, size_t bytes);

// In words, how this machine's pages are made.
const char* how_pages_are_made();

}  // namespace fastnorm::cpu
