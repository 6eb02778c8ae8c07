"""What the kits share: laws, what became of them, and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


class Law(NamedTuple):
    """What became of a law.

    Attributes:
        name: the law, in words.
        holds: whether it does.
        found: what was found instead; empty if it holds.
    """

    name: str
    holds: bool
    found: str = ""


Case: TypeAlias = "tuple[str, Callable[[], None]]"


def verdicts(cases: Iterator[Case]) -> list[Law]:
    """What became of each law; one that raises is broken."""
    laws = []
    for name, law in cases:
        try:
            law()
        except Exception as error:  # noqa: PERF203 - a broken law may end in anything
            laws.append(Law(name, False, f"{type(error).__name__}: {error}".strip().split("\n")[0]))
        else:
            laws.append(Law(name, True))
    return laws


def raise_broken(subject: Any, laws: Sequence[Law]) -> None:
    """Raises an AssertionError that lists the broken laws, if there are any."""
    broken = [law for law in laws if not law.holds]
    if broken:
        lines = "\n".join(f"  - {law.name}: {law.found}" for law in broken)
        raise AssertionError(f"{subject!r} breaks {len(broken)} of {len(laws)} laws:\n{lines}")


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises unless two tensors agree, relative to the larger one."""
    size = float(expected.double().abs().max())
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance * max(size, 1e-30)
    )


def random_rows(
    n: int,
    d: int,
    seed: int,
    mean: float = 1.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``[n, d]`` normal numbers, the same for the same seed."""
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mean + scale * noise).to(dtype)


def stream(seed: int = 0) -> torch.Generator:
    """A random stream of its own."""
    return torch.Generator().manual_seed(seed)
