"""What stays out of compiled graphs. Imported at its first call, because torch.compiler.disable loads the compiler."""

import torch

from .sync_batch_norm import sync_batch_norm

# collectives: a graph that is broken here is cut at the same place in every process
sync_batch_norm = torch.compiler.disable(sync_batch_norm)
