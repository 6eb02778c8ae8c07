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

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


def has_hooks(parameter: Tensor) -> bool:
    """Whether a parameter has hooks on its gradient; torch has no public way to ask."""
    hooks, after = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    return bool(hooks) or bool(after)


def forward_hooks(module: nn.Module) -> int:
    """How many hooks the forward passes of a module's parts call; torch has no public way to
    ask.
    """
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def of_last_worker(tensor: Tensor) -> Tensor | None:
    """What a tensor that has escaped from a `torch.func.vmap` over workers holds for the last of
    them; None: it is none. torch has no public way to ask.
    """
    functorch, found, dims = torch._C._functorch, tensor, list[int]()
    while functorch.is_functorch_wrapped_tensor(found):
        dims.append(functorch.maybe_get_bdim(found))
        found = functorch.get_unwrapped(found)
    if not dims:
        return None
    for dim in reversed(dims):
        found = found if dim < 0 else found.select(dim, -1)
    return found


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
