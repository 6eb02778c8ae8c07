"""What every attack should hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_byz.attacks import Attack, DataAttack, Scene
from lightning_byz.testing.laws import Case, Law, raise_broken, random_rows, stream, verdicts


def attack_laws(
    attack: Attack, h: int = 8, b: int = 3, d: int = 13, *, symmetric: bool = True
) -> list[Law]:
    """All laws, and whether an attack on messages holds them.

    Args:
        attack: on messages; attacks on data change batches, whose form only their user knows.
        h: honest workers.
        b: Byzantine workers.
        d: length of the messages.
        symmetric: the order of the honest messages does not matter.
    """
    if isinstance(attack, DataAttack):
        raise TypeError(
            f"The laws are about attacks on messages. Found {attack!r}, an attack on data."
        )
    return verdicts(_attack_cases(attack, h, b, d, symmetric))


def check_attack(
    attack: Attack, h: int = 8, b: int = 3, d: int = 13, *, symmetric: bool = True
) -> None:
    """Raises an AssertionError that names every law that an attack breaks; the arguments are those
    of `attack_laws`.
    """
    raise_broken(attack, attack_laws(attack, h, b, d, symmetric=symmetric))


def _attack_cases(attack: Attack, h: int, b: int, d: int, symmetric: bool) -> Iterator[Case]:
    honest, own = (
        random_rows(h, d, 1, dtype=torch.float32),
        random_rows(b, d, 2, dtype=torch.float32),
    )

    def lies(honest: Tensor = honest, own: Tensor = own) -> Tensor:
        scene = Scene(
            generator=stream(7),
            aggregate=lambda candidate: torch.cat([honest, candidate.to(honest)]).median(0).values,
            x=lambda: torch.ones(honest.shape[1], dtype=honest.dtype),
            memory={},
        )
        return attack(honest, own, scene)

    def shape() -> None:
        for dtype in (torch.float32, torch.float64):
            out = lies(honest.to(dtype), own.to(dtype))
            assert out.shape == own.shape, (
                f"messages of shape {list(out.shape)} for {list(own.shape)}"
            )
            assert out.dtype == dtype, f"messages of {out.dtype} among {dtype}"

    def untouched() -> None:
        seen, theirs = honest.clone(), own.clone()
        lies(seen, theirs).fill_(7)
        assert torch.equal(seen, honest), "the honest messages were overwritten"
        assert torch.equal(theirs, own), "the Byzantine workers' own messages were overwritten"

    def nobody() -> None:
        assert lies(honest, own[:0]).shape == (0, d), "messages from nobody"

    def bits() -> None:
        assert torch.equal(lies().nan_to_num(), lies().nan_to_num()), (
            "two calls with the same stream differ"
        )

    def alone() -> None:
        assert lies(honest[:1], own[:1]).shape == (1, d), "one honest worker is not enough for it"
        if attack.alone:
            assert lies(honest[:0], own).shape == (b, d), (
                "it says that it needs no honest worker, and does"
            )

    def order() -> None:
        torch.testing.assert_close(lies(honest.flip(0)), lies(), equal_nan=True)

    yield "one message for every Byzantine worker, in their dtype", shape
    yield "what it sees is not modified", untouched
    yield "nobody sends nothing", nobody
    yield "same stream, same messages", bits
    yield "one honest and one Byzantine worker are enough", alone
    if symmetric:
        yield "the order of the honest messages does not matter", order
