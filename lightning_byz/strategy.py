"""ByzantineRobustStrategy: Lightning's training loop on one side, a round of a robust algorithm on the other. Glue only.

The seam is `Strategy.optimizer_step`: its closure runs a step's forward and backward passes, and where it ends, DDP's gradients
would be reduced. There the local workers' gradients go through `Exchange`, and the estimate that comes back is written to
``p.grad``. Clipping, the optimizer and its schedule are the user's, untouched.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from lightning_byz import rng
from lightning_byz.algorithms import Algorithm, ByzEF21SGDM, ByzVRMarinaPP, DStar, SignSGDMajorityVote
from lightning_byz.batches import batch_size, split_batch
from lightning_byz.buffers import WorkerBuffers
from lightning_byz.compressors import Field
from lightning_byz.exchange import Contribution, Exchange, Outcome, comes
from lightning_byz.gradients import FlatParameters
from lightning_byz.overlap import Overlap, obstacle
from lightning_byz.quiet_passes import MeanGradient, Pass, QuietPasses, TrustedData, parameters_at, random_states_kept, whole_data
from lightning_byz.roll_call import RollCall, roll_call
from lightning_byz.served import ServedRun, surviving_launcher
from lightning_byz.setup_checks import UnsupportedSetupError, check_setup, default_transport, explain_transport, resolve_algorithm
from lightning_byz.setup_checks import warn as _warn
from lightning_byz.step_logs import Call, StepLogs, WorkerLog
from lightning_byz.transports import ParameterServer, Sharded, Transport
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
    "signsgd_majority_vote": {"algorithm": SignSGDMajorityVote(), "description": "SIGNUM: one bit a coordinate in both directions"},
}
"""What ``Trainer(strategy=NAME)`` stands for: arguments of the strategy."""


class TooFewGradientsError(RuntimeError):
    """More steps in a row than ``max_skipped_steps`` allows had too few finite gradients: training has diverged."""


class RobustStrategy(_Base):
    """Robust aggregation of the workers' gradients, in place of DDP's all-reduce.

    All of ByzantineRobustStrategy but its Lightning base class (see `lightning_byz.lightning` and `.pytorch_lightning`). The arguments
    ``accelerator``, ``parallel_devices``, ``cluster_environment``, ``checkpoint_io``, ``precision_plugin``, ``process_group_backend``,
    ``timeout`` and ``start_method`` are those of Lightning's DDPStrategy.

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
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
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

        self._num_nodes = 1
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._start_method = start_method

        self._served = ServedRun(self, transport) if isinstance(transport, ParameterServer) else None
        self._roll_call: RollCall | None = None
        self._overlap: Overlap | None = None
        self._may_overlap = False
        self._saved_alone = False
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
        self._layouts: list[FlatParameters | None] = [None] * len(self.exchanges)
        self._exchanged: set[int] = set()
        self._accumulated: list[Tensor | None] = [None] * self.workers_per_process
        self._accumulated_used: list[Tensor | None] = [None] * self.workers_per_process
        self._losses: list[Tensor | None] = [None] * self.workers_per_process
        self._lossless: list[bool] = [True] * self.workers_per_process
        self._scale_probe: Tensor | None = None
        self._step_logs = StepLogs()
        self._logged: set[str] = set()
        self._buffers: WorkerBuffers | None = None
        self._step_is_due = False  # once this micro-batch's gradients are there
        self._drop_overlap()
        self._forget_passes()

    def _drop_overlap(self) -> None:
        """Takes the hooks off that send gradients during backward."""
        if self._overlap is not None:
            self._overlap.remove()
        self._overlap = None

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
        return self.num_nodes * self.num_processes

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
            self.cluster_environment.set_world_size(self._world)
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

    def _connect_processes(self) -> None:
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
        self._roll_call = roll_call(
            environment.main_address, self._timeout or timedelta(minutes=30)
        )

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def teardown(self) -> None:
        vars(self.precision_plugin).pop("clip_gradients", None)
        self._drop_overlap()
        if self._served is not None:
            self._served.leave(self._interrupted())
        super().teardown()

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
        largest = max((layout.dim * layout.dtype.itemsize for layout in map(FlatParameters.of, self.optimizers)), default=0)
        transport = self.transport or default_transport(self._resolved, self._world, largest)
        transport.connect(self.global_rank, self._world, self.workers_per_process, self.root_device)
        explain_transport(self._resolved, transport)
        self._may_overlap = self._decide_overlap(trainer, transport)
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        self.exchanges = [Exchange(self._resolved, transport, seed + i, self._shares()) for i in range(len(self.optimizers))]
        for exchange in self.exchanges:
            exchange.observers.append(self._note_silence)
            exchange.liars = self.liars_at
            exchange.arrivals = self.arrivals_at
        self.data_attacks.clear()
        self.liars.clear()
        self.delays.clear()
        self._forget()
        assert self.lightning_module is not None
        self._buffers = WorkerBuffers(self.lightning_module, self.workers_per_process)
        if self.n > 1:
            self._exchange_before_clipping()
        if self._served is not None:
            self._served.adopt_metrics(self.lightning_module)

    def _decide_overlap(self, trainer: Any, transport: Transport) -> bool:
        """Whether gradients are read during backward, and sent where the algorithm lets them; says why not."""
        if not isinstance(transport, Sharded) or not transport.overlap or self.workers_per_process > 1:
            return False
        reason = obstacle(self.lightning_module, trainer.callbacks, self.precision_plugin, self.optimizers)
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
        for tensor in (*self.lightning_module.parameters(), *self.lightning_module.buffers()):
            shared = tensor.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(shared, src=0)
            if self.global_rank != 0 and not torch.equal(shared, tensor):
                tensor.copy_(shared)

    def _exchange_before_clipping(self) -> None:
        """In manual optimization ``clip_gradients`` comes before the step: it is to act on the estimate."""
        clip = self.precision_plugin.clip_gradients

        def clip_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            module = self.lightning_module
            manual = module is not None and not module.automatic_optimization
            if manual and self._index(optimizer) not in self._exchanged:
                self._exchange(optimizer)
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

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Every local worker's training step, on its part of the batch; what they log is reduced and logged once."""
        if self.n == 1 or not self.exchanges:
            return super().training_step(*args, **kwargs)
        module, workers, buffers = self.lightning_module, self.exchanges[0].transport.workers, self._buffers
        assert module is not None and buffers is not None
        step = self.exchanges[0].step
        batch, rest = args[0], args[1:]
        buffers.refresh()
        if self.workers_per_process == 1:
            parts = [batch]
        else:
            parts = split_batch(batch, self.workers_per_process)
            if self._micro_step == 0 and parts[-1] is None:
                raise ValueError(
                    f"The first batch should have at least one sample for each of the {self.workers_per_process} in-process "
                    f"workers. Found {batch_size(batch)}. Use a larger batch_size, or a smaller workers_per_process."
                )

        cohort = torch.ones(self.n, dtype=torch.bool)
        if module.automatic_optimization:
            round = self._next_round(self._layout(0))
            assert round.cohort is not None
            cohort = round.cohort & torch.tensor([comes(round, worker) for worker in range(self.n)])
            if self._served is not None and self._served.is_behind:
                parts = [None] * len(parts)  # its round is closed: the result is applied, and nothing computed
            parts = [self._attacked(w, step, part) if cohort[w] else None for w, part in zip(workers, parts, strict=True)]
            self._run_quiet_passes(round, parts, rest, kwargs)
        else:
            parts = [self._attacked(w, step, part) for w, part in zip(workers, parts, strict=True)]

        logs: list[WorkerLog] = []
        outputs: list[Any] = []
        for i, (worker, part) in enumerate(zip(workers, parts, strict=True)):
            logs.append(WorkerLog(samples=0 if part is None else batch_size(part) or 1))
            outputs.append(None)
            if part is None:
                continue
            vars(module)["log"] = logs[-1].record
            try:
                with buffers.of(i), rng.worker_rng(self.root_device, *self._rng_key(worker)):
                    outputs[-1] = super().training_step(part, *rest, **kwargs)
            finally:
                del vars(module)["log"]

        losses = [output.get("loss") if isinstance(output, Mapping) else output for output in outputs]
        if module.automatic_optimization:
            for worker_log, loss in zip(logs, losses, strict=True):
                worker_log.loss = loss.detach().mean() if isinstance(loss, Tensor) else None
        self._losses = [loss if isinstance(loss, Tensor) else None for loss in losses]
        self._lossless = [before and loss is None for before, loss in zip(self._lossless, self._losses, strict=True)]

        liars = self.liars_at(step)
        honest = [worker not in liars and bool(cohort[worker]) for worker in range(self.n)]
        honest = honest if any(honest) else cohort.tolist()  # a cohort of liars has nobody else to speak for it
        transport = self.exchanges[0].transport
        for call in self._step_logs.reduce(logs, transport, honest, self.root_device):
            self._log_once(call)
        self._micro_step += 1
        if not module.automatic_optimization:
            return outputs[0] if outputs[0] is not None else {}
        return self._step_output(outputs)

    def _attacked(self, worker: int, step: int, part: Any) -> Any:
        """A worker's part of the batch, as data attacks leave it; None stays None."""
        for attack in self.data_attacks if part is not None else ():
            part = attack(worker, step, part)
        return part

    def _next_round(self, layout: FlatParameters) -> Round:
        exchange = self.exchanges[0]
        return exchange.next_round(self._x(layout, exchange))

    @staticmethod
    def _x(layout: FlatParameters, exchange: Exchange) -> Tensor:
        """The parameters ``[d]``, where the algorithm looks at their values; else something of their shape."""
        return layout.read_parameters() if exchange.algorithm.needs_drift else layout.like()

    def _run_quiet_passes(self, round: Round, parts: Sequence[Any], rest: Sequence[Any], kwargs: Any) -> None:
        """The gradients that this round needs besides the minibatch's. They come first, while no worker's graph is alive."""
        exchange, layout, module = self.exchanges[0], self._layout(0), self.lightning_module
        algorithm = exchange.algorithm
        assert self._buffers is not None
        if self._full is not None or self._previous is not None:
            raise UnsupportedSetupError(
                f"{type(algorithm).__name__} needs one minibatch per optimizer step. Found a second one before the step: gradient "
                "accumulation has been switched on. Leave GradientAccumulationScheduler out."
            )
        passes = QuietPasses(module, self._buffers, self.precision_plugin, self.root_device, super().training_step)
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
        with whole_data(trainer.train_dataloader, workers, (round.seed, round.step), self.root_device) as batches:
            for b, batch_of in enumerate(itertools.islice(batches, limit)):
                for i, (worker, batch) in enumerate(zip(workers, batch_of, strict=True)):
                    if batch is None or parts[i] is None:
                        continue
                    batch = self._attacked(worker, round.step, self._to_device(batch))
                    done = passes.gradient(layout, i, (*self._rng_key(worker), 1 + b), (batch, *rest), kwargs)
                    totals[i].add(done, batch_size(batch) or 1)
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
        extra = next((output for output in outputs if isinstance(output, Mapping)), None)
        return loss if extra is None else {**extra, "loss": loss}

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Every local worker's backward pass."""
        if self._exchanged and len(self.optimizers) == 1:
            raise RuntimeError(
                "self.clip_gradients exchanges the gradients between the workers, and the optimizer's step should come next. Found "
                "another backward pass. When you accumulate, call clip_gradients only right before optimizer.step()."
            )
        if self._step_is_due and self._may_overlap:
            layout, exchange = self._layout(0), self.exchanges[0]
            seen_first = not isinstance(exchange.transport, Sharded)  # by simulated attackers, who look at whole messages
            if self._overlap is None and not seen_first:
                self._overlap = Overlap(layout, exchange)
            if self._overlap is not None and self._losses[0] is not None:
                with self._overlap.during_backward():
                    return super().backward(closure_loss, optimizer, *args, **kwargs)
        if self.n == 1 or self.workers_per_process == 1 or self._scale_probe is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        module, buffers = self.lightning_module, self._buffers
        assert module is not None and buffers is not None
        self.pre_backward(closure_loss)
        scaled = self.precision_plugin.pre_backward(closure_loss, module)
        (factor,) = torch.autograd.grad(scaled, self._scale_probe)
        layout = self._layout(self._index(optimizer))
        if any(row is not None for row in self._accumulated) and layout.is_cleared():
            self._accumulated = [None] * self.workers_per_process  # the user, or Lightning, has zeroed the gradients
            self._accumulated_used = [None] * self.workers_per_process
        for i, loss in enumerate(self._losses):
            if loss is None:
                continue
            layout.clear_gradients()
            with buffers.of(i):
                self.precision_plugin.backward(loss * factor, module, optimizer, *args, **kwargs)
            used, before, used_before = layout.used(), self._accumulated[i], self._accumulated_used[i]
            if before is None:
                self._accumulated[i] = layout.read_gradients(out=layout.rows(self.workers_per_process)[i])
            else:
                before.add_(layout.read_gradients())
            self._accumulated_used[i] = used if used_before is None else used_before | used
        self._losses = [None] * self.workers_per_process
        self._show_mean(layout)
        closure_loss = self.precision_plugin.post_backward(scaled, module)
        self.post_backward(closure_loss)
        return closure_loss

    def _show_mean(self, layout: FlatParameters) -> None:
        """Until the exchange, ``p.grad`` is the mean of this process's workers, for hooks that look at it."""
        here = [i for i, row in enumerate(self._accumulated) if row is not None]
        used = [used for used in self._accumulated_used if used is not None]
        if not here:
            return
        rows = layout.rows(self.workers_per_process)
        mean = (rows if len(here) == len(rows) else rows[here]).mean(0)
        layout.write_gradients(mean, torch.stack(used).any(0).tolist(), views=True)

    # -- a step: the exchange -----------------------------------------------------------------------------------------

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """The user's optimizer step, with an exchange at the end of its closure."""
        if self.n == 1:
            return super().optimizer_step(optimizer, closure, model, **kwargs)

        def closure_and_exchange() -> Any:
            self._step_is_due = True
            try:
                loss = closure()
            finally:
                self._step_is_due = False
            if self._index(optimizer) not in self._exchanged:
                self._exchange(optimizer)
            return loss if loss is None or self._step_logs.loss is None else self._step_logs.loss.to(loss)

        def several_times() -> Any:  # LBFGS evaluates it again and again
            self._exchanged.discard(self._index(optimizer))
            return closure_and_exchange()

        try:
            repeats = isinstance(optimizer, torch.optim.LBFGS)
            return super().optimizer_step(optimizer, several_times if repeats else closure_and_exchange, model, **kwargs)
        finally:
            self._exchanged.discard(self._index(optimizer))

    def _index(self, optimizer: Any) -> int:
        """Which of the run's optimizers it is, as it is or in Lightning's wrapper."""
        for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
            for i, known in enumerate(self.optimizers):
                if known is candidate:
                    return i
        raise ValueError(f"The optimizer should be one that configure_optimizers returned. Found {optimizer!r}.")

    def _layout(self, index: int) -> FlatParameters:
        now, before = FlatParameters.of(self.optimizers[index]), self._layouts[index]
        if not now.same_as(before):
            if before is not None:
                log.warning(
                    "The set of trained parameters has changed: the algorithm's state (momenta, EF21 estimates) starts afresh."
                )
                self.exchanges[index].dim = None
            self._layouts[index] = now
            self._drop_overlap()
            self.exchanges[index].algorithm = self._resolved.for_sizes(now.sizes)
            return now
        assert before is not None
        return before

    def _contributions(self, layout: FlatParameters, unscale: float) -> list[Contribution]:
        assert self._buffers is not None and self.lightning_module is not None
        contributions = []
        for i in range(self.workers_per_process):
            if self.workers_per_process == 1:
                flat, used = self._only_gradient(layout, unscale)
            else:
                accumulated, accumulated_used = self._accumulated[i], self._accumulated_used[i]
                flat = None if accumulated is None else accumulated * unscale if unscale != 1 else accumulated
                used = layout.used().fill_(False) if accumulated_used is None else accumulated_used
            grads, used = self._gradients(i, flat, used)
            touched = torch.cat([used, self._buffers.changed(i)]).to(self.root_device)
            contributions.append(Contribution(grads, touched))
        return contributions

    def _only_gradient(self, layout: FlatParameters, unscale: float) -> tuple[Tensor | None, Tensor]:
        """The gradient of a process's only worker, None if there is none, and the parameters that have one."""
        assert self.lightning_module is not None
        if self._overlap is not None and self._overlap.began:
            used = self._overlap.used()
            return self._overlap.gradient(), used
        used = layout.used()
        if (self.lightning_module.automatic_optimization and self._lossless[0]) or not bool(used.any()):
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

    def _exchange(self, optimizer: Any) -> None:
        """From the local workers' gradients to the estimate in ``p.grad``."""
        index = self._index(optimizer)
        layout, exchange = self._layout(index), self.exchanges[index]
        scaler = getattr(self.precision_plugin, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        # In manual optimization this runs inside the precision plugin's autocast, which is not for aggregation.
        with torch.autocast(self.root_device.type, enabled=False):
            contributions = self._contributions(layout, 1 / scale)
            self._move_on()
            outcome = exchange.run(contributions, self._x(layout, exchange), self._trusted)

        parameters, f = len(layout.parameters), outcome.rule.f or 0
        overflow = scale > 1.0 and len(outcome.silent) > f
        if overflow:
            layout.poison_gradients()
        elif outcome.estimate is None:
            # A loss scaler wants to see a gradient for every step; an inf makes it skip this one.
            layout.poison_gradients() if scaler is not None else layout.clear_gradients()
        else:
            views = not exchange.transport.measured  # a server may still be sending the estimate
            layout.write_gradients(outcome.estimate, outcome.used[:parameters].tolist(), scale, views)
        assert self._buffers is not None and outcome.round.present is not None
        self._buffers.merge(exchange.transport, outcome.used[parameters:], outcome.round.present, f)
        self._accumulated = [None] * self.workers_per_process
        self._accumulated_used = [None] * self.workers_per_process
        self._lossless = [True] * self.workers_per_process
        self._forget_passes()
        self._exchanged.add(index)
        self._count_skips(outcome, overflow)

    def _count_skips(self, outcome: Outcome, overflow: bool) -> None:
        if overflow:
            return
        if outcome.estimate is not None:
            self._skipped_in_a_row = 0
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

    def _move_on(self, group: Any = None) -> None:
        """This rank goes on to something that all do: it comes to no checkpoint of before."""
        if self._roll_call is not None and group in (None, dist.group.WORLD):
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
        self._move_on()
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[self.root_device.index])
        else:
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """An object of rank ``src``, which is one of the run's own processes, for everybody."""
        if self._alone():
            return obj
        if self._served is not None:
            return self._served.broadcast(obj, src)
        self._move_on()
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces over the ranks, leaving out values that are nan or inf, as long as there are others."""
        if not isinstance(tensor, Tensor) or self._alone():
            return tensor
        name = str(getattr(reduce_op, "name", reduce_op)).lower().removeprefix("redoptype.").rpartition(".")[2]
        if name not in ("mean", "avg", "sum", "max", "min", "product"):
            raise ValueError(f"`reduce_op` should be one of mean, sum, max, min, product. Found {reduce_op!r}.")
        if self._served is not None:
            received = self._served.gather(tensor)
            ranks = len(received)
        else:
            self._move_on(group)
            ranks = dist.get_world_size(group)
            received = [torch.empty_like(tensor) for _ in range(ranks)]
            dist.all_gather(received, tensor.contiguous(), group=group)
        values = torch.stack(received)
        finite = torch.isfinite(values) if values.is_floating_point() else torch.ones_like(values, dtype=torch.bool)
        if not bool(finite.all()):
            _warn(f"byzantine_robust: {int((~finite).sum())} of {ranks} values of a reduction were not finite and left out.")
        count = finite.sum(0)
        neutral = {"max": -torch.inf, "min": torch.inf, "product": 1.0}.get(name, 0.0)
        kept = torch.where(finite, values, torch.full_like(values, neutral)) if not bool(finite.all()) else values
        if name in ("mean", "avg"):
            total = kept.sum(0)
            return total / count if total.is_floating_point() else total // ranks
        result = _REDUCTIONS[name](kept)
        return torch.where(count > 0, result, values[0]).to(tensor.dtype)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self._alone():
            return decision
        if self._served is not None:
            return self._served.decide(decision, all)
        return super().reduce_boolean_decision(decision, all=all)  # by `reduce`

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The ranks' tensors, stacked; on a parameter server those of the ranks that are heard."""
        if self._served is None:
            self._move_on(group)
            return super().all_gather(tensor, group, sync_grads)
        if sync_grads:
            raise UnsupportedSetupError("all_gather(sync_grads=True) would let gradients pass by the rule. Use sync_grads=False.")
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
        random_states = rng.snapshot(self.root_device)
        if self._alone() or self._saved_alone:
            return local, {self.global_rank: random_states}
        if self._served is not None:
            return self._served.collect_states(local, random_states)
        keys = [(i, w, name) for i, states in enumerate(local) for w in sorted(states) for name in states[w]]
        tensors = [*random_states, *(local[i][w][name] for i, w, name in keys)]
        layout = [Field(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        device = torch.device("cpu") if dist.get_backend() == "gloo" else self.root_device
        sent = torch.zeros(packed_size(layout), dtype=torch.uint8, device=device)
        pack([tensor.to(device) for tensor in tensors], layout, sent)
        zero = self.is_global_zero
        received = [torch.empty_like(sent) for _ in range(self._world)] if zero else None
        dist.gather(sent, received, dst=0)
        if received is None:
            return local, {self.global_rank: random_states}
        everybody: list[dict[int, Any]] = [{} for _ in local]
        states: dict[int, Any] = {}
        for rank, buffer in enumerate(received):
            unpacked = [tensor.cpu().clone() for tensor in unpack(buffer, layout)]
            states[rank] = tuple(unpacked[: len(random_states)])
            for (i, w, name), tensor in zip(keys, unpacked[len(random_states) :], strict=True):
                everybody[i].setdefault(w + rank * self.workers_per_process, {})[name] = tensor
        return everybody, states

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self.exchanges:
            self._restore(checkpoint.get(CHECKPOINT_KEY))

    def _restore(self, saved: Mapping[str, Any] | None) -> None:
        if saved is None:
            if self.n > 1:
                log.info("The checkpoint holds no state of byzantine_robust: the algorithm starts afresh from its weights.")
            return
        if saved["n"] != self.n:
            raise ValueError(
                f"The checkpoint was written by a run of n={saved['n']} workers. Found n={self.n} (processes x workers_per_process "
                f"= {self._world} x {self.workers_per_process}). Resume with {saved['n']} workers, or start a new run from its "
                "weights: Model.load_from_checkpoint(path)."
            )
        if len(saved["server"]) != len(self.exchanges):
            raise ValueError(
                f"The checkpoint holds the state of {len(saved['server'])} optimizers. Found {len(self.exchanges)}. "
                "Resume with the same optimizers, or start a new run from its weights: Model.load_from_checkpoint(path)."
            )
        self._forget()
        assert self.lightning_module is not None
        self._buffers = WorkerBuffers(self.lightning_module, self.workers_per_process)
        for i, exchange in enumerate(self.exchanges):
            exchange.load(saved["server"][i], saved["workers"][i], FlatParameters.of(self.optimizers[i]).like())
        missing = set(range(self.n)) - set(saved["workers"][0]) if saved["server"][0]["dim"] is not None else set()
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
            rng.restore(self.root_device, saved["rng"][self.global_rank])


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda values: values.sum(0),
    "max": lambda values: values.amax(0),
    "min": lambda values: values.amin(0),
    "product": lambda values: values.prod(0),
}


def is_robust(strategy: Any) -> bool:
    """Whether a strategy is a ByzantineRobustStrategy, of either Lightning package."""
    return isinstance(strategy, RobustStrategy)


def _leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
