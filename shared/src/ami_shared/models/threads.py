"""The threads of torch's pool, on which it computes a large operation in parallel."""

from __future__ import annotations

import torch

from ami_shared.priority import thread_ids


def start_torch_threads(threads: int) -> frozenset[int]:
    """Set on how many threads torch computes what this thread asks for, and start them; return the ids of those begun.

    torch would start them at its first large operation: too late for whoever sets the priority of each.
    """
    before = thread_ids()
    torch.set_num_threads(threads)
    torch.zeros(threads << 16).exp_()
    return thread_ids() - before
