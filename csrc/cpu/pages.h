// Page faults of large new outputs: making the pages takes most of the time of writing such an output for the first
// time, so they are made ahead of the kernel, in larger steps, and as huge pages where this machine makes those faster.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastnorm::cpu {

// Whether a new tensor is large and its memory comes fresh from the system, so that its pages don't exist yet. If so,
// asks for huge pages where this machine makes those faster.
bool is_fresh(const at::Tensor& tensor);

// Makes the pages of fresh memory that is about to be written. To be called for about a MiB at a time: one page fault
// for each page takes 1.6 times as long.
void fault_in(void* data, size_t bytes);

// Says which pages this machine uses, for `python -m fastnorm`.
const char* how_pages_are_made();

}  // namespace fastnorm::cpu
