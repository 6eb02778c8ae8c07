"""Registers the strategy names with Lightning as soon as the program imports it, and not before:
that takes seconds.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

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
