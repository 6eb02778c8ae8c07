"""Which Lightning the program uses: ``lightning`` or ``pytorch_lightning``, whose classes are not
the same.

The strategy names are registered with Lightning as soon as the program imports it, and not before:
that takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

INSTALLED = [
    n for n in ("lightning", "pytorch_lightning") if importlib.util.find_spec(n) is not None
]
"""The Lightning packages that can be imported."""
if not INSTALLED:
    raise ImportError(
        "lightning_byz needs Lightning. Found neither `lightning` nor `pytorch_lightning`. Run: "
        "pip install lightning"
    )
_imported = [name for name in INSTALLED if name in sys.modules]
HOME = (_imported if len(_imported) == 1 else INSTALLED)[0]
"""The one that was imported before this package; if neither or both were, ``lightning``."""


def of_home(module: str, name: str, names: Sequence[str]) -> Any:
    """A class that has a base of Lightning's, for the ``__getattr__`` of a module.

    Lightning is imported with the first of them.

    Args:
        module: the module that is asked.
        name: what it is asked for.
        names: what it has.

    Raises:
        AttributeError: if it has no such name.
    """
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lightning_byz.{HOME}"), name)
    setattr(sys.modules[module], name, value)
    return value


_TRAINER_OF = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
"""Each Lightning package, and its module that holds the Trainer."""


class _Watcher(MetaPathFinder):
    """Finds nothing itself; lets modules of others be followed by one of this package.

    Args:
        followers: what is imported after each module.
    """

    def __init__(self, followers: dict[str, str]) -> None:
        self.followers = followers

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        follower = self.followers.pop(name, None)
        if follower is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(follower)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_with(packages: Sequence[str]) -> None:
    """Imports ``lightning_byz.PACKAGE``, whose classes register themselves: now, or right after the
    package's Trainer.

    Args:
        packages: Lightning packages that are installed.
    """
    later = {}
    for package in packages:
        if _TRAINER_OF[package] in sys.modules:
            importlib.import_module(f"lightning_byz.{package}")
        else:
            later[_TRAINER_OF[package]] = f"lightning_byz.{package}"
    if later:
        sys.meta_path.insert(0, _Watcher(later))
