"""How long every rule takes and how much memory it needs, beside the plain mean and the peers that
are installed.

    python benchmarks/aggregators.py [--n 10 20 50] [--d 100000 11173962] [--rules median krum]
        [--no-peers] [--device cuda] [--output docs/performance/rules.csv]

Times are the best of a few runs, interleaved: every round runs the mean, then the rule, then the
peer's rule, on the same float32 rows, so that a busy machine slows all of them down alike. Extra
memory is the peak of the process's resident memory above what it was, over the size of the rows. On
a GPU, times are over the floor: reading the rows and writing the result at the speed at which the
rows are copied. Peers: ByzFL and ByzPy (``pip install byzfl``,
``pip install --no-deps byzpy cloudpickle``).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _runs import machine, markdown, write_csv

import lightning_byz as byz
from lightning_byz.numerics.rows import Rows

Timed = Callable[[torch.Tensor], Any]
PEERS = ("ByzFL", "ByzPy")
COLUMNS = {
    "cpu": ["n", "f", "d", "rule", "ms", "over_mean", "extra_memory_over_rows"]
    + [f"{peer.lower()}_over_ours" for peer in PEERS],
    "cuda": ["n", "f", "d", "rule", "ms", "finite_rows_ms", "finite_rows_over_floor"],
}
TARGETS = {  # the aims at n = 20, d = 2.8 and 11 million: over the mean, over the fastest peer
    "median": (1.3, 10),
    "trimmed_mean": (1.6, 10),
    "meamed": (2.5, 5),
    "phocas": (2.5, 5),
    "bulyan": (4, 5),
    "majority_vote": (1.3, None),
    "nnm+trimmed_mean": (4.5, 20),
    **dict.fromkeys(["multi_krum", "rfa", "caf"], (3.5, 5)),
    **dict.fromkeys(["krum", "nnm+mean", "centered_clip", "cge", "arc"], (5, 5)),
}


def nnm(rule: byz.Chain | Any, f: int) -> byz.Chain:
    return byz.Chain(pre=(byz.NNM(),), rule=rule, f=f)


def rules(n: int, f: int) -> dict[str, Timed]:
    """Every rule, for n rows of which f may lie."""
    small = (n - 3) // 4
    mixed, between = byz.NNM(f=f), byz.ByHeterogeneity(f=f)
    return {
        "median": byz.CoordinateMedian(f=f),
        "trimmed_mean": byz.TrimmedMean(f=f),
        "meamed": byz.MeaMed(f=f),
        "phocas": byz.Phocas(f=f),
        "bulyan": byz.Bulyan(f=min(f, small)),
        "krum": byz.Krum(f=f),
        "multi_krum": byz.MultiKrum(f=f),
        "rfa": byz.GeometricMedian(f=f, definition="byzfl"),
        "geometric_median": byz.GeometricMedian(f=f),
        "auto_gm": byz.AutoGM(f=f),
        "centered_clip": byz.CenteredClip(f=f, tau=100.0),
        "cge": byz.CGE(f=f),
        "faba": byz.FABA(f=f),
        "aksel": byz.Aksel(f=f),
        "monna": byz.MoNNA(f=f),
        "mda": byz.MDA(f=f),
        "smea": byz.SMEA(f=min(f, byz.SMEA().most_f(n))),
        "caf": byz.CAF(f=f),
        "spectral_filter": byz.SpectralFilter(f=f),
        # between its two rules it asks both
        "by_heterogeneity": lambda rows: between(
            Rows(rows, unlike=(between.low + between.high) / 2)
        ),
        "dnc": byz.DnC(f=f),
        "sign_guard": byz.SignGuard(f=f),
        "majority_vote": byz.MajorityVote(f=f),
        "arc": byz.Chain(pre=(byz.ARC(),), rule=byz.Mean(), f=f),
        "clipping": byz.Chain(pre=(byz.StaticClipping(c=2.0),), rule=byz.Mean(), f=f),
        "bucketing+median": byz.Chain(
            pre=(byz.Bucketing(),), rule=byz.CoordinateMedian(), f=min(f, byz.Bucketing().most_f(n))
        ),
        "nnm+mean": lambda rows: byz.Mean()(mixed(Rows(rows))),
        "nnm+trimmed_mean": nnm(byz.TrimmedMean(), f),
        "nnm+median": nnm(byz.CoordinateMedian(), f),
        "arc+nnm+trimmed_mean": byz.Chain(pre=(byz.ARC(), byz.NNM()), rule=byz.TrimmedMean(), f=f),
    }


def compiled(f: int) -> dict[str, Timed]:
    """The rules of one pass that torch.compile makes, on a GPU."""
    one_pass = {"median": byz.CoordinateMedian(), "trimmed_mean": byz.TrimmedMean()}
    one_pass |= {"meamed": byz.MeaMed(), "phocas": byz.Phocas()}
    return {
        f"{name}, compiled": byz.Chain(rule=rule, f=f, compile=True)
        for name, rule in one_pass.items()
    }


def peers(n: int, f: int) -> dict[str, dict[str, Timed]]:
    """The rules that peers have, under our names."""
    found: dict[str, dict[str, Timed]] = {}
    if importlib.util.find_spec("byzfl"):
        import byzfl

        mean, trimmed, mix = byzfl.Average(), byzfl.TrMean(f=f), byzfl.NNM(f=f)
        clip, arc, bucket = byzfl.Clipping(c=2.0), byzfl.ARC(f=f), byzfl.Bucketing(s=2)
        found["ByzFL"] = {
            "median": byzfl.Median(),
            "trimmed_mean": trimmed,
            "meamed": byzfl.Meamed(f=f),
            "krum": byzfl.Krum(f=f),
            "multi_krum": byzfl.MultiKrum(f=f),
            "rfa": byzfl.GeometricMedian(nu=0.1, T=3),
            "centered_clip": byzfl.CenteredClipping(L=1, tau=100.0),
            "monna": byzfl.MoNNA(f=f),
            "mda": byzfl.MDA(f=f),
            "smea": byzfl.SMEA(f=f),
            "caf": byzfl.CAF(f=f),
            "arc": lambda rows: mean(arc(rows)),
            "clipping": lambda rows: mean(clip(rows)),
            "bucketing+median": lambda rows: byzfl.Median()(bucket(rows)),
            "nnm+mean": lambda rows: mean(mix(rows)),
            "nnm+trimmed_mean": lambda rows: trimmed(mix(rows)),
        }
    if importlib.util.find_spec("byzpy"):
        from byzpy.aggregators.coordinate_wise.median import CoordinateWiseMedian
        from byzpy.aggregators.coordinate_wise.trimmed_mean import CoordinateWiseTrimmedMean
        from byzpy.aggregators.geometric_wise.geometric_median import GeometricMedian
        from byzpy.aggregators.geometric_wise.krum import Krum, MultiKrum
        from byzpy.aggregators.geometric_wise.minimum_diameter_average import (
            MinimumDiameterAveraging,
        )
        from byzpy.aggregators.geometric_wise.monna import MoNNA
        from byzpy.aggregators.norm_wise.caf import CAF
        from byzpy.aggregators.norm_wise.center_clipping import CenteredClipping
        from byzpy.aggregators.norm_wise.comparative_gradient_elimination import (
            ComparativeGradientElimination,
        )

        theirs = {
            "median": CoordinateWiseMedian(),
            "trimmed_mean": CoordinateWiseTrimmedMean(f),
            "krum": Krum(f),
            "multi_krum": MultiKrum(f, n - f),
            "geometric_median": GeometricMedian(),
            "mda": MinimumDiameterAveraging(f),
            "monna": MoNNA(f),
            "caf": CAF(f),
            "centered_clip": CenteredClipping(c_tau=100.0, M=1),
            "cge": ComparativeGradientElimination(f),
        }
        found["ByzPy"] = {
            name: (lambda rows, rule=rule: rule.aggregate(list(rows)))
            for name, rule in theirs.items()
        }
    return found


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes by which resident memory rose above its start, at most; sampled every millisecond."""
    page, done, peak = os.sysconf("SC_PAGE_SIZE"), threading.Event(), [0]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    start = resident()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident() - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def seconds(rule: Timed, rows: torch.Tensor) -> float:
    on_gpu = rows.device.type == "cuda"
    torch.cuda.synchronize() if on_gpu else None
    start = time.perf_counter()
    rule(rows)
    torch.cuda.synchronize() if on_gpu else None
    return time.perf_counter() - start


