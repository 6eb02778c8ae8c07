"""Between a model's parameters and flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_byz.numerics.memory import Lender, empty_rows, same_memory


class FlatParameters:
    """The trainable parameters of one optimizer, in its order, seen as one vector.

    Args:
        parameters: the parameters.

    Attributes:
        dim: d, the length of the vector.
        dtype: float32, or the parameters' own if it is wider.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = tuple(parameters)
        self.sizes = [p.numel() for p in self.parameters]
        self.dim = sum(self.sizes)
        self.dtype = reduce(torch.promote_types, (p.dtype for p in self.parameters), torch.float32)
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self._rows: Tensor | None = None
        self._lender = Lender()

    @property
    def nbytes(self) -> int:
        """Bytes of a vector; the same on all ranks."""
        return self.dim * self.dtype.itemsize

    @staticmethod
    def watch(p: Tensor, arrived: Callable[[], None]) -> tuple[Any, Any]:
        """Calls a function whenever a parameter's gradient has been accumulated, after every hook
        on the parameter itself.

        Returns:
            what has to be kept alive, and the hook.
        """
        node = get_gradient_edge(p).node
        return node, node.register_hook(lambda *_: arrived())

    def like(self) -> Tensor:
        """An empty vector ``[d]`` of the right dtype and device."""
        return torch.empty(self.dim, dtype=self.dtype, device=self.device)

    def blank(self) -> Tensor:
        """A vector ``[d]`` of the right dtype and device, whose numbers are not stored."""
        return torch.empty(1, dtype=self.dtype, device=self.device).expand(self.dim)

    def used(self) -> Tensor:
        """``[P]`` bool: the parameters that have a gradient."""
        return torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.bool)

    def rows(self, workers: int) -> Tensor:
        """Room for the gradients of so many workers, ``[workers, d]``: the same in every step,
        because fresh memory is slow, unless gradients have been put there (`write_gradients`) that
        are still looked at.
        """
        if self._rows is None or len(self._rows) != workers:
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            self._rows = (
                self._lender(like.new_empty(self.dim))[None]
                if workers == 1
                else empty_rows(workers, self.dim, like)
            )
        return self._rows

    def part_with(self, flat: Tensor) -> None:
        """A vector's memory may be that of gradients from now on, and no longer room for others."""
        if self._rows is not None and same_memory(flat, self._rows):
            self._rows = None

    def read_gradients(self, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        """The gradients as a vector ``[d]``, times ``scale``; 0 where a parameter has none.
        ``out``: where to; None: into a new one.
        """
        flat = self.like() if out is None else out
        for piece, p in zip(torch.split(flat, self.sizes), self.parameters, strict=True):
            self.read_gradient(p.grad, piece)
        return flat.mul_(scale) if scale != 1 else flat

    @staticmethod
    @torch.no_grad()
    def read_gradient(gradient: Tensor | None, out: Tensor) -> None:
        """One parameter's gradient as a vector, into ``out``; 0 if there is none."""
        if gradient is None:
            out.zero_()
        elif gradient.is_sparse:
            raise ValueError(
                f"Gradients should be dense. Found a sparse one of shape {list(gradient.shape)}. "
                "Set sparse=False in the embedding that makes it."
            )
        else:
            out.view(gradient.shape).copy_(gradient)

    @torch.no_grad()
    def read_parameters(self) -> Tensor:
        """The parameters as a new vector ``[d]``."""
        flat = self.like()
        for piece, p in zip(torch.split(flat, self.sizes), self.parameters, strict=True):
            piece.view(p.shape).copy_(p)
        return flat

    @torch.no_grad()
    def write_parameters(self, flat: Tensor) -> None:
        """Sets the parameters from a vector ``[d]``."""
        for piece, p in zip(torch.split(flat, self.sizes), self.parameters, strict=True):
            p.copy_(piece.view(p.shape))

    def write_gradients(
        self, flat: Tensor, used: Sequence[bool], scale: float = 1.0, views: bool = False
    ) -> None:
        """Sets ``p.grad`` from a vector ``[d]``, times ``scale``; to None for parameters that
        nobody used.

        ``views``: gradients may lie in the vector's own memory, which then is theirs.
        """
        self.part_with(flat)
        for piece, p, is_used in zip(
            torch.split(flat, self.sizes), self.parameters, used, strict=True
        ):
            if not is_used:
                p.grad = None
                continue
            if views and scale == 1 and p.dtype == flat.dtype and p.is_contiguous():
                p.grad = piece.view(p.shape)
                continue
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(piece.view(p.shape))
            if scale != 1:
                p.grad.mul_(scale)

    def is_cleared(self) -> bool:
        """Whether every ``p.grad`` is None or 0."""
        return not any(p.grad is not None and bool(p.grad.any()) for p in self.parameters)

    def clear_gradients(self) -> None:
        """Sets every ``p.grad`` to None: an optimizer then leaves the parameter as it is."""
        for p in self.parameters:
            p.grad = None

    def poison_gradients(self) -> None:
        """Puts an inf into the gradients, so that a loss scaler skips the step and backs off."""
        for p in self.parameters:
            p.grad = torch.full_like(p, torch.inf)
