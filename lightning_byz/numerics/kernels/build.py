"""Compiles the C files, when the package is built. Needs nothing but Python and a C compiler.

One shared library for each dtype and instruction set; `kernels` loads the best one that the
processor has.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

MOST_UNROLLED = 32
"""Up to so many rows are sorted in registers; the code grows with it."""

DTYPES = {
    "float32": ("-DREAL=float", "-DPACKED=ps", "-DNEON=f32"),
    "float64": ("-DREAL=double", "-DPACKED=pd", "-DNEON=f64"),
}
INSTRUCTIONS = {
    "avx512": ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw"),
    "avx2": ("-mavx2",),
    "baseline": (),
}
"""By instruction set, best first, what the compiler is told."""

_HERE = Path(__file__).parent
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-ffp-contract=off")


class NoCompilerError(RuntimeError):
    """Why nothing could be compiled."""


@cache
def version() -> str:
    """Tells libraries of these sources from those of others."""
    sources = [*sorted(_HERE.glob("*.[ch]")), _HERE / "build.py", _HERE.parent / "networks.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]


def library(dtype: str, instructions: str) -> str:
    """The file name of a library."""
    return f"kernels-{version()}-{dtype}-{instructions}.so"


def build(folder: Path) -> list[Path]:
    """Compiles all libraries for this kind of processor into a folder, in place of those there.

    Raises:
        NoCompilerError: if there is no C compiler, or it cannot compile them.
    """
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if os.name != "posix" or shutil.which(compiler[0]) is None:
        raise NoCompilerError(f"there is no C compiler {compiler[0]!r}")
    targets = shlex.split(os.environ.get("ARCHFLAGS", ""))
    intel = platform.machine().lower() in ("x86_64", "amd64") and "arm64" not in targets
    for old in folder.glob("*.so"):
        old.unlink()
    made = []
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "networks.h").write_text(_networks())
        for dtype, names in DTYPES.items():
            for instructions, flags in INSTRUCTIONS.items():
                if flags and not intel:
                    continue
                made.append(folder / library(dtype, instructions))
                sources = (f"-I{scratch}", *map(str, sorted(_HERE.glob("*.c"))))
                _run([*compiler, *targets, *_FLAGS, *flags, *names, *sources, "-o", str(made[-1])])
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCompilerError(f"{shlex.join(command)} failed: {done.stderr.strip()[:2000]}")


def _networks() -> str:
    """The straight-line sorts that ``columns.c`` includes."""
    networks = _loaded(_HERE.parent / "networks.py")
    code = [f"#define MOST_UNROLLED {MOST_UNROLLED}"]
    for n in range(1, MOST_UNROLLED + 1):
        loads = " ".join(f"LOAD({i})" for i in range(n))
        network = networks.odd_even_merge_sort(n)
        compares = " ".join(f"COMPARE({low}, {high})" for low, high in network)
        stores = " ".join(f"STORE({i})" for i in range(n))
        loop = "for (int k = 0; k < WIDTH; k += LANES)"
        body = f"{loop} {{\n{loads}\n{compares}\n{stores}\n}}"
        code.append(f"static void sort_{n}(REAL rows[][WIDTH])\n{{\n{body}\n}}")
    names = ", ".join(f"sort_{n}" for n in range(1, MOST_UNROLLED + 1))
    code.append(f"static void (*const sorts[])(REAL[][WIDTH]) = {{0, {names}}};")
    return "\n".join(code) + "\n"


def _loaded(path: Path) -> ModuleType:
    """A module by its file: the package itself may not be importable yet."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
