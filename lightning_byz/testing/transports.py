"""What every transport should hold."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes  # type: ignore[attr-defined]

from lightning_byz.aggregators import (
    NNM,
    ByHeterogeneity,
    Chain,
    CoordinateMedian,
    Mean,
    TrimmedMean,
)
from lightning_byz.algorithms import Algorithm, ByzEF21SGDM, RobustSGD, SignSGDMajorityVote
from lightning_byz.compressors import Field, TopK
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution
from lightning_byz.testing.laws import Case, Law, raise_broken, random_rows, verdicts
from lightning_byz.transports import InProcess, Transport
from lightning_byz.types import Gradients

_ROUNDS, _DIM = 4, 300
_POSTED = (3, 2, 5_000)
"""Numbers of messages that are posted."""

_ALGORITHMS: dict[str, Algorithm] = {
    "a mean": RobustSGD(aggregator=Mean()),
    "a median with momenta": RobustSGD(
        aggregator=CoordinateMedian(f=1), worker_momentum=0.9, server_momentum=0.5
    ),
    "a rule of distances": RobustSGD(aggregator=Chain(pre=(NNM(),), rule=TrimmedMean(f=1))),
    "sparse messages": ByzEF21SGDM(aggregator=CoordinateMedian(f=1), compressor=TopK(ratio=0.1)),
    "votes": SignSGDMajorityVote().with_f(1),
}


_LEARNS = RobustSGD(aggregator=ByHeterogeneity(f=1))
"""A rule that follows what rounds have shown of the workers' data."""
_SAVED, _LAST = 11, 13
"""Rounds of a run that is saved, between two rounds that are looked at together; and of all."""