def compare(
    rule: Timed, theirs: dict[str, Timed], rows: torch.Tensor, patience: float
) -> dict[str, float]:
    """Best times of the mean, the rule and the peers' rules, interleaved, and the rule's extra
    memory over the rows' size.
    """
    contestants = {"mean": lambda x: x.mean(0), "ours": rule, **theirs}
    best = dict.fromkeys(contestants, math.inf)
    with peak_memory() as peak:
        rule(rows)
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or (rounds < 7 and time.perf_counter() - started < patience):
        for name, contestant in contestants.items():
            if rounds and best[name] > patience:  # once is enough
                continue
            # some peers overwrite their input
            copy = rows.clone() if name not in ("mean", "ours") else rows
            best[name] = min(best[name], seconds(contestant, copy))
        rounds += 1
    return {**best, "memory": peak[0] / rows.nbytes}


def on_a_gpu(n: int, d: int, only: list[str] | None) -> list[list[str]]:
    """The same on a GPU, with the best of twenty calls."""
    f = n // 5
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).cuda()
    copy = min(seconds(torch.clone, rows) for _ in range(20))
    floor = copy * (n + 1) / (2 * n)
    speed = 2 * rows.nbytes / copy / 1e12
    print(
        f"{torch.cuda.get_device_name()}, n = {n}, d = {d:,}: a copy of the rows takes "
        f"{1000 * copy:.2f} ms ({speed:.1f} TB/s, read and written), the floor is "
        f"{1000 * floor:.2f} ms.\n"
    )
    lines = []
    for name, rule in (rules(n, f) | compiled(f)).items():
        if (only and name not in only) or name in ("mda", "smea"):
            continue
        # in training the exchange has looked for nan already
        present = torch.ones(n, dtype=torch.bool, device="cuda")

        def told(x: torch.Tensor, rule: Any = rule, present: torch.Tensor = present) -> Any:
            return rule(x, present) if isinstance(rule, byz.aggregators.Aggregator) else rule(x)

        times = {
            kind: [seconds(call, rows) for _ in range(22)][2:]
            for kind, call in (("checked", rule), ("told", told))
        }
        best = {kind: min(found) for kind, found in times.items()}
        lines.append(
            [
                *map(str, (n, f, d)),
                name,
                f"{1000 * best['checked']:.2f}",
                f"{1000 * best['told']:.2f}",
                f"{best['told'] / floor:.1f}",
            ]
        )
        print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
    return lines


