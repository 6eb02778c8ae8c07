"""ByzantineRobustStrategy: Lightning's hooks, in the order in which a run calls them. Each hands
over.

The seam is the end of `Strategy.backward`, where DDP's gradients are reduced
(`lightning_byz.strategies.gradient_sync`). There the local workers' gradients go through an
`Exchange`, and the estimate that comes back is written to ``p.grad``
(`lightning_byz.strategies.gradient_exchange`). Hooks, clipping, the optimizer and its schedule are
the user's, untouched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_byz.algorithms import Algorithm
from lightning_byz.data.batches import batch_size
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.simulation import HONEST, Honest, Simulation
from lightning_byz.strategies import resuming_with_others
from lightning_byz.strategies.checkpoint import CHECKPOINT_KEY, collect, restore
from lightning_byz.strategies.extra_gradients import TrustedData
from lightning_byz.strategies.gradient_exchange import exchange_gradients, loss_scaler
from lightning_byz.strategies.gradient_sync import (
    GradientGroup,
    GradientSync,
    gradient_groups,
)
from lightning_byz.strategies.local_steps import LocalSteps, OuterOptimizer
from lightning_byz.strategies.log_lines import show_log
from lightning_byz.strategies.mesh_processes import MeshProcesses
from lightning_byz.strategies.model_hooks import ModelHooks
from lightning_byz.strategies.model_shards import ModelShards
from lightning_byz.strategies.overlap import may_overlap
from lightning_byz.strategies.phases import PhaseSync, first_callback
from lightning_byz.strategies.processes import Processes, TorchProcesses
from lightning_byz.strategies.reductions import MetricReducer
from lightning_byz.strategies.resolve import (
    resolve_algorithm,
    resolve_shares,
    resolve_transport,
)
from lightning_byz.strategies.round_report import RoundReport
from lightning_byz.strategies.server_processes import ServerProcesses
from lightning_byz.strategies.sync import Sync
from lightning_byz.strategies.validate import check_arguments, check_local_steps, check_setup
from lightning_byz.strategies.validate_shards import check_sizes
from lightning_byz.strategies.workers import LocalWorkers, NoBatch
from lightning_byz.strategies.workers_at_once import Vectorize, local_workers
from lightning_byz.transports import Transport


class RobustStrategy(ModelHooks):
    """Robust aggregation of the workers' gradients, in place of DDP's all-reduce.

    All of ByzantineRobustStrategy but its Lightning base class (see `lightning_byz.lightning` and
    `.pytorch_lightning`). The arguments ``accelerator``, ``parallel_devices``,
    ``cluster_environment``, ``checkpoint_io``, ``precision_plugin``, ``process_group_backend``,
    ``timeout`` and ``start_method`` are those of Lightning's DDPStrategy. Its other arguments
    (``find_unused_parameters``, ...) are taken, and answered with one warning that says that they
    are not needed.

    Args:
        algorithm: what workers send and what is made of it. None:
            ``RobustSGD(ByHeterogeneity(), worker_momentum=0.9, undo_worker_momentum=True)``,
            uncompressed; with one or two workers, a plain mean without momentum.
        transport: how messages travel. None: `InProcess` for one process; for several, `Sharded`,
            or `AllGather` where that is faster: for gradients of up to a megabyte, and for sparse
            messages whose answer is dense.
        workers_per_process: workers that one process simulates; each gets its part of every batch.
            The run has n = processes x workers_per_process workers.
        num_byzantine: f, the number of Byzantine workers to tolerate. None: the most that the rule
            allows, up to max(1, (n - 1) // 3) for n >= 3.
        seed: seed of the package's own random streams (compressors, attacks, dropout). None: the
            seed that ``seed_everything`` set, or 0.
        worker_weights: n positive numbers, how much of the data each worker holds, such as its
            number of samples; in the order of workers (process by process). Rules that can
            (CoordinateMedian, GeometricMedian, Mean) weigh its row by it; others refuse. It is
            yours to say, never a worker's. None: all alike, as in DDP.
        trusted_data: samples that no worker can have touched, for algorithms that compare with a
            gradient on them (DStar): a DataLoader over a map-style dataset, of which every step
            draws a batch; a small dataset, which is one batch; or a batch. Rank 0 computes the
            gradient; the other ranks need no data, but an argument.
        max_skipped_steps: steps in a row that may be skipped because too few workers gave a finite
            gradient, before training stops with an error.
        aggregated_buffers: names of buffers, or patterns such as ``"*.mean"``, that are statistics
            as BatchNorm's are: their coordinate-wise median over the workers is taken. Other
            buffers than those of torch's batch and instance normalization are data (queues, memory
            banks): those of worker 0, or of the next one where 0 is silent.
        resume_workers: for a checkpoint of a run with other workers: whose state of that run worker
            0, 1, ... of this one goes on with; None, and workers beyond the list, are new.
            ``[0, 2, 3]`` resumes without worker 1. None: every worker goes on with the state of its
            own number.
        vectorize: whether the workers of a process are computed in one pass (`WorkersAtOnce`).
            "auto": where that pays and gives the same gradients, to rounding; the log says whether,
            and why not. True: an error where it cannot be; random operations, such as dropout, then
            draw other numbers than with False. False: one worker after the other.
        local_steps: steps that each worker takes on its own between exchanges (`LocalSteps`). The
            algorithm then aggregates how far the workers have come in place of gradients. None:
            gradients are exchanged in every step.
        outer_optimizer: makes, of the parameters, the optimizer that steps on the aggregate of
            local steps. None: that of DiLoCo, SGD with learning rate 0.7 and Nesterov momentum 0.9.
        data_parallel_size: S, for modules that shard themselves in ``configure_model``, as for
            Lightning's ModelParallelStrategy: ``self.device_mesh`` has the dimensions
            "data_parallel" and "tensor_parallel". A worker is a replica of the model, which S x T
            processes hold together: n = processes / (S x T). The S ranks compute different samples,
            and torch reduces their gradients inside of the replica. None: 1; without
            `tensor_parallel_size` either, every process holds a whole model.
        tensor_parallel_size: T, the ranks that compute the same samples together. None: 1.
        save_distributed_checkpoint: of a sharded model: checkpoints are folders into which every
            rank of the first replica writes its part. False: files with whole tensors.
    """

    save_patience = 60.0
    """Seconds that rank 0 waits with a checkpoint where others may come or not (`StoreBarrier`)."""

    # of the Lightning package that the subclass belongs to
    _launchers: Any
    _callback: type

    def __init__(
        self,
        algorithm: Algorithm | None = None,
        transport: Transport | None = None,
        workers_per_process: int = 1,
        num_byzantine: int | None = None,
        seed: int | None = None,
        worker_weights: Sequence[float] | None = None,
        trusted_data: Any = None,
        max_skipped_steps: int = 10,
        aggregated_buffers: Sequence[str] = (),
        resume_workers: Sequence[int | None] | None = None,
        vectorize: Vectorize = "auto",
        local_steps: int | LocalSteps | None = None,
        outer_optimizer: OuterOptimizer | None = None,
        data_parallel_size: int | None = None,
        tensor_parallel_size: int | None = None,
        save_distributed_checkpoint: bool = True,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **of_ddp: Any,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        show_log()
        check_arguments(
            algorithm,
            transport,
            workers_per_process,
            num_byzantine,
            max_skipped_steps,
            worker_weights,
            aggregated_buffers,
            vectorize,
            of_ddp,
        )
        resuming_with_others.check_argument(resume_workers)
        self.algorithm, self.transport = algorithm, transport
        self.workers_per_process, self.num_byzantine = workers_per_process, num_byzantine
        self.seed, self.worker_weights = seed, worker_weights
        self.trusted_data = None if trusted_data is None else TrustedData(trusted_data)
        self.max_skipped_steps = max_skipped_steps
        self.aggregated_buffers = tuple(aggregated_buffers)
        self.resume_workers, self.vectorize = resume_workers, vectorize
        self.local_steps = LocalSteps.of(local_steps, outer_optimizer)
        self.outer_optimizer = outer_optimizer
        self._num_nodes, self._process_group_backend = 1, process_group_backend
        self._timeout, self._start_method = timeout, start_method

        at_server = transport is not None and transport.connects_processes
        self.processes: Processes = (ServerProcesses if at_server else TorchProcesses)(self)
        self.shards = None
        if data_parallel_size is not None or tensor_parallel_size is not None:
            data = 1 if data_parallel_size is None else data_parallel_size
            tensor = 1 if tensor_parallel_size is None else tensor_parallel_size
            check_sizes(data, tensor, workers_per_process, transport)
            self.processes = MeshProcesses(self, data, tensor)
            self.shards = ModelShards(self, save_distributed_checkpoint)
        self.simulation: Honest = HONEST
        self.report = RoundReport(max_skipped_steps)
        self.resolved: Algorithm | None = None
        self.sync: Sync | None = None
        self.local_workers: LocalWorkers | None = None
        self.groups: list[GradientGroup] = []
        self.exchanges: list[Exchange] = []
        self._reducer = MetricReducer()
        self._shown = ExitStack()  # for the time of a validation
        self._resumed_from: Any = None

    # -- the beginning and the end -----------------------------------------------------------------

    def teardown(self) -> None:
        self._shown.close()
        self._watch(None)
        self.processes.leave()
        super().teardown()

    def setup(self, trainer: Any) -> None:
        """Checks that all settings fit together, then gives every process the same model.

        Nothing is wrapped.
        """
        fitting, processes = trainer.state.fn == "fit", self.processes
        if fitting:
            self.resolved = resolve_algorithm(
                self.algorithm,
                self.num_byzantine,
                processes.replicas,
                self.workers_per_process,
                self.local_steps,
            )
        super().setup(trainer)
        module = self.lightning_module
        if processes.size > 1:
            processes.share_model(module)
        if not fitting:
            return
        assert module is not None and self.resolved is not None
        if self.n > 1:
            check_setup(self, trainer, self.resolved)
        local = self.local_steps
        if local is not None:
            check_local_steps(self, trainer, self.resolved)
        transport = resolve_transport(self)
        overlap = may_overlap(self, transport)
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        shares = resolve_shares(self.worker_weights, self.resolved, self.n, self.root_device)
        drawn = None if local is None else local.participants
        exchange = partial(Exchange, self.resolved, transport, seed, shares, participants=drawn)
        self._watch(None)
        alone = self.n == 1 or local is not None  # parameters in no optimizer move nowhere then
        self.groups = gradient_groups(module, self.optimizers, exchange, alone, processes.flat)
        self.exchanges = [group.exchange for group in self.groups]
        for each in self.exchanges:
            each.observers.append(partial(self.report.note, exchange=each))
        self.simulation = HONEST
        if local is not None:
            run = partial(exchange_gradients, self)
            self._watch(PhaseSync(self, self.groups, run, local, self.outer_optimizer))
            first_callback(self._callback, trainer)
        elif self.n > 1:
            manual = not module.automatic_optimization
            run = partial(exchange_gradients, self, find_scaler=loss_scaler)
            self._watch(GradientSync(self.groups, run, manual, overlap, self.precision_plugin))
        self.forget()
        self.processes.begin_training(module)

    def _watch(self, sync: Sync | None) -> None:
        """Gradients are exchanged when ``sync`` says; the hooks of the one before are taken off."""
        if self.sync is not None:
            self.sync.remove()
        self.sync = sync

    def forget(self) -> None:
        """Back to before the first step."""
        self.local_workers = local_workers(self, super().training_step)
        self._reducer = MetricReducer()
        self.report.forget()
        if self.sync is not None:
            self.sync.forget()

    def simulate(self) -> Simulation:
        """Where callbacks install simulated faults; made with the first of them, after `setup`."""
        if not isinstance(self.simulation, Simulation):
            self.simulation = Simulation()
            for exchange in self.exchanges:
                exchange.simulation = self.simulation
        return self.simulation

    # -- a step ------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.processes.move_on()  # of those of the step, some begin during backward
        self.processes.begin_batch(batch_idx)

    def batch_to_device(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The batch on this process's device; `NoBatch` where this rank has none.

        So it is silent, and nobody waits for it.
        """
        batch = super().batch_to_device(batch, *args, **kwargs)
        module = self.lightning_module
        if batch is None and module is not None and self.sync is not None and self.is_distributed:
            return NoBatch() if module.trainer.training else batch
        return batch

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Every local worker's training step; what they log is reduced and logged once."""
        if self.sync is None:
            return super().training_step(*args, **kwargs)
        assert self.local_workers is not None
        self.sync.begin_training_step()
        return self.local_workers.training_step(args[0], args[1:], kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Every local worker's backward pass, and the exchange where it ends; then the hooks."""
        if self.sync is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        module, workers = self.lightning_module, self.local_workers
        assert module is not None and workers is not None
        self.pre_backward(closure_loss)
        scaled = self.precision_plugin.pre_backward(closure_loss, module)
        overlap = not module.automatic_optimization or workers.has_loss
        with self.sync.backward(overlap) as groups:
            workers.backward(scaled, groups, optimizer, *args, **kwargs)
        workers.hear()
        closure_loss = self.precision_plugin.post_backward(scaled, module)
        self.post_backward(closure_loss)
        return closure_loss

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, gradients add up locally: micro-batches, and
        ``toggle_model(sync_grad=False)``.
        """
        if self.sync is None:
            yield
            return
        with self.sync.blocking():
            yield

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """The user's. In automatic optimization its closure returns the median of all workers'
        losses.
        """
        if self.sync is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self.local_workers is not None
        take = partial(super().optimizer_step, model=model, **kwargs)
        return self.sync.optimizer_step(optimizer, self.local_workers.agreed(closure), take)

    def on_train_end(self) -> None:
        super().on_train_end()
        if self.sync is not None:
            self.sync.end_training()
        self.processes.move_on()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self.processes.note_validated(batch_size(args[0]) or 1)
        return super().validation_step(*args, **kwargs)

    def show_start(self) -> None:
        """Until the end of the validation the module has what all workers have in common."""
        if self.sync is not None:
            self._shown.enter_context(self.sync.showing_start())

    def on_validation_end(self) -> None:
        self._shown.close()
        super().on_validation_end()
        self.processes.end_validation()

    # -- checkpoints -------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What all workers have in common."""
        with nullcontext() if self.sync is None else self.sync.showing_start():
            state: dict[str, Any] = super().lightning_module_state_dict()
        return state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Adds the algorithm's state, and every process's random state, to the ordinary
        checkpoint.
        """
        if self.processes.begin_checkpoint(checkpoint, filepath):
            if self.exchanges and "optimizer_states" in checkpoint:
                checkpoint[CHECKPOINT_KEY] = collect(self, filepath)
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        snapshot = self.processes.snapshot(checkpoint_path)
        if snapshot is not None:
            return snapshot
        self._resumed_from = checkpoint_path
        return dict(super().load_checkpoint(checkpoint_path, *args, **kwargs))

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.sync is not None:
            self.sync.remove_files(filepath)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self.exchanges:
            restore(self, checkpoint.get(CHECKPOINT_KEY), self._resumed_from)

    def followed(self, before: int) -> resuming_with_others.Followed:
        """For each worker of this run, the one of a run with ``before`` workers that it follows.

        It goes on with that one's state. None: it is new.
        """
        return resuming_with_others.followed(self.resume_workers, before, self.n)


def is_robust(strategy: Any) -> bool:
    """Whether a strategy is a ByzantineRobustStrategy, of either Lightning package."""
    return isinstance(strategy, RobustStrategy)
