"""Processes on a parameter server: what collectives, checkpoints and the launcher become when
workers may die and come back.
"""

from __future__ import annotations

import atexit
import inspect
import io
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_byz.compressors import Field
from lightning_byz.strategies import random_states
from lightning_byz.strategies.checkpoint import CHECKPOINT_KEY, run_state
from lightning_byz.strategies.module_buffers import shared_tensors
from lightning_byz.strategies.processes import Processes
from lightning_byz.strategies.validate import UnsupportedSetupError
from lightning_byz.transports import LeftBehindError, ParameterServer, RunIsOverError
from lightning_byz.transports.parameter_server.protocol import fingerprint
from lightning_byz.transports.parsing import Refusals, described, read_tensor
from lightning_byz.transports.wire import pack, packed_size, unpack

log = logging.getLogger("lightning_byz")

_POSITION = "lightning_byz_position"


class ServerProcesses(Processes):
    """Processes that meet at a `ParameterServer`, which they find, and outlive each other, by
    themselves.

    Args:
        strategy: the RobustStrategy, whose transport is a `ParameterServer`.

    Attributes:
        validated: samples that this process has validated since the last time it was told.
        snapshot_path: where a snapshot of the server lies that this process is to start from; None
            if there is none.
    """

    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy)
        self.transport: ParameterServer = strategy.transport
        self.validated = 0
        self.snapshot_path: str | None = None
        self._for_ranks: list[int] = []
        self._metrics: list[tuple[Any, Any, Any]] = []
        self._refusals = Refusals("gathered tensors", "rank")

    # -- the beginning and the end -----------------------------------------------------------------

    def launcher(self) -> Any:
        strategy = self.strategy
        if self.size == 1:
            return None
        if strategy._start_method != "popen":
            raise UnsupportedSetupError(
                "On a parameter server processes start with popen, so that each may die alone. "
                f"Found start_method={strategy._start_method!r}. Leave it out."
            )
        return surviving_launcher(strategy._launchers._SubprocessScriptLauncher, self)

    def open(self) -> None:
        """Connects to the others. If the run has begun without this process, it gets a snapshot."""
        self.name_ranks()
        environment, module = self.strategy.cluster_environment, self.strategy.lightning_module
        tensors = [] if module is None else shared_tensors(module)
        nbytes = sum(0 if nn.parameter.is_lazy(tensor) else tensor.nbytes for tensor in tensors)
        host, port, rank = (
            environment.main_address,
            environment.main_port,
            environment.global_rank(),
        )
        self._keep(self.transport.open(rank, self.size, host, port, nbytes))

    def rejoin(self) -> None:
        """Gets a snapshot in place of what this process has missed."""
        self._keep(self.transport.rejoin())

    def _keep(self, snapshot: bytes | None) -> None:
        self.snapshot_path = None
        if snapshot is not None:
            handle, self.snapshot_path = tempfile.mkstemp(prefix="lightning_byz_", suffix=".ckpt")
            with os.fdopen(handle, "wb") as file:
                file.write(snapshot)

    def snapshot(self, path: Any) -> dict[str, Any] | None:
        """The snapshot to start from; it tells at which batch it was made."""
        if self.snapshot_path is None or path != self.snapshot_path:
            return None
        self.snapshot_path = None
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        os.unlink(path)
        self.transport.position = checkpoint.pop(_POSITION) - 1
        return checkpoint

    def connect(self) -> None:
        """At the start rank 0 waits for all others, for a while."""
        if self.size == 1:
            return
        random_states.reset()
        self.name_ranks()
        missing = self.transport.wait_for_all()
        if missing:
            log.warning(
                f"Ranks {missing} have not come in {self.transport.start_timeout:.0f} s. The run "
                "begins without them."
            )

    def leave(self) -> None:
        for metric, available, sync in reversed(self._metrics):
            metric.distributed_available_fn, metric.dist_sync_fn = available, sync
        self._metrics = []
        self.transport.shut("The server has stopped with an error." if self.interrupted else "over")

    @torch.no_grad()
    def share_model(self, module: nn.Module) -> None:
        """A process that comes back has them from its snapshot."""
        if self.transport.catching_up:
            return
        tensors = shared_tensors(module)
        layout = [Field(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        buffer = torch.zeros(packed_size(layout), dtype=torch.uint8)
        pack([tensor.detach().cpu() for tensor in tensors], layout, buffer)
        received = self.transport.from_server("model", buffer.numpy().tobytes())
        if len(received) != len(buffer):
            raise ValueError(
                f"All ranks should have the same model. Found {len(received)} bytes of parameters "
                f"and buffers at rank 0, and {len(buffer)} at rank {self.transport.rank}. Build "
                "it alike on all hosts."
            )
        for tensor, shared in zip(
            tensors,
            unpack(torch.frombuffer(bytearray(received), dtype=torch.uint8), layout),
            strict=True,
        ):
            if not torch.equal(shared, tensor.cpu()):
                tensor.copy_(shared)

    # -- where the run is --------------------------------------------------------------------------

    @property
    def _apart(self) -> bool:
        """Whether this process takes part in no collective now."""
        return not self.transport.is_open or self.transport.catching_up

    @property
    def alone(self) -> bool:
        return self._apart or self.interrupted

    @property
    def is_behind(self) -> bool:  # type: ignore[override]
        return self.transport.behind

    def begin_batch(self, batch_idx: int) -> None:
        """A new position where a round begins. There rank 0 makes snapshots for those that want
        one.
        """
        trainer = self.strategy.lightning_module.trainer
        sync = self.strategy.sync
        ready = batch_idx % trainer.accumulate_grad_batches == 0 and sync.between_rounds
        if ready:
            self.transport.at(self.transport.position + 1)
        self._for_ranks = self.transport.wanting() if ready else []
        if self._for_ranks:
            trainer.save_checkpoint(f"snapshot for ranks {self._for_ranks}")

    def begin_checkpoint(self, checkpoint: dict[str, Any], filepath: Any) -> bool:
        """Not where it is meant for those that want a snapshot: it is sent to them."""
        self.saved_alone = False
        if not self._for_ranks:
            return True
        strategy, ranks, share = self.strategy, self._for_ranks, self.transport.workers_per_process
        workers = [worker for rank in ranks for worker in range(rank * share, (rank + 1) * share)]
        states = [group.exchange.rejoined(workers, group.example()) for group in strategy.groups]
        kept_here = {"server": None, "experience": None}
        server = [{**exchange.server_state(), **kept_here} for exchange in strategy.exchanges]
        kept = {
            name: value
            for name, value in checkpoint.items()
            if "hyper_parameters" not in name and "hparams" not in name
        }
        buffer = io.BytesIO()
        made = {CHECKPOINT_KEY: run_state(strategy, server, states, {})}
        torch.save({**kept, **made, _POSITION: self.transport.position}, buffer)
        self.transport.send_snapshot(ranks, buffer.getvalue())
        step = strategy.exchanges[0].step
        log.warning(f"ParameterServer: ranks {ranks} join at step {step}, from a snapshot.")
        self._for_ranks, self.saved_alone = [], True
        return False

    # -- collectives -------------------------------------------------------------------------------

    def barrier(self, name: str | None) -> None:
        """Waits for all that are alive."""
        if name == "Trainer.save_checkpoint" and self.saved_alone:
            self.saved_alone = False
            return
        self.transport.from_everybody(f"barrier {name}", b"\1", 1)

    def broadcast(self, obj: Any, src: int) -> Any:
        """The server's object. It travels as torch.save writes it and is read without running code:
        tensors, numbers, strings, containers.
        """
        if src != 0:
            raise UnsupportedSetupError(
                f"On a parameter server only rank 0 broadcasts. Found src={src}. Use src=0."
            )
        if self.transport.rank == 0:
            buffer = io.BytesIO()
            torch.save(obj, buffer)
            try:
                torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
            except pickle.UnpicklingError as error:
                raise UnsupportedSetupError(
                    "A parameter server broadcasts tensors, numbers, strings and containers of "
                    f"these, so that nobody has to run what it is sent. Found {type(obj).__name__}."
                ) from error
            self.transport.from_server("broadcast", buffer.getvalue())
            return obj
        received = self.transport.from_server("broadcast", b"")
        return torch.load(io.BytesIO(received), weights_only=True) if received else obj

    def gather(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        return self._gathered(tensor, same_shape=True)

    def _gathered(self, tensor: Tensor, same_shape: bool) -> list[Tensor]:
        """The tensors of all ranks that are heard, this one's among them or not.

        Args:
            tensor: this rank's.
            same_shape: whether the others' have to have its shape; else its sizes but for the first
                dimension's.
        """
        body = described(tensor)
        most = self.transport.largest_message if not same_shape else len(body)
        bodies = self.transport.from_everybody("gather tensors", body, most)
        heard = [
            self._refusals.read(rank, read_tensor, body, tensor, same_shape)
            for rank, body in bodies.items()
        ]
        tensors = [read for read in heard if read is not None]
        return tensors or [tensor]

    def decide(self, decision: bool, everybody: bool) -> bool:
        """A decision that up to f workers cannot force: the server's own, overruled by more than f
        votes of workers.

        Args:
            decision: this rank's vote.
            everybody: whether one "no" is enough for "no"; else one "yes" for "yes". "One" is the
                server, or more than f workers.
        """
        heard = self.transport.from_everybody("decision", b"\1" if decision else b"\2", 1)
        strong = b"\2" if everybody else b"\1"
        resolved = self.strategy.resolved
        f = 0 if resolved is None else resolved.aggregator.f or 0
        votes = sum(vote == strong for vote in heard.values()) * self.transport.workers_per_process
        return everybody != (heard.get(0) == strong or votes > f)

    def begin_training(self, module: nn.Module) -> None:
        """Metrics of torchmetrics sync through the server, where they would find no process group
        and report this rank's part alone.
        """
        metrics: list[Any] = list(module.modules())
        for metric in metrics:
            if hasattr(metric, "distributed_available_fn") and hasattr(metric, "dist_sync_fn"):
                self._metrics.append((metric, metric.distributed_available_fn, metric.dist_sync_fn))
                metric.distributed_available_fn = lambda: not self._apart
                metric.dist_sync_fn = lambda tensor, group=None: self._gathered(
                    tensor, same_shape=False
                )

    def note_validated(self, samples: int) -> None:
        self.validated += samples

    def end_validation(self) -> None:
        """Says how many samples it covered, which are fewer when workers are dead."""
        trainer = self.strategy.lightning_module.trainer
        mine, self.validated = self.validated, 0
        if trainer.sanity_checking or self._apart:
            return
        total = int(torch.stack(self.gather(torch.tensor(mine, dtype=torch.int64))).sum())
        if self.transport.rank == 0:
            log.info(f"Validation covered {total} samples.")
            for logger in trainer.loggers:
                logger.log_metrics({"validated_samples": float(total)}, step=trainer.global_step)

    # -- checkpoints -------------------------------------------------------------------------------

    def _to_rank_0(self, tensors: list[Tensor], layout: list[Field]) -> dict[int, Tensor] | None:
        sent = torch.zeros(packed_size(layout), dtype=torch.uint8)
        pack([tensor.cpu() for tensor in tensors], layout, sent)
        bodies = self.transport.from_everybody(
            "save", sent.numpy().tobytes(), len(sent), layout=fingerprint(layout), tell=False
        )
        return {
            rank: torch.frombuffer(bytearray(body), dtype=torch.uint8)
            for rank, body in bodies.items()
        }


def surviving_launcher(base: Any, served: ServerProcesses) -> Any:
    """A launcher of scripts like Lightning's, which does not kill everybody when one process dies.

    Args:
        base: Lightning's own, of the package at hand.
        served: the run.
    """

    class _SurvivingLauncher(base):  # type: ignore[misc]
        def launch(
            self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any
        ) -> Any:
            environment = self.cluster_environment
            environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
            if not environment.creates_processes_externally:
                if self.num_nodes == 1:
                    made = served.transport.make_own_keys(self.num_processes)
                    if made is not None:
                        atexit.register(shutil.rmtree, made, ignore_errors=True)
                self._call_children_scripts()
            if "OMP_NUM_THREADS" not in os.environ and self.num_processes > 1:
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.num_processes))
            arguments = inspect.signature(function).bind(*args, **kwargs)
            try:
                served.open()
                while True:
                    if served.snapshot_path is not None:
                        arguments.arguments["ckpt_path"] = served.snapshot_path
                    try:
                        return function(*arguments.args, **arguments.kwargs)
                    except LeftBehindError as error:
                        log.warning(f"{error} It goes on from a snapshot.")
                        served.rejoin()
            except RunIsOverError as error:
                log.warning(str(error))
                served.transport.shut()
                return None

    environment = served.strategy.cluster_environment
    return _SurvivingLauncher(environment, served.strategy.num_processes, served.strategy.num_nodes)
