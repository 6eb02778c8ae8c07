"""How a suspicion reaches people: the log, wandb's alerts, and a function of the user's; and how
ranks compare what they hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byz.diagnostics.suspicion import SuspicionTest
from lightning_byz.diagnostics.worker_placement import Whereabouts


@dataclass(frozen=True)
class Suspect:
    """A worker that is accused.

    Attributes:
        worker: its index, 0 .. n - 1.
        rank: of its process.
        host: name of its machine.
        device: index, model and serial number of its GPU, or "cpu".
        step: the optimizer step (of the run, from 0) at which it was accused.
        reason: what speaks most against it, in words.
        message: all of it in words, as logged.
    """

    worker: int
    rank: int
    host: str
    device: str
    step: int
    reason: str
    message: str


def run_logger(trainer: Any) -> logging.Logger:
    """A logger below Lightning's own, so that its messages are seen and filtered as Lightning's
    are.
    """
    package = (
        "lightning.pytorch"
        if type(trainer).__module__.startswith("lightning.")
        else "pytorch_lightning"
    )
    return logging.getLogger(f"{package}.lightning_byz")


def is_wandb(logger: Any) -> bool:
    """Whether it is a WandbLogger, or made from one, of either package's Lightning; nothing is
    imported to know.
    """
    return any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__)


def gathered(own: Tensor) -> list[Tensor]:
    """All ranks' tensors, on the CPU, over torch.distributed's own group."""
    if dist.get_backend() != "nccl":
        own = own.cpu()
    elif own.device.type == "cpu":
        own = own.to(torch.device("cuda", torch.cuda.current_device()))
    everybody = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, own)
    return [other.cpu() for other in everybody]


def accuse(
    trainer: Any,
    test: SuspicionTest,
    place: Whereabouts,
    step: int,
    remark: str,
    on_suspect: Callable[[Suspect], None] | None,
) -> Suspect:
    """Says on rank 0 that a worker is suspect: in the log, by ``wandb.alert`` of a WandbLogger, and
    to the user's function.

    Args:
        trainer: the Trainer.
        test: the test that accuses it.
        place: who it is.
        step: when.
        remark: what else there is to say, as a sentence; may be empty.
        on_suspect: the user's function.
    """
    reason = test.reason(place.worker)
    if test.compare == "others":
        others = ""
        odds = (
            "an honest worker is ever accused with probability at most "
            f"{test.false_alarm_rate:g}, whatever up to f={test.f} others send."
        )
    else:
        others = ", by its own past"
        odds = (
            "a run of honest workers ever says so with probability at most "
            f"{test.false_alarm_rate:g}. It is no proof: colluding workers can move what is "
            "measured of an honest one."
        )
    message = (
        f"Suspect: {place}. Step {step}: {reason}. {test.evidence_shown(place.worker)}. "
        f"Tested {int(test.pairs[place.worker])} times{others}; {odds}"
        + (f" {remark}" if remark else "")
    )
    suspect = Suspect(place.worker, place.rank, place.host, place.device, step, reason, message)
    if not trainer.is_global_zero:
        return suspect
    run_logger(trainer).warning(message)
    for logger in trainer.loggers:
        if is_wandb(logger):
            logger.experiment.alert(
                title=f"lightning_byz: rank {place.rank} on {place.host} is suspect", text=message
            )
    if on_suspect is not None:
        on_suspect(suspect)
    return suspect


def starts_afresh(who: str, test: SuspicionTest, before: int) -> str:
    """That the checkpoint's evidence, of ``before`` workers, is left out."""
    return (
        f"{who}: its evidence starts afresh. The checkpoint's is of n={before} workers, or of "
        f"other settings; here n={test.n}, f={test.f}, compare={test.compare!r}."
    )


def log_to_all(trainer: Any, values: dict[str, float]) -> None:
    """Writes metrics to every logger at once, whatever ``log_every_n_steps`` says: looks are rare,
    and their steps are not Lightning's.
    """
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def scores(test: SuspicionTest, places: Sequence[Whereabouts]) -> dict[str, float]:
    """``byz/suspicion/worker_<i>``: 0 is no evidence, 1 an accusation."""
    return {
        f"byz/suspicion/worker_{place.worker}": float(test.scores[place.worker]) for place in places
    }
