"""Private names of torch mean what the package takes them for."""

from __future__ import annotations

import torch

from lightning_byz.strategies.private_names import has_hooks


def test_hooks_on_a_parameter_are_found() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    assert not has_hooks(p)
    hook = p.register_hook(lambda gradient: None)
    assert has_hooks(p)
    hook.remove()
    assert not has_hooks(p)
    hook = p.register_post_accumulate_grad_hook(lambda parameter: None)
    assert has_hooks(p)
    hook.remove()
    assert not has_hooks(p)
