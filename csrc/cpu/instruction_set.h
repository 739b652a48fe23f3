// All kernels of one instruction set, and their table. Each kernels_*.cpp includes this file inside its set's
// namespace; they are separate files so that they compile in parallel. The order of the headers
// matters: they build on each other.
#include "vec.h"

#include "exp.h"

#include "run_kernels.h"

#include "row_kernels.h"

#include "narrow_row_kernels.h"

#include "rotated_row_kernels.h"

#include "gated_row_kernels.h"

#include "pairs.h"

#include "channel_kernels.h"

#include "channel_reduction_kernels.h"

template <typename S>
constexpr KernelTable<S> table_of(RowKernels<S> f32, RowKernels<S> bf16, RowKernels<S> f16, RowKernels<S> f64) {
  return {{f32, bf16, f16, f64},
          {load_row<float, S>, load_row<Bf16, S>, load_row<Half, S>, load_row<double, S>},
          {store_row<float, S>, store_row<Bf16, S>, store_row<Half, S>, store_row<double, S>},
          add_to_total<S>,
          {layout_kernels_of<float, S>(), layout_kernels_of<Bf16, S>(), layout_kernels_of<Half, S>(),
           layout_kernels_of<double, S>()}};
}

extern const InstructionSet instruction_set;
const InstructionSet instruction_set = {
    INSTRUCTION_SET_NAME,
    table_of<float>(kernels_of<float>, kernels_of<Bf16>, kernels_of<Half>, {}),
    table_of<double>({}, {}, {}, kernels_of<double>),
    {run_kernels_of<float>, run_kernels_of<Bf16>, run_kernels_of<Half>, run_kernels_of<double>},
    merge_moments,
};
