"""Functions that stay out of compiled graphs. Imported at the first call: torch.compiler.disable loads the compiler."""

import torch

from . import sync_batch_norm as _sync_batch_norm

# It calls collectives: breaking the graph here breaks it at the same place in every process.
sync_batch_norm = torch.compiler.disable(_sync_batch_norm.sync_batch_norm)
