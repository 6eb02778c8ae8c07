"""What Lightning's callback entry points load: shadow mode, if ``LIGHTNING_BYZ_SHADOW=1`` is in the
environment.

A module of its own, so that a Trainer without that variable imports nothing of `lightning_byz`.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

VARIABLE = "LIGHTNING_BYZ_SHADOW"


def lightning() -> list[Any]:
    """Callbacks for every Trainer of the package ``lightning``."""
    return _callbacks("lightning")


def pytorch_lightning() -> list[Any]:
    """Callbacks for every Trainer of the package ``pytorch_lightning``."""
    return _callbacks("pytorch_lightning")


def _callbacks(package: str) -> list[Any]:
    value = os.environ.get(VARIABLE, "")
    if value in ("", "0"):
        return []
    if value != "1":
        raise ValueError(
            f"{VARIABLE} should be 1 (shadow mode) or 0 (none). Found {value!r}. For settings, "
            "add ShadowMode(...) to the callbacks."
        )
    return [importlib.import_module(f"lightning_byz.{package}").ShadowMode(strict=False)]
