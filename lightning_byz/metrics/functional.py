"""How far an aggregate is from the honest mean: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_to_honest_mean(aggregate: Tensor, honest: Tensor) -> Tensor:
    """The cosine of the angle between an aggregate ``[d]`` and the mean of the honest rows ``[h, d]``; 0 if either is 0."""
    mean = honest.double().mean(0)
    norms = torch.linalg.vector_norm(aggregate.double()) * torch.linalg.vector_norm(mean)
    return torch.where(norms > 0, aggregate.double() @ mean / norms, 0.0)


def relative_error(aggregate: Tensor, honest: Tensor) -> Tensor:
    """``||aggregate - mean|| / ||mean||`` against the mean of the honest rows ``[h, d]``; inf if the mean is 0 and the aggregate is not."""
    mean = honest.double().mean(0)
    error, norm = torch.linalg.vector_norm(aggregate.double() - mean), torch.linalg.vector_norm(mean)
    return torch.where(error == 0, 0.0, error / norm)
