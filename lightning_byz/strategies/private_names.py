"""Private names of torch and Lightning that the package uses, in one place.

``tests/test_private_names.py`` fails where one of them moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def has_hooks(parameter: Tensor) -> bool:
    """Whether a parameter has hooks on its gradient; torch has no public way to ask."""
    hooks, after = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    return bool(hooks) or bool(after)


@contextmanager
def logging_in(module: Any, hook: str) -> Iterator[None]:
    """Inside, ``module.log`` logs as in the hook of this name, which may have ended; Lightning
    files what is logged under the hook that runs.
    """
    before, module._current_fx_name = module._current_fx_name, hook
    try:
        yield
    finally:
        module._current_fx_name = before
