"""What makes thousands of small exports affordable."""

from __future__ import annotations

import functools
import gc
import os

import torch._export.utils

# Test processes share the cores already: threads of several that wait for one another spin, and take the time of those
# that compute. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# 7 % of the time went into looking for cycles among all that torch holds, every 700 allocations.
gc.set_threshold(200_000, 20, 100)

# Every lowering asks every operator of every namespace the same question, which takes a fifth of a small model's time.
# No test registers a composite operator.
torch._export.utils._collect_all_valid_cia_ops_for_namespace = functools.cache(
    torch._export.utils._collect_all_valid_cia_ops_for_namespace
)
