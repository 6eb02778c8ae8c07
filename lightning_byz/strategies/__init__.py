"""Lightning's side: the hooks of the strategy, and all that Lightning's training loop forces.

`strategy` holds the hooks, `gradient_sync` says when gradients are exchanged, `resolve` decides f, the
algorithm and the transport, `validate` refuses. Only callbacks, data modules and the two faces of
the package (`lightning_byz.lightning`, `lightning_byz.pytorch_lightning`) import it.
"""

from typing import TYPE_CHECKING, Any

from lightning_byz.faces import of_home

if TYPE_CHECKING:
    from lightning_byz.lightning import ByzantineRobustStrategy

__all__ = ["ByzantineRobustStrategy"]


def __getattr__(name: str) -> Any:
    return of_home(__name__, name, __all__)