def on_a_cpu(
    n: int, d: int, only: list[str] | None, with_peers: bool, patience: float, mda: int
) -> list[list[str]]:
    """What `COLUMNS` names, and which aims are met; the plain mean comes first."""
    f = n // 5
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    rivals = peers(n, f) if with_peers else {}
    mean = min(seconds(lambda x: x.mean(0), rows) for _ in range(5))
    lines = [[*map(str, (n, f, d)), "mean", f"{1000 * mean:.3g}", "", "", "", "", ""]]
    for name, rule in rules(n, f).items():
        # peers visit every subset, and for SMEA there is no other way
        tries = math.comb(n, f) if name in ("mda", "smea") else 0
        if (only and name not in only) or (name == "smea" and tries > mda):
            continue
        # ByzFL decomposes every subset's matrix
        slow = tries > mda or (name == "smea" and tries * n * d > 1e10)
        theirs = (
            {} if slow else {peer: known[name] for peer, known in rivals.items() if name in known}
        )
        found = compare(rule, theirs, rows, patience)
        over = found["ours"] / found["mean"]
        faster = {peer: found[peer] / found["ours"] for peer in theirs}
        aim, aim_peer = (
            TARGETS.get(name, (None, None)) if (n, d >= 2_000_000) == (20, True) else (None, None)
        )
        verdict = "" if aim is None else ("yes" if over <= aim else "no") + f" (<= {aim})"
        if aim_peer is not None and faster:
            verdict += (
                ", " + ("yes" if min(faster.values()) >= aim_peer else "no") + f" (>= {aim_peer})"
            )
        lines.append(
            [*map(str, (n, f, d)), name]
            + [f"{1000 * found['ours']:.4g}", f"{over:.1f}", f"{found['memory']:.2f}"]
            + [f"{faster[peer]:.1f}" if peer in faster else "" for peer in PEERS]
            + [verdict]
        )
        print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Times every rule.")
    parser.add_argument(
        "--n",
        type=int,
        nargs="+",
        default=[10, 20, 50],
        help="numbers of rows; f is a fifth of them",
    )
    parser.add_argument(
        "--d",
        type=int,
        nargs="+",
        default=[100_000, 11_173_962],
        help="numbers of columns; ResNet-18 has 11,173,962",
    )
    parser.add_argument("--rules", nargs="+", help="only these")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--patience",
        type=float,
        default=4.0,
        help="seconds for a rule; whatever takes longer is run once or twice",
    )
    parser.add_argument(
        "--most-subsets",
        type=int,
        default=5000,
        help="peers' MDA and SMEA run up to so many subsets",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--output",
        type=Path,
        help="a CSV file to write; what it held is replaced",
    )
    arguments = parser.parse_args()
    columns, lines = COLUMNS[arguments.device], []
    for d in arguments.d:
        for n in arguments.n:
            if arguments.device == "cuda":
                lines += on_a_gpu(n, d, arguments.rules)
                continue
            # peers copy the rows, and larger copies do not fit into memory
            peered = not arguments.no_peers and n * d <= 300_000_000
            lines += on_a_cpu(
                n, d, arguments.rules, peered, arguments.patience, arguments.most_subsets
            )
    if arguments.output:
        write_csv(arguments.output, columns, [line[: len(columns)] for line in lines])
    header = columns if arguments.device == "cuda" else [*columns, "aims met"]
    print(f"{markdown(header, lines)}\n{machine()}, {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
