"""ByzantineRobustStrategy: Lightning's training loop on one side, a round of a robust algorithm on the other. Glue only.

The seam is the end of `Strategy.backward`, where DDP's gradients are reduced (`lightning_byz.strategies.gradient_sync`). There the local workers'
gradients go through `Exchange`, and the estimate that comes back is written to ``p.grad``. Hooks, clipping, the optimizer and its
schedule are the user's, untouched.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from lightning_byz.algorithms import Algorithm, ByzEF21SGDM, ByzVRMarinaPP, DStar, SignSGDMajorityVote
from lightning_byz.compressors import Field
from lightning_byz.data.batches import BatchSplitter, batch_size
from lightning_byz.engine.exchange import NO_LOSS, Contribution, Exchange, Outcome, comes
from lightning_byz.strategies import random_states, resuming
from lightning_byz.strategies.buffers import WorkerBuffers, shared_tensors
from lightning_byz.strategies.extra_gradients import (
    MeanGradient,
    Pass,
    QuietPasses,
    TrustedData,
    parameters_at,
    random_states_kept,
    whole_data,
)
from lightning_byz.strategies.few_users import FewUsers, described
from lightning_byz.strategies.flat_parameters import FlatParameters
from lightning_byz.strategies.gradient_sync import GradientGroup, GradientSync, gradient_groups, may_repeat, parameters_of
from lightning_byz.strategies.logs import Call, StepLogs, WorkerLog
from lightning_byz.strategies.outputs import joined
from lightning_byz.strategies.overlap import obstacle
from lightning_byz.strategies.reductions import is_finite, over_finite, reduction
from lightning_byz.strategies.resolve import default_transport, explain_transport, resolve_algorithm
from lightning_byz.strategies.server_processes import ServedRun, surviving_launcher
from lightning_byz.strategies.store_barrier import RollCall, roll_call
from lightning_byz.strategies.validate import UnsupportedSetupError, check_arguments_of_ddp, check_setup, explain_one_sample
from lightning_byz.strategies.validate import warn as _warn
from lightning_byz.strategies.worker_attributes import ChangesByHand, WorkerAttributes
from lightning_byz.transports import ParameterServer, Sharded, Transport
from lightning_byz.transports.meeting import meeting
from lightning_byz.transports.wire import pack, packed_size, unpack
from lightning_byz.types import Gradients, Round

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy as _Base
else:
    _Base = object

log = logging.getLogger("lightning_byz")

CHECKPOINT_KEY = "lightning_byz"

NAMED_STRATEGIES: dict[str, dict[str, Any]] = {
    "byzantine_robust": {"description": "Robust aggregation in place of DDP's all-reduce: survives workers that send garbage"},
    "byz_ef21_sgdm": {"algorithm": ByzEF21SGDM(), "description": "Byz-EF21-SGDM: robust, a tenth of the coordinates on the wire"},
    "dstar": {"algorithm": DStar(), "description": "dSTAR: robust, waits for the first n - f workers only"},
    "byz_vr_marina_pp": {
        "algorithm": ByzVRMarinaPP(),
        "description": "Byz-VR-MARINA-PP: robust, variance-reduced, clipped differences",
    },
    "byzantine_robust_find_unused_parameters_true": {"description": "The same as byzantine_robust, which needs no such flag"},
    "signsgd_majority_vote": {"algorithm": SignSGDMajorityVote(), "description": "SIGNUM: one bit a coordinate in both directions"},
}
"""What ``Trainer(strategy=NAME)`` stands for: arguments of the strategy."""


class TooFewGradientsError(RuntimeError):
    """More steps in a row than ``max_skipped_steps`` allows had too few finite gradients: training has diverged."""


class NoBatch:
    """Stands for the batch of a rank whose data loader gave None, as a ``collate_fn`` may."""


class RobustStrategy(_Base):
    """Robust aggregation of the workers' gradients, in place of DDP's all-reduce.

    All of ByzantineRobustStrategy but its Lightning base class (see `lightning_byz.lightning` and `.pytorch_lightning`). The arguments
    ``accelerator``, ``parallel_devices``, ``cluster_environment``, ``checkpoint_io``, ``precision_plugin``, ``process_group_backend``,
    ``timeout`` and ``start_method`` are those of Lightning's DDPStrategy. Its other arguments (``find_unused_parameters``, ...) are taken,
    and answered with one warning that says that they are not needed.

    Args:
        algorithm: what workers send and what is made of it. None: ``RobustSGD(worker_momentum=0.9, undo_worker_momentum=True)``,
            which is CAF, uncompressed; with one or two workers, a plain mean without momentum.
        transport: how messages travel. None: `InProcess` for one process; for several, `Sharded`, or `AllGather` where that is faster: for
            gradients of up to a megabyte, and for sparse messages whose answer is dense.
        workers_per_process: workers that one process simulates; each gets its part of every batch. The run has
            n = processes x workers_per_process workers.
        num_byzantine: f, the number of Byzantine workers to tolerate. None: the most that the rule allows, up to
            max(1, (n - 1) // 3) for n >= 3.
        seed: seed of the package's own random streams (compressors, attacks, dropout). None: the seed that ``seed_everything``
            set, or 0.
        worker_weights: n positive numbers, how much of the data each worker holds, such as its number of samples; in the order of workers
            (process by process). Rules that can (CoordinateMedian, GeometricMedian, Mean) weigh its row by it; others refuse. It is
            yours to say, never a worker's. None: all alike, as in DDP.
        trusted_data: samples that no worker can have touched, for algorithms that compare with a gradient on them (DStar): a
            DataLoader over a map-style dataset, of which every step draws a batch; a small dataset, which is one batch; or a batch.
            Rank 0 computes the gradient; the other ranks need no data, but an argument.
        max_skipped_steps: steps in a row that may be skipped because too few workers gave a finite gradient, before training
            stops with an error.
        aggregated_buffers: names of buffers, or patterns such as ``"*.mean"``, that are statistics as BatchNorm's are: their
            coordinate-wise median over the workers is taken. Other buffers than those of torch's batch and instance
            normalization are data (queues, memory banks): those of worker 0, or of the next one where 0 is silent.
        resume_workers: for a checkpoint of a run with other workers: whose state of that run worker 0, 1, ... of this one goes on
            with; None, and workers beyond the list, are new. ``[0, 2, 3]`` resumes without worker 1. None: every worker goes on
            with the state of its own number.
    """

    roll_call_patience = 60.0
    """Seconds that rank 0 waits with a checkpoint where others may come or not (`RollCall`)."""

    _launchers: Any  # the launchers of the Lightning package that the subclass belongs to

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
        check_arguments_of_ddp(of_ddp)
        if algorithm is not None and not isinstance(algorithm, Algorithm):
            raise TypeError(
                f"`algorithm` should be an Algorithm, such as RobustSGD(aggregator=TrimmedMean()). Found {algorithm!r}."
            )
        if transport is not None and not isinstance(transport, Transport):
            raise TypeError(f"`transport` should be a Transport, such as AllGather(). Found {transport!r}.")
        for name, value, least in (
            ("workers_per_process", workers_per_process, 1),
            ("num_byzantine", num_byzantine, 0),
            ("max_skipped_steps", max_skipped_steps, 0),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"`{name}` should be an integer of at least {least}. Found {name}={value!r}.")
        self.algorithm = algorithm
        self.transport = transport
        self.workers_per_process = workers_per_process
        self.num_byzantine = num_byzantine
        self.seed = seed
        if worker_weights is not None and not all(0 < float(weight) < float("inf") for weight in worker_weights):
            raise ValueError(f"`worker_weights` should be positive numbers, one for each worker. Found {list(worker_weights)}.")
        self.worker_weights = worker_weights
        self.trusted_data = None if trusted_data is None else TrustedData(trusted_data)
        self.max_skipped_steps = max_skipped_steps
        self.aggregated_buffers = tuple(aggregated_buffers)
        resuming.check_argument(resume_workers)
        self.resume_workers = resume_workers

        self._num_nodes = 1
        self._world_size: int | None = None
        self._group_of_one = False
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._start_method = start_method

        self._served = ServedRun(self, transport) if isinstance(transport, ParameterServer) else None
        self._roll_call: RollCall | None = None
        self._saved_alone = False
        self.sync: GradientSync | None = None
        self.groups: list[GradientGroup] = []
        self.exchanges: list[Exchange] = []
        self.silences: dict[int, int] = {}
        """How often each worker's message did not count, since the run began."""
        self.data_attacks: list[Callable[[int, int, Any], Any]] = []
        """(worker, step, batch) -> batch; installed by callbacks that simulate faults."""
        self.liars: list[Callable[[int], Sequence[int]]] = []
        """step -> the workers that lie in it; installed by callbacks that simulate faults."""
        self.delays: list[Callable[[int], Tensor]] = []
        """step -> ``[n]`` the seconds by which each worker is late in it, inf for ever; installed by callbacks that simulate faults."""
        self._forget()

    def _forget(self) -> None:
        """Back to before the first step."""
        self._micro_step = 0
        self._skipped_in_a_row = 0
        self._told_no_loss = False
        self._losses: list[Tensor | None] = [None] * self.workers_per_process
        self._scale_probe: Tensor | None = None
        self._step_logs = StepLogs()
        self._logged: set[str] = set()
        self._weighed: _Weighed | None = None
        self._few_users = FewUsers()
        self._buffers: WorkerBuffers | None = None
        self._attributes: WorkerAttributes | None = None
        self._splitter: BatchSplitter | None = None
        if self.sync is not None:
            self.sync.forget()
        self._forget_passes()

    def _forget_passes(self) -> None:
        """Back to before a round's first forward pass."""
        self._previous: list[Pass | None] | None = None
        self._full: list[Pass | None] | None = None
        self._trusted: Tensor | None = None

    # -- processes ----------------------------------------------------------------------------------------------------

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Number of processes on this machine."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 1

    @property
    def _world(self) -> int:
        """Number of processes of the run: what the cluster environment says, once it has been told ours."""
        return self.num_nodes * self.num_processes if self._world_size is None else self._world_size

    @property
    def n(self) -> int:
        """Number of workers of the run."""
        return self._world * self.workers_per_process

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning is to give every process its own part of the data."""
        return self._world > 1

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self._world, "rank": self.global_rank}

    @property
    def process_group_backend(self) -> str | None:
        """Backend of torch.distributed."""
        return self._process_group_backend

    def set_world_ranks(self) -> None:
        """Tells the cluster environment, and everything that logs on rank 0 only, which rank this is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
            self._world_size = self.cluster_environment.world_size()  # whoever has started the processes knows better
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self._world == 1:
            self._launcher = None  # one process needs none, and so works in a notebook
        elif self._served is not None:
            if self._start_method != "popen":
                raise UnsupportedSetupError(
                    f"On a parameter server processes start with popen, so that each may die alone. Found start_method={self._start_method!r}. "
                    "Leave it out."
                )
            self._launcher = surviving_launcher(self._launchers._SubprocessScriptLauncher, self._served)
        elif self._start_method == "popen":
            self._launcher = self._launchers._SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = self._launchers._MultiProcessingLauncher(self, start_method=self._start_method)

    def setup_environment(self) -> None:
        super().setup_environment()
        if self._world > 1:
            self._connect_processes()
        elif not dist.is_initialized():  # for samplers and code of the project's own that ask for a rank
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
            self._group_of_one = True
            # Lightning takes any process group for several processes, and asks for sync_dist=True.
            warnings.filterwarnings("ignore", r"It is recommended to use `self\.log")
        if dist.is_initialized() and dist.get_world_size() != self._world:
            raise UnsupportedSetupError(
                f"The run should have as many processes as torch.distributed's process group. Found {self._world} (Trainer(num_nodes="
                f"{self.num_nodes}, devices={self.num_processes}), cluster environment {type(self.cluster_environment).__name__}) and "
                f"a group of {dist.get_world_size()}. Give the Trainer the devices and nodes of the whole group, or a cluster "
                "environment that knows its world_size."
            )

    def _connect_processes(self) -> None:
        random_states.reset()
        self.set_world_ranks()
        environment = self.cluster_environment
        assert environment is not None
        if self._served is not None:
            self._served.assemble()
            return
        if self._process_group_backend is None:
            self._process_group_backend = "nccl" if self.root_device.type == "cuda" else "gloo"
        if not dist.is_initialized():
            os.environ["MASTER_ADDR"] = environment.main_address
            os.environ["MASTER_PORT"] = str(environment.main_port)
            dist.init_process_group(
                self._process_group_backend,
                rank=environment.global_rank(),
                world_size=environment.world_size(),
                timeout=self._timeout,
                device_id=self.root_device if self.root_device.type == "cuda" else None,
            )
            atexit.register(_leave_process_group)
        meeting()
        self._roll_call = roll_call(environment.main_address, self._timeout or timedelta(minutes=30))

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def teardown(self) -> None:
        vars(self.precision_plugin).pop("clip_gradients", None)
        fresh_starts = sum(group.fresh_starts for group in self.groups)
        if self.sync is not None and fresh_starts > 1:
            log.warning(f"The algorithm's state has started afresh {fresh_starts} times: so often the trained parameters changed.")
        self._drop_sync()
        if self._served is not None:
            self._served.leave(self._interrupted())
        if self._group_of_one and dist.is_initialized():
            dist.destroy_process_group()
        self._group_of_one = False
        super().teardown()

    def _drop_sync(self) -> None:
        """Takes the hooks off parameters and optimizers."""
        if self.sync is not None:
            self.sync.remove()
        self.sync = None

    # -- set-up -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Checks that all settings fit together, then gives every process the same model. Nothing is wrapped."""
        fitting = trainer.state.fn == "fit"
        if fitting:
            self._resolved = resolve_algorithm(self.algorithm, self.num_byzantine, self._world, self.workers_per_process)
        super().setup(trainer)
        if self._world > 1:
            self._share_model()
        if not fitting:
            return
        if self.n > 1:
            check_setup(self, trainer, self._resolved)
        layouts = [FlatParameters([p for p in parameters_of(optimizer) if p.requires_grad]) for optimizer in self.optimizers]
        largest = max((layout.dim * layout.dtype.itemsize for layout in layouts), default=0)
        transport = self.transport or default_transport(self._resolved, self._world, largest)
        transport.connect(self.global_rank, self._world, self.workers_per_process, self.root_device)
        explain_transport(self._resolved, transport)
        may_overlap = self._decide_overlap(transport)
        self._drop_sync()
        seed, shares = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed, self._shares()
        self.groups = gradient_groups(
            self.lightning_module, self.optimizers, lambda i, name: Exchange(self._resolved, transport, seed + i, shares, name), self.n == 1
        )
        self.exchanges = [group.exchange for group in self.groups]
        for exchange in self.exchanges:
            exchange.observers.append(self._note_silence)
            exchange.liars = self.liars_at
            exchange.arrivals = self.arrivals_at
        self.data_attacks.clear()
        self.liars.clear()
        self.delays.clear()
        assert self.lightning_module is not None
        if self.n > 1:
            self.sync = GradientSync(self.groups, self._exchange, not self.lightning_module.automatic_optimization, may_overlap)
            self._exchange_before_clipping()
        self._forget()
        self._buffers = WorkerBuffers(self.lightning_module, self.workers_per_process, self.aggregated_buffers)
        self._attributes = WorkerAttributes(self.lightning_module, self.workers_per_process)
        if self._served is not None:
            self._served.adopt_metrics(self.lightning_module)

    def _decide_overlap(self, transport: Transport) -> bool:
        """Whether gradients are read during backward, and sent where the algorithm lets them; says why not."""
        if not isinstance(transport, Sharded) or not transport.overlap or self.workers_per_process > 1:
            return False
        reason = obstacle(self.lightning_module, self.precision_plugin)
        whole = None if self._resolved.coordinate_wise else f"{type(self._resolved).__name__} looks at the whole vector"
        why = whole if reason is None else reason
        log.info(
            "byzantine_robust: gradients are exchanged while backward runs."
            if why is None
            else f"byzantine_robust: gradients are exchanged after backward, not during it: {why}."
        )
        return reason is None

    def _shares(self) -> Tensor | None:
        """Every worker's share of the data, ``[n]``. Raises unless the rule can weigh them."""
        if self.worker_weights is None:
            return None
        if len(self.worker_weights) != self.n:
            raise ValueError(
                f"`worker_weights` should hold a number for each of the n={self.n} workers (processes x workers_per_process). Found "
                f"{len(self.worker_weights)}."
            )
        shares = torch.tensor(self.worker_weights, dtype=torch.float64, device=self.root_device)
        self._resolved.aggregator.check_shares(shares)
        return shares / shares.sum()

    @torch.no_grad()
    def _share_model(self) -> None:
        """Rank 0's parameters and buffers for everybody."""
        assert self.lightning_module is not None
        if self._served is not None:
            self._served.share_model(self.lightning_module)
            return
        for tensor in shared_tensors(self.lightning_module):
            shared = tensor.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(shared, src=0)
            if self.global_rank != 0 and not torch.equal(shared, tensor):
                tensor.copy_(shared)

    def _exchange_before_clipping(self) -> None:
        """``clip_gradients`` is to act on the aggregate, where the exchange waits for the step."""
        clip = self.precision_plugin.clip_gradients

        def clip_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            if self.sync is not None:
                self.sync.settle(optimizer)
            clip(optimizer, *args, **kwargs)

        vars(self.precision_plugin)["clip_gradients"] = clip_gradients

    # -- a step: forward and backward ---------------------------------------------------------------------------------

    def _rng_key(self, worker: int) -> tuple[int, int, int]:
        return (self.exchanges[0].seed if self.exchanges else 0, self._micro_step, worker)

    def liars_at(self, step: int) -> set[int]:
        """The workers that are known to lie in a step, in a simulation."""
        return {worker for liars in self.liars for worker in liars(step)}

    def arrivals_at(self, step: int) -> Tensor | None:
        """``[n]`` the seconds after which the workers' messages arrive in a step, in a simulation; liars are the first."""
        if not self.delays:
            return None
        arrivals = torch.stack([delay(step) for delay in self.delays]).sum(0)
        return arrivals.index_fill_(0, torch.tensor(sorted(self.liars_at(step)), dtype=torch.int64), 0.0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._move_on()  # of those of the step, some begin during backward
        if self._served is not None:
            self._served.begin_batch(batch_idx)

    def on_train_end(self) -> None:
        super().on_train_end()
        self._move_on()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._served is not None:
            self._served.validated += batch_size(args[0]) or 1
        return super().validation_step(*args, **kwargs)

    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self._served is not None:
            self._served.say_how_many_were_validated()

    def batch_to_device(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The batch on this process's device; `NoBatch` where this rank has none, so that it is silent and nobody waits for it."""
        batch = super().batch_to_device(batch, *args, **kwargs)
        module = self.lightning_module
        training = self.sync is not None and self._world > 1 and module is not None and module.trainer.training
        return NoBatch() if batch is None and training else batch

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Every local worker's training step, on its part of the batch; what they log is reduced and logged once."""
        if self.sync is None:
            return super().training_step(*args, **kwargs)
        self.sync.begin_training_step()
        module, workers, buffers = self.lightning_module, self.exchanges[0].transport.workers, self._buffers
        assert module is not None and buffers is not None
        step = self.exchanges[0].step
        batch, rest = args[0], args[1:]
        buffers.refresh()
        if isinstance(batch, NoBatch):
            parts: list[Any] = [None] * self.workers_per_process
        elif self.workers_per_process == 1:
            parts = [batch]
        else:
            parts = self._batches.split(batch)
            if self._micro_step == 0 and parts[-1] is None:
                raise ValueError(
                    f"The first batch should have at least one sample for each of the {self.workers_per_process} in-process "
                    f"workers. Found {self._batches.size(batch)}. Use a larger batch_size, or a smaller workers_per_process."
                )

        cohort = torch.ones(self.n, dtype=torch.bool)
        if module.automatic_optimization:
            round = self.exchanges[0].next_round(self._x(self.groups[0]))
            assert round.cohort is not None
            cohort = round.cohort & torch.tensor([comes(round, worker) for worker in range(self.n)])
            if self._served is not None and self._served.is_behind:
                parts = [None] * len(parts)  # its round is closed: the result is applied, and nothing computed
            parts = [self._attacked(w, step, part) if cohort[w] else None for w, part in zip(workers, parts, strict=True)]
            self._run_quiet_passes(round, parts, rest, kwargs)
        else:
            parts = [self._attacked(w, step, part) for w, part in zip(workers, parts, strict=True)]

        attributes = self._attributes
        assert attributes is not None
        changes = ChangesByHand(module) if self._micro_step == 0 and self.workers_per_process > 1 else None
        logs: list[WorkerLog] = []
        outputs: list[Any] = []
        for i, (worker, part) in enumerate(zip(workers, parts, strict=True)):
            logs.append(WorkerLog(samples=self._batches.size(part)))
            outputs.append(None)
            if part is None:
                continue
            vars(module)["log"] = logs[-1].record
            try:
                with buffers.of(i), attributes.of(i), self.sync.training_step(), random_states.worker_rng(self.root_device, *self._rng_key(worker)):
                    outputs[-1] = super().training_step(part, *rest, **kwargs)
            except ValueError as error:
                explain_one_sample(error, logs[-1].samples, self.workers_per_process)
                raise
            finally:
                del vars(module)["log"]
            self._name_changes_by_hand(changes)
            changes = None
        attributes.show()

        losses = [output.get("loss") if isinstance(output, Mapping) else output for output in outputs]
        if module.automatic_optimization:
            for worker_log, loss in zip(logs, losses, strict=True):
                worker_log.loss = loss.detach().mean() if isinstance(loss, Tensor) else None
        self._losses = [loss if isinstance(loss, Tensor) else None for loss in losses]

        liars = self.liars_at(step)
        honest = [worker not in liars and bool(cohort[worker]) for worker in range(self.n)]
        honest = honest if any(honest) else cohort.tolist()  # a cohort of liars has nobody else to speak for it
        transport = self.exchanges[0].transport
        trainer = module.trainer
        ends = ", the last one of its epoch" if trainer.is_last_batch and trainer.max_epochs != -1 else ""
        transport.meet(f"training step {self._micro_step}{ends}")
        silenced = set().union(*(exchange.quarantined for exchange in self.exchanges))
        for call in self._step_logs.reduce(logs, transport, honest, self.root_device, silenced):
            self._log_once(call)
        self._micro_step += 1
        if not module.automatic_optimization:
            return outputs[0] if outputs[0] is not None else {}
        return self._step_output(outputs)

    def _name_changes_by_hand(self, changes: ChangesByHand | None) -> None:
        """One warning about what the first worker's first training step has changed that all workers of this process share."""
        names = [] if changes is None else changes.names()
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            _warn(
                f"byzantine_robust: training_step changes {', '.join(names[:3])}{more} by hand. In-process workers (workers_per_process="
                f"{self.workers_per_process}) share it, so that this happens once for each of them in every step. Do it in "
                "on_train_batch_end, or use one worker per process."
            )

    @property
    def _batches(self) -> BatchSplitter:
        """How batches of the present loader are cut among this process's workers."""
        module = self.lightning_module
        assert module is not None
        if self._splitter is None or self._splitter.loader is not module.trainer.train_dataloader:
            by_hand = getattr(module, "split_batch", None)
            self._splitter = BatchSplitter(module.trainer.train_dataloader, self.workers_per_process, by_hand)
        return self._splitter

    def _attacked(self, worker: int, step: int, part: Any) -> Any:
        """A worker's part of the batch, as data attacks leave it; None stays None."""
        for attack in self.data_attacks if part is not None else ():
            part = attack(worker, step, part)
        return part

    @staticmethod
    def _x(group: GradientGroup) -> Tensor:
        """The parameters ``[d]``, where the algorithm looks at their values; else something of their shape."""
        if group.layout is not None and group.exchange.algorithm.needs_drift:
            return group.layout.read_parameters()
        return group.example()

    def _run_quiet_passes(self, round: Round, parts: Sequence[Any], rest: Sequence[Any], kwargs: Any) -> None:
        """The gradients that this round needs besides the minibatch's. They come first, while no worker's graph is alive."""
        exchange, layout, module = self.exchanges[0], self.groups[0].layout, self.lightning_module
        algorithm = exchange.algorithm
        if layout is None:
            return
        assert self._buffers is not None and self._attributes is not None
        if self._full is not None or self._previous is not None:
            raise UnsupportedSetupError(
                f"{type(algorithm).__name__} needs one minibatch per optimizer step. Found a second one before the step: gradient "
                "accumulation has been switched on. Leave GradientAccumulationScheduler out."
            )
        passes = QuietPasses(module, self._buffers, self._attributes, self.precision_plugin, self.root_device, super().training_step)
        if self.trusted_data is not None and self._trusted is None:
            self._trusted = self._trusted_gradient(passes, layout, round, rest, kwargs)
        if algorithm.full_gradient(round):
            self._full = self._full_gradients(passes, layout, round, parts, rest, kwargs)
        elif algorithm.needs_previous and round.drift is not None:
            assert exchange.previous is not None
            with random_states_kept(self.root_device), parameters_at(layout, exchange.previous):
                self._previous = [
                    None if part is None else passes.gradient(layout, i, self._rng_key(worker), (part, *rest), kwargs)
                    for i, (worker, part) in enumerate(zip(exchange.transport.workers, parts, strict=True))
                ]

    def _full_gradients(
        self, passes: QuietPasses, layout: FlatParameters, round: Round, parts: Sequence[Any], rest: Sequence[Any], kwargs: Any
    ) -> list[Pass | None]:
        """Every local worker's gradient over its data; None for those that do not take part."""
        exchange, module = self.exchanges[0], self.lightning_module
        assert module is not None and exchange.transport.workers is not None
        trainer, workers = module.trainer, list(exchange.transport.workers)
        limit = exchange.algorithm.full_batches
        if limit is None and (isinstance(trainer.limit_train_batches, int) or trainer.limit_train_batches < 1.0):
            limit = int(trainer.num_training_batches)
        totals = [MeanGradient() for _ in workers]
        if all(part is None for part in parts):
            return [None for _ in workers]
        key, by_hand = (round.seed, round.step), self._batches.by_hand
        with whole_data(trainer.train_dataloader, workers, key, self.root_device, by_hand) as batches:
            for b, batch_of in enumerate(itertools.islice(batches, limit)):
                for i, (worker, batch) in enumerate(zip(workers, batch_of, strict=True)):
                    if batch is None or parts[i] is None:
                        continue
                    batch = self._attacked(worker, round.step, self._to_device(batch))
                    done = passes.gradient(layout, i, (*self._rng_key(worker), 1 + b), (batch, *rest), kwargs)
                    totals[i].add(done, self._batches.size(batch))
        return [total.result() for total in totals]

    def _trusted_gradient(
        self, passes: QuietPasses, layout: FlatParameters, round: Round, rest: Sequence[Any], kwargs: Any
    ) -> Tensor:
        """The gradient on trusted data, at rank 0; elsewhere something of its shape. Nan if the batch gives no loss."""
        if not self.is_global_zero:
            return layout.like().zero_()
        assert self.trusted_data is not None
        key = (round.seed, round.step, self.n)  # no worker has this number
        with random_states_kept(self.root_device):
            batch = self._to_device(self.trusted_data.batch(round.seed, round.step))
            done = passes.gradient(layout, 0, key, (batch, *rest), kwargs)
        return layout.like().fill_(torch.nan) if done is None else done.flat

    def _to_device(self, batch: Any) -> Any:
        """A batch as the training loop hands it to training_step."""
        assert self.lightning_module is not None
        batch = self.precision_plugin.convert_input(batch)
        return self.batch_to_device(self.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0), dataloader_idx=0)

    def _log_once(self, call: Call) -> None:
        """Logs a value that is the same on every rank already."""
        assert self.lightning_module is not None
        if call.name not in self._logged:
            self._logged.add(call.name)
            warnings.filterwarnings(
                "ignore", message=rf"It is recommended to use `self\.log\('{re.escape(call.name)}'.*sync_dist=True"
            )
        self.lightning_module.log(call.name, call.value, **call.kwargs)

    def _step_output(self, outputs: list[Any]) -> Any:
        """What Lightning goes on with: the output of the only worker, or one that stands for all of them."""
        if self.workers_per_process == 1 and outputs[0] is not None:
            return outputs[0]
        # `backward` learns from the probe's gradient by what Lightning and the precision plugin scaled the loss.
        self._scale_probe = torch.zeros((), device=self.root_device, requires_grad=True)
        loss = self._scale_probe + (0.0 if self._step_logs.loss is None else self._step_logs.loss.float())
        extras = [{k: v for k, v in output.items() if k != "loss"} for output in outputs if isinstance(output, Mapping)]
        return {**joined(extras), "loss": loss} if extras else loss

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Every local worker's backward pass, and the exchange where it ends; then the hooks that see gradients."""
        if self.sync is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        module = self.lightning_module
        assert module is not None
        self.pre_backward(closure_loss)
        scaled = self.precision_plugin.pre_backward(closure_loss, module)
        with self.sync.backward(overlap=not module.automatic_optimization or self._losses[0] is not None) as groups:
            if self.workers_per_process == 1:
                self.precision_plugin.backward(scaled, module, optimizer, *args, **kwargs)
            else:
                self._backward_of_workers(scaled, groups, optimizer, *args, **kwargs)
        closure_loss = self.precision_plugin.post_backward(scaled, module)
        self.post_backward(closure_loss)
        return closure_loss

    def _backward_of_workers(
        self, scaled: Tensor, groups: Sequence[GradientGroup], optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """One backward pass after the other, whose gradients are added up in the groups' rows."""
        module = self.lightning_module
        assert module is not None and self.sync is not None and self._buffers is not None and self._scale_probe is not None
        (factor,) = torch.autograd.grad(scaled, self._scale_probe)
        layouts = [group.layout for group in groups if group.layout is not None]
        for group, layout in zip(groups, layouts, strict=True):
            if any(row is not None for row in group.rows) and layout.is_cleared():
                group.rows, group.used = [None] * len(group.rows), [None] * len(group.rows)  # somebody has zeroed the gradients
        for i, loss in enumerate(self._losses):
            if loss is None:
                continue
            for layout in layouts:
                layout.clear_gradients()
            with self._buffers.of(i):
                self.precision_plugin.backward(loss * factor, module, optimizer, *args, **kwargs)
            for group, layout in zip(groups, layouts, strict=True):
                used, before, used_before = layout.used(), group.rows[i], group.used[i]
                if not bool(used.any()) and before is None:
                    continue
                if before is None:
                    group.rows[i] = layout.read_gradients(out=layout.rows(self.workers_per_process)[i])
                else:
                    before.add_(layout.read_gradients())
                group.used[i] = used if used_before is None else used_before | used
        self._losses = [None] * self.workers_per_process
        for group in groups if self.sync.blocked else ():
            self._show_mean(group)

    @staticmethod
    def _show_mean(group: GradientGroup) -> None:
        """Until the exchange, ``p.grad`` is the mean of this process's workers, for hooks that look at it."""
        here = [i for i, row in enumerate(group.rows) if row is not None]
        used = [used for used in group.used if used is not None]
        assert group.layout is not None
        if here:
            rows = group.layout.rows(len(group.rows))
            mean = (rows if len(here) == len(rows) else rows[here]).mean(0)
            group.layout.write_gradients(mean, torch.stack(used).any(0).tolist(), views=True)
        group.local = {id(p) for p in group.layout.parameters if p.grad is not None}

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, gradients add up locally: micro-batches, and ``toggle_model(sync_grad=False)``."""
        if self.sync is None:
            yield
            return
        with self.sync.blocking():
            yield

    # -- a step: the exchange -----------------------------------------------------------------------------------------

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """The user's optimizer step. In automatic optimization its closure returns the median of all workers' losses."""
        if self.sync is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        automatic = self.lightning_module is not None and self.lightning_module.automatic_optimization

        def agreed() -> Any:
            loss = closure()
            return loss if loss is None or self._step_logs.loss is None or not automatic else self._step_logs.loss.to(loss)

        with self.sync.stepping():
            evaluate = self.sync.step(optimizer, agreed, may_repeat(optimizer))
            return super().optimizer_step(optimizer, evaluate, model, **kwargs)

    def _contributions(self, group: GradientGroup, unscale: float) -> list[Contribution]:
        layout = group.layout
        assert self._buffers is not None and layout is not None
        contributions = []
        for i in range(self.workers_per_process):
            if self.workers_per_process == 1:
                flat, used = self._only_gradient(group, layout, unscale)
            else:
                row, row_used = group.rows[i], group.used[i]
                flat = None if row is None else row * unscale if unscale != 1 else row
                used = torch.zeros(len(layout.parameters), dtype=torch.bool) if row_used is None else row_used
            grads, used = self._gradients(i, flat, used) if group is self.groups[0] else (None if flat is None else Gradients(flat), used)
            touched = torch.cat([used, self._buffers.changed(i)]).to(self.root_device)
            contributions.append(Contribution(grads, touched))
        return contributions

    @staticmethod
    def _only_gradient(group: GradientGroup, layout: FlatParameters, unscale: float) -> tuple[Tensor | None, Tensor]:
        """The gradient of a process's only worker, None if there is none, and the parameters that have one."""
        if group.overlap is not None and group.overlap.began:
            used = group.overlap.used()
            return group.overlap.gradient(), used
        used = layout.used()
        if not bool(used.any()):
            return None, used
        return layout.read_gradients(unscale, out=layout.rows(1)[0]), used

    def _gradients(self, i: int, flat: Tensor | None, used: Tensor) -> tuple[Gradients | None, Tensor]:
        """What the i-th local worker's half of the algorithm is given, and the parameters that its losses used."""
        if flat is None or (self._full is None and self._previous is None):
            return None if flat is None else Gradients(flat), used
        extra = (self._previous if self._full is None else self._full)[i]  # type: ignore[index]
        if extra is None:
            return None, used
        return Gradients(flat, extra.flat) if self._full is None else Gradients(extra.flat), used | extra.used

    def _scaler(self) -> Any:
        """What scales the loss: the precision plugin's, or in manual optimization one that the module has."""
        module = self.lightning_module
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is None and module is not None and not module.automatic_optimization:
            scaler = next((value for value in vars(module).values() if isinstance(value, torch.amp.GradScaler)), None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _exchange(self, group: GradientGroup) -> None:
        """From the local workers' gradients to the estimate in ``p.grad``."""
        layout, exchange = group.layout, group.exchange
        assert layout is not None
        scaler = self._scaler()
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        # This may run inside of the precision plugin's autocast, which is not for aggregation.
        with torch.autocast(self.root_device.type, enabled=False):
            contributions = self._contributions(group, 1 / scale)
            self._move_on()
            outcome = exchange.run(contributions, self._x(group), self._trusted if group is self.groups[0] else None)

        parameters, f = len(layout.parameters), outcome.rule.f or 0
        overflow = scale > 1.0 and len(outcome.silent) > f
        group.poisoned = overflow or (outcome.estimate is None and scaler is not None)
        if overflow:
            layout.poison_gradients()
        elif outcome.estimate is None:
            # A loss scaler wants to see a gradient for every step; an inf makes it skip this one.
            layout.poison_gradients() if scaler is not None else layout.clear_gradients()
        else:
            views = not exchange.transport.measured  # a server may still be sending the estimate
            layout.write_gradients(outcome.estimate, outcome.used[:parameters].tolist(), scale, views)
            wanted = [contribution.used[:parameters] for contribution in contributions]
            unmoved = self._few_users.observe(layout.parameters, wanted, outcome.used[:parameters])
            if unmoved and self.lightning_module is not None:
                # on the rank whose workers use them
                warnings.warn(described(unmoved, self.lightning_module, f), stacklevel=2)
        assert self._buffers is not None and outcome.round.present is not None
        self._buffers.merge(exchange.transport, outcome.used[parameters:], outcome.round.present, f)
        group.rows, group.used = [None] * len(group.rows), [None] * len(group.rows)
        self._forget_passes()
        self._count_skips(outcome, overflow)

    def _count_skips(self, outcome: Outcome, overflow: bool) -> None:
        if overflow:
            return
        if outcome.estimate is not None:
            self._skipped_in_a_row = 0
            return
        if outcome.reason == NO_LOSS:
            if not self._told_no_loss:
                log.info(f"byzantine_robust: step {outcome.round.step} is skipped, and so are later ones like it. {NO_LOSS}")
            self._told_no_loss = True
            return
        self._skipped_in_a_row += 1
        _warn(f"byzantine_robust: step {outcome.round.step} is skipped. {outcome.reason}")
        if self._skipped_in_a_row > self.max_skipped_steps:
            raise TooFewGradientsError(
                f"{self._skipped_in_a_row} steps in a row had too few finite gradients (max_skipped_steps="
                f"{self.max_skipped_steps}). {outcome.reason} Silent in the last one: workers {outcome.silent}. Look for nan or "
                "inf in their data or losses, or lower the learning rate."
            )

    def _note_silence(self, outcome: Outcome) -> None:
        for worker in outcome.silent:
            count = self.silences[worker] = self.silences.get(worker, 0) + 1
            if count in (1, 10, 100, 1000, 10_000, 100_000):
                came = comes(outcome.round, worker)
                why = self.exchanges[0].transport.why_silent(worker) if came else "did not come"
                _warn(
                    f"byzantine_robust: worker {worker} {why} in step {outcome.round.step}; the step "
                    f"went on without it. This was time {count}."
                )

    # -- collectives that Lightning asks for --------------------------------------------------------------------------

    def _interrupted(self) -> bool:
        """Whether this rank is on its way out, so that the others may not follow it into a collective."""
        module = self.lightning_module
        trainer = None if module is None else getattr(module, "_trainer", None)
        return trainer is not None and bool(trainer.interrupted)

    def _alone(self) -> bool:
        """Whether this rank may not enter a collective: there is no other rank, or they cannot be expected to follow."""
        if self._served is not None:
            return self._served.is_alone or self._interrupted()
        return self._world == 1 or not dist.is_initialized() or self._interrupted()

    @contextmanager
    def _met(self, place: str, group: Any = None) -> Iterator[None]:
        """A collective inside: all ranks are at it, or an error says where they are."""
        if self._alone() or group not in (None, dist.group.WORLD):
            yield
            return
        self._move_on()
        ranks = meeting()
        ranks.begin(place)
        ranks.join()
        with ranks.naming_lost_ranks():
            yield

    def _move_on(self) -> None:
        """This rank goes on to something that all ranks do: those that wait with a checkpoint learn that it has passed their place."""
        if self._roll_call is not None:
            self._roll_call.move_on()

    def barrier(self, name: str | None = None) -> None:
        if self._alone():
            return
        if name == "Trainer.save_checkpoint" and self._saved_alone:
            self._saved_alone = False
            return
        if self._served is not None:
            self._served.barrier(name)
            return
        with self._met(f"barrier {name}"):
            dist.barrier(device_ids=[self.root_device.index] if dist.get_backend() == "nccl" else None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """An object of rank ``src``, which is one of the run's own processes, for everybody."""
        if self._alone():
            return obj
        if self._served is not None:
            return self._served.broadcast(obj, src)
        objects = [obj]
        with self._met("broadcast"):
            dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces over the ranks, leaving out values that are nan or inf, as long as there are others.

        Lightning reduces a metric's mean in two calls: the sum of the values, then that of their weights, an integer. So the mean of
        an integer right after one of floating-point numbers is over the ranks whose number was finite, and exact.
        """
        if not isinstance(tensor, Tensor) or self._alone():
            return tensor
        how = reduction(reduce_op)
        if how is None:
            raise ValueError(f"`reduce_op` should be one of mean, sum, max, min, product. Found {reduce_op!r}.")
        if self._served is not None:
            received = self._served.gather(tensor)
        else:
            received = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
            with self._met("reduce", group):
                dist.all_gather(received, tensor.contiguous(), group=group)
        values = torch.stack(received)
        finite, weighed, self._weighed = is_finite(values), self._weighed, None
        if not bool(finite.all()):
            _warn(f"byzantine_robust: {int((~finite).sum())} of {len(received)} values of a reduction were not finite and left out.")
        if how.name != "mean":
            return over_finite(values, how)
        if values.is_floating_point():
            self._weighed = _Weighed(finite, values.dtype)
        elif weighed is not None and weighed.finite.shape == values.shape:
            total = torch.where(weighed.finite, values, 0).sum(0).double()
            return (total / weighed.finite.sum(0)).to(weighed.dtype)
        return over_finite(values, how)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self._alone():
            return decision
        if self._served is not None:
            return self._served.decide(decision, all)
        with self._met("a decision"):
            return super().reduce_boolean_decision(decision, all=all)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The ranks' tensors, stacked; on a parameter server those of the ranks that are heard."""
        if sync_grads and self.n > 1:
            raise UnsupportedSetupError(
                "all_gather(sync_grads=True) would let each worker into the others' gradients, past the rule. Use sync_grads=False: "
                "the other workers' parts are then constants."
            )
        if self.workers_per_process > 1 and self.sync is not None and self.sync.in_training_step:
            raise UnsupportedSetupError(
                "self.all_gather in training_step would gather the parts of all workers, of which in-process workers (workers_per_process="
                f"{self.workers_per_process}) compute one after the other. Use one worker per process: Trainer(devices=n)."
            )
        if self._served is None:
            if self._world == 1:
                return tensor
            with self._met("all_gather", group):
                return super().all_gather(tensor, group, sync_grads)
        return tensor[None] if self._alone() else torch.stack(self._served.gather(tensor))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Adds the algorithm's state, and every process's random state, to the ordinary checkpoint."""
        if self._served is not None and self._served.takes_snapshot(checkpoint):
            return
        self._saved_alone = not self._all_save(filepath)
        if self.exchanges and "optimizer_states" in checkpoint:
            local = [exchange.worker_states() for exchange in self.exchanges]
            workers, states = self._collected(local)
            server = [exchange.server_state(self._alone() or self._saved_alone) for exchange in self.exchanges]
            checkpoint[CHECKPOINT_KEY] = self.run_state(server, workers, states)
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def run_state(self, server: list[dict[str, Any]], workers: list[dict[int, Any]], states: dict[int, Any]) -> dict[str, Any]:
        """What this strategy adds to a checkpoint: the server's state and the workers', by optimizer, and the ranks' random states."""
        return {
            "version": 1,
            "n": self.n,
            "workers_per_process": self.workers_per_process,
            "algorithm": repr(self._resolved),
            "server": server,
            "workers": workers,
            "rng": states,
            "micro_step": self._micro_step,
            "skipped_in_a_row": self._skipped_in_a_row,
            "silences": dict(self.silences),
            "logged": self._step_logs.state(),
        }

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self._served is not None and checkpoint_path == self._served.snapshot_path:
            return self._served.snapshot()
        return dict(super().load_checkpoint(checkpoint_path, *args, **kwargs))

    def _all_save(self, filepath: Any) -> bool:
        """Whether all ranks are here to save this checkpoint, so that they may enter collectives."""
        if self._alone() or self._roll_call is None:
            return self._served is not None or not self._interrupted()
        absent = self._roll_call.absent(self.roll_call_patience)
        if absent:
            warnings.warn(
                f"Rank {self.global_rank} saves {filepath} without ranks {absent}, which do not "
                "come here. The checkpoint holds the weights, but the algorithm's state at rank 0 "
                "only: a run that resumes from it starts the rest of it afresh. Call "
                "trainer.save_checkpoint on every rank.",
                stacklevel=2,
            )
        return not absent

    def _collected(self, local: list[dict[int, dict[str, Tensor]]]) -> tuple[list[dict[int, Any]], dict[int, Any]]:
        """All workers' states, by optimizer, and all ranks' random states, at rank 0; elsewhere, and alone, this rank's."""
        kept = random_states.snapshot(self.root_device)
        if self._alone() or self._saved_alone:
            return local, {self.global_rank: kept}
        if self._served is not None:
            return self._served.collect_states(local, kept)
        keys = [(i, w, name) for i, states in enumerate(local) for w in sorted(states) for name in states[w]]
        tensors = [*kept, *(local[i][w][name] for i, w, name in keys)]
        layout = [Field(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        device = torch.device("cpu") if dist.get_backend() == "gloo" else self.root_device
        sent = torch.zeros(packed_size(layout), dtype=torch.uint8, device=device)
        pack([tensor.to(device) for tensor in tensors], layout, sent)
        zero = self.is_global_zero
        received = [torch.empty_like(sent) for _ in range(self._world)] if zero else None
        dist.gather(sent, received, dst=0)
        if received is None:
            return local, {self.global_rank: kept}
        everybody: list[dict[int, Any]] = [{} for _ in local]
        states: dict[int, Any] = {}
        for rank, buffer in enumerate(received):
            unpacked = [tensor.cpu().clone() for tensor in unpack(buffer, layout)]
            states[rank] = tuple(unpacked[: len(kept)])
            for (i, w, name), tensor in zip(keys, unpacked[len(kept) :], strict=True):
                everybody[i].setdefault(w + rank * self.workers_per_process, {})[name] = tensor
        return everybody, states

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self.exchanges:
            self._restore(checkpoint.get(CHECKPOINT_KEY))

    def followed(self, before: int) -> resuming.Followed:
        """For each worker of this run, the one of a run with ``before`` workers whose state it goes
        on with; None: it is new.
        """
        return resuming.followed(self.resume_workers, before, self.n)

    def _restore(self, saved: Mapping[str, Any] | None) -> None:
        if saved is None:
            if self.n > 1:
                log.info("The checkpoint holds no state of byzantine_robust: the algorithm starts afresh from its weights.")
            return
        if len(saved["server"]) not in (len(self.optimizers), len(self.exchanges)):
            raise ValueError(
                f"The checkpoint holds the state of {len(saved['server'])} optimizers. Found {len(self.optimizers)}. "
                "Resume with the same optimizers, or start a new run from its weights: Model.load_from_checkpoint(path)."
            )
        groups = self.groups[: len(saved["server"])]
        follow = self.followed(saved["n"])
        if not resuming.is_same(follow, saved["n"]):
            _warn(f"byzantine_robust: {resuming.described(follow, saved['n'])}")
            if self.algorithm is None and min(saved["n"], self.n) <= 2 < max(saved["n"], self.n):
                _warn(
                    f"byzantine_robust: the default algorithm is another one for n={self.n} workers, and "
                    "starts afresh."
                )
                saved = resuming.without_states(saved)
            likes = [group.example() for group in groups]
            algorithms = [group.exchange.algorithm for group in groups]
            saved = resuming.adapted(saved, follow, self.workers_per_process, algorithms, likes)
        self._forget()
        assert self.lightning_module is not None
        self._buffers = WorkerBuffers(self.lightning_module, self.workers_per_process, self.aggregated_buffers)
        self._attributes = WorkerAttributes(self.lightning_module, self.workers_per_process)
        for group, server, workers in zip(groups, saved["server"], saved["workers"], strict=True):
            group.exchange.load(server, workers, group.example())
        kept = {worker for worker, old in enumerate(follow) if old is not None}
        missing = (
            kept - set(saved["workers"][0]) if saved["server"][0]["dim"] is not None else set()
        )
        if saved["server"][0]["dim"] is not None and saved["server"][0]["server"] is None:
            _warn(
                "The checkpoint was written by one rank alone, which held its shard of the state only. The algorithm starts afresh."
            )
        elif missing:
            _warn(f"The checkpoint was written by one rank alone. Workers {sorted(missing)} start with a fresh state.")
        self._micro_step = saved["micro_step"]
        self._skipped_in_a_row = saved["skipped_in_a_row"]
        self.silences = dict(saved["silences"])
        self._step_logs.load(saved.get("logged", {}))
        if self.global_rank in saved["rng"]:
            random_states.restore(self.root_device, saved["rng"][self.global_rank])


class _Weighed(NamedTuple):
    """A mean over ranks whose weights are yet to come: which values were finite, and their dtype."""

    finite: Tensor
    dtype: torch.dtype


def is_robust(strategy: Any) -> bool:
    """Whether a strategy is a ByzantineRobustStrategy, of either Lightning package."""
    return isinstance(strategy, RobustStrategy)


def _leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
