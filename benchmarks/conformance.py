"""Which laws hold for whose rules: a matrix rules x laws for this package and the peers that are
installed.

    python benchmarks/conformance.py [--output docs/conformance.md]

The laws are those of `lightning_byz.testing.aggregator_laws`, on 11 rows of which 2 may be
anything. Peers: ByzFL and ByzPy (``pip install byzfl``,
``pip install --no-deps byzpy cloudpickle``).
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from _runs import markdown
from aggregators import peers, rules

from lightning_byz.testing import Law, aggregator_laws

N, F = 11, 2
CLAIMS: dict[str, dict[str, bool]] = {  # what a rule's definition does not promise
    "cge": {"translation_equivariant": False},
    "arc": {"translation_equivariant": False},
    "arc+nnm+trimmed_mean": {"translation_equivariant": False},
    "clipping": {"translation_equivariant": False, "scale_equivariant": False, "unanimous": False},
    "rfa": {"translation_equivariant": False, "scale_equivariant": False, "robust": False},
    "auto_gm": {"scale_equivariant": False},
    "centered_clip": {
        "translation_equivariant": False,
        "scale_equivariant": False,
        "unanimous": False,
        "robust": False,
    },
    "sign_guard": {"translation_equivariant": False, "robust": False},
    "majority_vote": {
        "translation_equivariant": False,
        "scale_equivariant": False,
        "unanimous": False,
        "robust": False,
    },
    "dnc": {"robust": False},
    "monna": {"symmetric": False, "robust": False},
    "bucketing+median": {"symmetric": False},
    "nnm+mean": {"robust": False},
}
COLUMNS = {  # columns of the table: a word, and the laws that it stands for
    "equal rows": ("equal rows give that row",),
    "order": ("the order of the rows does not matter",),
    "shift, scale": ("it moves with the rows", "it scales with the rows"),
    "input kept": ("the input is not modified", "the result has memory of its own"),
    "same bits": ("same input, same bits",),
    "dtypes": (
        "float64 rows give such a result",
        "float32 rows give such a result",
        "bfloat16 rows give such a result",
    ),
    "common mean": ("a large common mean costs no digits",),
    "nan": ("f rows of nan", "one nan in a row"),
    "inf": ("f rows of inf", "f rows of -inf"),
    "1e20": ("f rows of 1e20",),
    "1e30, 1e38": ("f rows of -1e30", "f rows of 1e38"),
    "duplicates": ("f equal rows, far away", "f rows of zeros"),
    "unlike sizes": ("f rows of different sizes",),
    "n = 2f": ("n = 2f is refused",),
}


def mark(laws: dict[str, Law], names: tuple[str, ...]) -> str:
    known = [laws[name] for name in names if name in laws]
    return "" if not known else "yes" if all(law.holds for law in known) else "**no**"


def limited(
    rule: Callable[[torch.Tensor], Any], seconds: float = 5.0
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A rule that is stopped after some seconds: there are peers' loops that a nan never leaves."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no answer after {seconds} s")

    def call(rows: torch.Tensor) -> torch.Tensor:
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return torch.as_tensor(rule(rows))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints which laws hold for which rules.")
    parser.add_argument(
        "--output",
        type=Path,
        help="a Markdown page whose text below the line '<!-- measured -->' is replaced",
    )
    parser.add_argument(
        "--why", action="store_true", help="also print what was found where a law does not hold"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    everybody: dict[str, dict[str, Any]] = {"lightning_byz": rules(N, F), **peers(N, F)}
    lines = []
    for name, ours in everybody["lightning_byz"].items():
        for library, known in everybody.items():
            if name not in known:
                continue
            subject = ours if library == "lightning_byz" else limited(known[name])
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                laws = {
                    law.name: law for law in aggregator_laws(subject, N, F, **CLAIMS.get(name, {}))
                }
            print(
                f"{name} of {library}: {sum(law.holds for law in laws.values())} of {len(laws)} "
                "laws",
                file=sys.stderr,
                flush=True,
            )
            lines.append([name, library, *(mark(laws, column) for column in COLUMNS.values())])
            for law in laws.values():
                if arguments.why and not law.holds:
                    print(f"{name} of {library}: {law.name}: {law.found}")
    text = markdown(["rule", "library", *COLUMNS], lines)
    if arguments.output:
        page = arguments.output.read_text()
        arguments.output.write_text(
            page[: page.index("<!-- measured -->")] + "<!-- measured -->\n\n" + text
        )
    print(text)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