def transport_laws(
    make: Callable[[], Transport], processes: int = 3, start_method: str = "fork"
) -> list[Law]:
    """All laws, and whether a transport holds them, in processes that are started for it.

    They have a process group of torch.distributed (gloo), which the transport need not use.

    Args:
        make: makes the transport, in every process; the same on all.
        processes: how many.
        start_method: how they start; with "spawn", ``make`` has to be a function of a module.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start_processes(  # type: ignore[no-untyped-call]
            _run, (processes, folder, make), processes, start_method=start_method
        )
        found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    return verdicts(_cases(found, processes))


def check_transport(
    make: Callable[[], Transport], processes: int = 3, start_method: str = "fork"
) -> None:
    """Raises an AssertionError that names every law that a transport breaks.

    The arguments are those of `transport_laws`.
    """
    raise_broken(make, transport_laws(make, processes, start_method))


def _contribution(worker: int, k: int, nan: bool) -> Contribution:
    (g,) = random_rows(1, _DIM, 100 * worker + k, dtype=torch.float32)
    if nan and worker == 1 and k == 1:
        g = g * torch.nan
    return Contribution(Gradients(g), torch.tensor([worker > 0, True]))


def _trained(algorithm: Algorithm, transport: Transport, nan: bool = False) -> dict[str, Any]:
    """The estimates of some rounds, who was present, which parameters were used, and the states."""
    exchange = Exchange(algorithm, transport, seed=5)
    x, estimates, present, used = torch.zeros(_DIM), [], [], []
    for k in range(_ROUNDS):
        said = [_contribution(w, k, nan) for w in transport.workers]
        outcome = exchange.run(said, x, spend=transport.in_shards)
        assert outcome.estimate is not None and outcome.round.present is not None
        estimates.append(outcome.estimate.clone())
        present.append(outcome.round.present.clone())
        used.append(outcome.used.clone().cpu())
    server = exchange.server_state()["server"]
    return {
        "estimates": torch.stack(estimates),
        "present": torch.stack(present),
        "used": torch.stack(used),
        "workers": exchange.worker_states(),
        "server": server if transport.rank == 0 else None,
    }


def _resumed(
    make: Callable[[], Transport], rank: int, processes: int, file: Path
) -> list[dict[str, Any]]:
    """What ends a run that is not interrupted, and one that goes on from what it saved."""
    ends, own = [], dict[int, dict[str, Tensor]]()
    for interrupted in (False, True):
        transport = make()
        transport.connect(rank, processes, 1, torch.device("cpu"))
        exchange, x = Exchange(_LEARNS, transport, seed=5), torch.zeros(_DIM)
        if interrupted:
            saved, everybody = torch.load(file, weights_only=True), range(transport.n)
            for again in (saved, None):  # what was loaded is saved as it was
                state = again or exchange.server_state()
                exchange.load(state, {w: own.get(w, {}) for w in everybody}, x)
        estimates = []
        while exchange.step < _LAST:
            said = []
            for w in transport.workers:
                (shift,) = random_rows(1, _DIM, w, dtype=torch.float32)
                grads, used = _contribution(w, exchange.step, False)
                assert grads is not None
                said.append(Contribution(Gradients(grads.current + shift), used))
            estimate = exchange.run(said, x).estimate
            assert estimate is not None
            estimates.append(estimate.clone())
            if exchange.step == _SAVED and not interrupted:
                state, own = exchange.server_state(), exchange.worker_states()
                if rank == 0:
                    torch.save(state, file)
                dist.barrier()
        found = exchange.heterogeneity
        assert found is not None
        ends.append({"estimate": estimates[-1], "unlike": torch.tensor(found.value)})
    return ends


def _run(rank: int, processes: int, folder: Path, make: Callable[[], Transport]) -> None:
    """One process: everything that is looked at, into a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(  # type: ignore[attr-defined]
        str(folder / "store"), processes
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    transport = make()
    transport.connect(rank, processes, 1, torch.device("cpu"))
    found: dict[str, Any] = {"n": transport.n, "workers": list(transport.workers)}
    found["agreed"] = transport.agree(torch.tensor([10.0 + rank, rank]))
    for size in _POSTED:
        transport.meet(f"a message of {size}")
        transport.post([[torch.full((size,), 10.0 + rank)]], [Field((size,), torch.float32)])
        if size == _POSTED[0]:  # it may travel with what follows, or with nothing
            mine = [[torch.tensor([20.0 + rank])]]
            found["beside"] = [
                None if part is None else float(part[0])
                for part in transport.gather(mine, [Field((1,), torch.float32)])
            ]
        if size == _POSTED[-1]:
            transport.gather([[torch.zeros(size)]], [Field((size,), torch.float32)])
        heard = transport.delivered()
        found[f"posted {size}"] = torch.stack([part[0] for part in heard if part is not None])
    spans = transport.spans(_DIM)
    found["spans"] = [list(span) for span in spans]
    for name, algorithm in _ALGORITHMS.items():
        for nan in (False, True):
            again = make()  # every run has its own
            again.connect(rank, processes, 1, torch.device("cpu"))
            found[f"{name}, nan {nan}"] = _trained(algorithm, again, nan)
    found["resumed"] = _resumed(make, rank, processes, folder / "state.pt")
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _expected(algorithm: Algorithm, processes: int, nan: bool) -> dict[str, Any]:
    transport = InProcess()
    transport.connect(0, 1, processes, torch.device("cpu"))
    return _trained(algorithm, transport, nan)


def _cases(found: list[dict[str, Any]], processes: int) -> Iterator[Case]:
    yield "every process has the worker of its rank", partial(_numbers_workers, found, processes)
    yield "`agree` gives rank 0's tensor everywhere", partial(_agrees, found)
    yield "what a worker posts is delivered to all", partial(_delivers, found, processes)
    yield "the ranks' columns make up the vector, or are all of it", partial(_covers, found)
    for name, algorithm in _ALGORITHMS.items():
        for nan in (False, True):
            key, with_nan = f"{name}, nan {nan}", ", one worker has a nan" if nan else ""
            expected = _expected(algorithm, processes, nan)
            yield f"{name}: the bits of one process{with_nan}", partial(_same, found, key, expected)

    yield "a run that is resumed ends as one that is not interrupted", partial(_resumes, found)


def _numbers_workers(found: list[dict[str, Any]], processes: int) -> None:
    assert [result["n"] for result in found] == [processes] * processes
    assert [result["workers"] for result in found] == [[rank] for rank in range(processes)]


def _agrees(found: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(found):
        assert torch.equal(result["agreed"], torch.tensor([10.0, 0.0])), f"rank {rank} has another"


def _delivers(found: list[dict[str, Any]], processes: int) -> None:
    for rank, result in enumerate(found):
        assert result["beside"] == [20.0 + r for r in range(processes)], f"rank {rank}, gathering"
        for size in _POSTED:
            expected = 10.0 + torch.arange(processes)[:, None].expand(-1, size)
            assert torch.equal(result[f"posted {size}"], expected), f"rank {rank} heard another"


def _covers(found: list[dict[str, Any]]) -> None:
    whole = [[0, _DIM]]
    if all(result["spans"] == whole for result in found):
        return
    columns = sorted(c for result in found for a, z in result["spans"] for c in range(a, z))
    assert columns == list(range(_DIM)), "some columns belong to nobody, or to several ranks"


def _resumes(found: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(found):
        whole, resumed = result["resumed"]
        assert _equal(whole["unlike"], found[0]["resumed"][0]["unlike"]), f"rank {rank} knows other"
        assert _equal(whole, resumed), f"rank {rank} ends elsewhere: {resumed} instead of {whole}"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)


def _same(found: list[dict[str, Any]], key: str, expected: dict[str, Any]) -> None:
    for rank, result in enumerate(found):
        for name in ("estimates", "present", "used"):
            assert _equal(result[key][name], expected[name]), f"{name} of rank {rank} differ"
        mine = {rank: expected["workers"][rank]}
        assert _equal(result[key]["workers"], mine), f"the state of worker {rank} differs"
    assert _equal(found[0][key]["server"], expected["server"]), "the server's state differs"
