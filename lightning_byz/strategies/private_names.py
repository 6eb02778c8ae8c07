"""Private names of torch and Lightning that the package uses, in one place.

``tests/test_private_names.py`` fails where one of them moves.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def has_hooks(parameter: Tensor) -> bool:
    """Whether a parameter has hooks on its gradient; torch has no public way to ask."""
    hooks, after = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    return bool(hooks) or bool(after)


def give_mesh(module: Any, mesh: DeviceMesh) -> None:
    """``module.device_mesh``, for `configure_model`, is this; Lightning has no public way to set
    it.
    """
    module._device_mesh = mesh


def bring_no_weights(launcher: Any) -> None:
    """A launcher that forks or spawns brings no weights back into the process that called it:
    Lightning's would load a sharded model's into a module that is not sharded.
    """
    launcher._recover_results_in_main_process = partial(_without_weights, type(launcher), launcher)


def _without_weights(kind: Any, launcher: Any, output: Any, trainer: Any) -> None:
    if output.weights_path is not None:
        shutil.rmtree(os.path.dirname(output.weights_path))
    output = output._replace(weights_path=None)
    kind._recover_results_in_main_process(launcher, output, trainer)


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
