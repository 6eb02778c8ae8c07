"""Which processes of torch.distributed a transport connects, and which hold other parts of the
same workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Where a transport's ranks are among the processes of torch.distributed.

    A worker may be a group of processes that hold one model together, each a part of every vector.
    Then a transport connects the processes that hold the same part, one of each worker, and there
    are as many transports as parts.

    Args:
        members: by rank of the transport, its rank in torch.distributed's default group.
        group: their process group; None: the default one.
        parts: the process group of those that hold the other parts of this rank's workers, this
            one included; None: every rank has whole vectors.
    """

    members: Sequence[int]
    group: dist.ProcessGroup | None = None
    parts: dist.ProcessGroup | None = None


def all_ranks() -> Ranks:
    """Everybody in torch.distributed's default group, with whole vectors."""
    return Ranks(range(dist.get_world_size()))
