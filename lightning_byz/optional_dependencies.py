"""Optional dependencies: what is missing, and how to install it."""

from __future__ import annotations

import importlib.util


class MissingExtraError(ImportError):
    """A part of the package needs modules that are not installed."""


def require(what: str, extra: str, *modules: str) -> None:
    """Raises a `MissingExtraError` unless all of these top-level modules are installed.

    Args:
        what: what needs them, as the subject of a sentence.
        extra: the package's extra that brings them.
        modules: the modules' import names.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"{what} needs the Python modules {', '.join(modules)}. Not installed: "
            f"{', '.join(missing)}. Run: pip install 'lightning-byz[{extra}]'"
        )
