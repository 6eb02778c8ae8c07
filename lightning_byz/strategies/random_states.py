"""The random states of a process: keyed streams for workers, and snapshots for checkpoints."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lightning_byz.types import keyed_seed


@contextmanager
def worker_rng(device: torch.device, *key: int) -> Iterator[None]:
    """Torch's global RNG (CPU and ``device``) runs on a stream of its own inside, and goes on as if
    nothing was outside.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        seed = keyed_seed("forward", *key)
        # torch.manual_seed would note it for every accelerator that has not started, which takes
        # longer
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        yield


def reset() -> None:
    """All global random states (torch, numpy, Python) as Lightning's seed_everything left them;
    nothing, where it was not called.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is not None:
        random.seed(int(seed))
        np.random.seed(int(seed))
        torch.manual_seed(int(seed))


def snapshot(device: torch.device) -> tuple[Tensor, ...]:
    """The states of torch's, CUDA's, numpy's and Python's global RNG, as tensors of fixed shape and
    dtype.
    """
    version, ints, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = (
        torch.cuda.get_rng_state(device)
        if device.type == "cuda"
        else torch.empty(0, dtype=torch.uint8)
    )
    return (
        torch.get_rng_state(),
        cuda,
        torch.tensor([version, *ints], dtype=torch.int64),
        torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        torch.from_numpy(np.asarray(keys).astype(np.int64)),
        torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    )


def restore(device: torch.device, states: tuple[Tensor, ...]) -> None:
    """Sets what `snapshot` gave."""
    cpu, cuda, ints, gauss, keys, rest = (state.cpu() for state in states)
    torch.set_rng_state(cpu)
    if device.type == "cuda" and len(cuda):
        torch.cuda.set_rng_state(cuda, device)
    version, *values = ints.tolist()
    random.setstate((version, tuple(values), gauss[1].item() if gauss[0] else None))
    position, has_gauss, cached = rest.tolist()
    np.random.set_state(
        ("MT19937", keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached)
    )
