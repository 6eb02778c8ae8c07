"""Where a worker runs: its rank, host and device, as every rank learns them of every other."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_byz.transports.parsing import text

_LENGTH = 256
"""Bytes that a rank says about itself."""


class Whereabouts(NamedTuple):
    """Where a worker runs.

    Attributes:
        worker: its index.
        rank: of its process.
        host: name of its machine.
        device: such as "cuda:2 NVIDIA H200 GPU-1b4e28ba-...", or "cpu".
        alone: it is the only worker of its process, which is named by its rank.
    """

    worker: int
    rank: int
    host: str
    device: str
    alone: bool = True

    def __str__(self) -> str:
        worker = "" if self.alone else f"worker {self.worker}, "
        return f"{worker}rank {self.rank} on host {self.host}, device {self.device}"


def describe(device: torch.device) -> str:
    """A device's name for people: index, model and serial number where there are any."""
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    serial = getattr(properties, "uuid", None)  # since torch 2.5
    return f"{device} {properties.name}" + ("" if serial is None else f" GPU-{serial}")


def whereabouts(
    device: torch.device,
    gather: Callable[[Tensor], Sequence[Tensor | None]],
    workers_per_process: int = 1,
) -> list[Whereabouts]:
    """Where all workers run; a collective.

    Args:
        device: of this process.
        gather: from this process's tensor, uint8 on the CPU, to those of all processes, in the
            order of ranks; None for one not heard.
        workers_per_process: workers in one process.
    """
    own = f"{platform.node()}\n{describe(device)}".encode()[:_LENGTH]
    padded = torch.zeros(_LENGTH, dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    places = []
    for rank, data in enumerate(gather(padded)):
        said = "?\n?" if data is None else text(bytes(data.tolist()), _LENGTH)  # it goes into logs
        host, name = (line.replace("\n", "?") for line in said.partition("\n")[::2])
        places += [
            Whereabouts(rank * workers_per_process + i, rank, host, name, workers_per_process == 1)
            for i in range(workers_per_process)
        ]
    return places
