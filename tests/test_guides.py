"""The guides to parts of one's own: what they write from nothing is short, and passes its kit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from zoo import ALGORITHMS, AlgorithmCase

from lightning_byz.testing import algorithm_laws, check_algorithm, check_transport
from lightning_byz.transports import AllGather, Sharded

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
processes = pytest.mark.processes
ROBUST = [case for case in ALGORITHMS if case.algorithm.most_f(9) >= 2]


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (GUIDES / f"{name}.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "name",
    ["own-algorithm", "own-compressor", pytest.param("own-transport", marks=processes)],
)
def test_a_part_from_nothing_is_short_and_passes_its_kit(name: str) -> None:
    part, check = blocks(name)
    assert len([line for line in part.splitlines() if line.strip()]) < 60
    scope: dict[str, object] = {}
    exec(part, scope)
    exec(check, scope)


def test_the_kit_for_algorithms_tells_broken_ones() -> None:
    part, _ = blocks("own-algorithm")
    for old, new, law in (
        ("known = state.known | present", "known = state.known", "the estimate is a vector"),
        ("WorkerState(last)", "WorkerState(last[:1])", "states are NamedTuples"),
        ("grads.current])", "grads.current.neg_()])", "gradients are not modified"),
        ("encode(last.mean(0))", "encode(last.mean(0) + torch.rand(1))", "both halves are pure"),
        ("known.cpu())", "known.cpu()) + 1e20 * heard.abs().max()", "f liars that send junk"),
        (
            "ServerState(heard, known)\n",
            "ServerState(heard[:, :1], known)\n",
            "states are NamedTuples",
        ),
    ):
        assert old in part
        scope: dict[str, object] = {}
        exec(part.replace(old, new), scope)
        broken = [law.name for law in algorithm_laws(scope["LastHeard"]()) if not law.holds]
        assert any(name.startswith(law) for name in broken), (new, broken)


@pytest.mark.thorough(keep=5)
@pytest.mark.parametrize("case", ROBUST, ids=lambda case: case.name)
def test_algorithms_hold_their_laws(case: AlgorithmCase) -> None:
    check_algorithm(case.algorithm)


class Upset(AllGather):
    """Gives the workers' messages in another order."""

    def gather(self, messages, layout):
        return super().gather(messages, layout)[::-1]


class OwnMind(Sharded):
    """Does not agree with rank 0."""

    def agree(self, tensor):
        return tensor


@processes
@pytest.mark.parametrize("make", [AllGather, Sharded, lambda: Sharded(bucket_size=256)])
def test_transports_hold_their_laws(make) -> None:
    check_transport(make)


@processes
@pytest.mark.parametrize(("make", "law"), [(Upset, "a mean"), (OwnMind, "`agree` gives")])
def test_the_kit_for_transports_tells_broken_ones(make, law) -> None:
    with pytest.raises(AssertionError, match=law):
        check_transport(make)
