"""Private names of torch that the package reads, in one place.

``tests/test_private_names.py`` fails where one of them moves.
"""

from __future__ import annotations

from torch import Tensor


def has_hooks(parameter: Tensor) -> bool:
    """Whether a parameter has hooks on its gradient; torch has no public way to ask."""
    hooks, after = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    return bool(hooks) or bool(after)
