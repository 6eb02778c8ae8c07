"""What is refused before the first step: settings that do not fit together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_byz.algorithms import Algorithm
from lightning_byz.transports import Transport


class UnsupportedSetupError(ValueError):
    """A combination of settings that cannot keep what the strategy promises."""


@rank_zero_only
def warn(message: str) -> None:
    """A warning, on rank 0 only."""
    warnings.warn(message, stacklevel=3)


_OF_DDP = {
    "find_unused_parameters": "parameters without a gradient are found in every step",
    "static_graph": "the graph may change",
    "gradient_as_bucket_view": "gradients are views of the aggregate where that is possible",
    "broadcast_buffers": "buffers are merged at the end of every step",
    "bucket_cap_mb": "Sharded(bucket_size=...) sets the size of buckets, in bytes",
    "init_sync": "parameters are always rank 0's at the start",
    "check_reduction": "it has no effect in DDP either",
    "mixed_precision": "use Trainer(precision=...)",
    "delay_all_reduce_named_params": "all parameters are exchanged where backward ends",
    "param_to_hook_all_reduce": "all parameters are exchanged where backward ends",
    "skip_all_reduce_unused_params": "parameters that no worker uses are left alone",
    "ddp_comm_state": "messages are made by the algorithm: ByzantineRobustStrategy(algorithm=...)",
    "ddp_comm_hook": "messages are made by the algorithm: ByzantineRobustStrategy(algorithm=...)",
    "ddp_comm_wrapper": (
        "messages are made by the algorithm: ByzantineRobustStrategy(algorithm=...)"
    ),
    "model_averaging_period": "parameters are the same on all ranks after every step",
}
"""Arguments of Lightning's DDPStrategy and of DistributedDataParallel, and why they are not needed
here.
"""


def check_arguments(
    algorithm: Any,
    transport: Any,
    workers_per_process: Any,
    num_byzantine: Any,
    max_skipped_steps: Any,
    worker_weights: Sequence[float] | None,
    aggregated_buffers: Any,
    vectorize: Any,
    of_ddp: Mapping[str, Any],
) -> None:
    """Refuses arguments of the strategy that are of no use whatever the Trainer is.

    Raises:
        TypeError: for parts that are none, and names that are no argument.
        ValueError: for numbers out of range.
    """
    check_arguments_of_ddp(of_ddp)
    if algorithm is not None and not isinstance(algorithm, Algorithm):
        raise TypeError(
            "`algorithm` should be an Algorithm, such as RobustSGD(aggregator=TrimmedMean()). "
            f"Found {algorithm!r}."
        )
    if transport is not None and not isinstance(transport, Transport):
        raise TypeError(
            f"`transport` should be a Transport, such as AllGather(). Found {transport!r}."
        )
    if vectorize not in ("auto", True, False):
        raise ValueError(
            f"`vectorize` should be 'auto', True or False. Found vectorize={vectorize!r}."
        )
    for name, value, least in (
        ("workers_per_process", workers_per_process, 1),
        ("num_byzantine", num_byzantine, 0),
        ("max_skipped_steps", max_skipped_steps, 0),
    ):
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not fits and (value is not None or name != "num_byzantine"):
            raise ValueError(
                f"`{name}` should be an integer of at least {least}. Found {name}={value!r}."
            )
    try:
        weights = [*map(float, () if worker_weights is None else worker_weights)]
    except (TypeError, ValueError):
        weights = [-1.0]
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(
            "`worker_weights` should be positive numbers, one for each worker. Found "
            f"{worker_weights!r}."
        )
    if isinstance(aggregated_buffers, str):
        raise ValueError(
            "`aggregated_buffers` should be a list of names or patterns. Found "
            f"{aggregated_buffers!r}. Write [{aggregated_buffers!r}]."
        )


def check_arguments_of_ddp(arguments: Mapping[str, Any]) -> None:
    """Says of DDP's arguments, in one line, that they have no effect.

    Raises:
        TypeError: for names that neither DDP nor this strategy knows.
    """
    unknown = sorted(arguments.keys() - _OF_DDP.keys())
    if unknown:
        raise TypeError(
            f"ByzantineRobustStrategy takes no argument {', '.join(map(repr, unknown))}. See "
            "help(ByzantineRobustStrategy)."
        )
    if arguments:
        said = "; ".join(f"{name}: {_OF_DDP[name]}" for name in arguments)
        warn(
            f"byzantine_robust: these arguments of DDP are not needed and have no effect. {said}. "
            "Leave them out."
        )


def check_setup(strategy: Any, trainer: Any, algorithm: Algorithm) -> None:
    """Refuses what cannot work, before the first step, and says what to do instead.

    Args:
        strategy: the RobustStrategy, with more than one worker.
        trainer: its trainer.
        algorithm: its resolved algorithm.

    Raises:
        UnsupportedSetupError: says what should hold, what was found, and what to do.
    """
    module, workers = strategy.lightning_module, strategy.workers_per_process
    if strategy._layer_sync is not None:
        raise UnsupportedSetupError(
            "Trainer(sync_batchnorm=True) lets every worker's activations into all others' "
            "forward passes, where no rule can outvote them. Leave it out: byzantine_robust "
            "merges BatchNorm statistics by their median."
        )
    synced = [
        name for name, part in module.named_modules() if isinstance(part, torch.nn.SyncBatchNorm)
    ]
    if synced:
        raise UnsupportedSetupError(
            "SyncBatchNorm lets every worker's activations into all others' forward passes, "
            f"where no rule can outvote them. Found it at {', '.join(synced[:3])}. Use BatchNorm: "
            "byzantine_robust merges its statistics by their median."
        )
    if workers > 1 and not module.automatic_optimization:
        raise UnsupportedSetupError(
            f"In-process workers (workers_per_process={workers}) need automatic optimization: "
            "manual optimization steps inside training_step, before the other workers have a "
            "gradient. Use one worker per process: Trainer(devices=n) with workers_per_process=1."
        )
    sparse = [
        name for name, part in module.named_modules() if getattr(part, "sparse", False) is True
    ]
    if sparse:
        raise UnsupportedSetupError(
            f"Gradients should be dense. Found sparse=True in {', '.join(sparse)}. Set "
            "sparse=False there."
        )
    unreal = [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and not p.is_floating_point()
    ]
    if unreal:
        raise UnsupportedSetupError(
            "Parameters should be real numbers, because rules order them. Found "
            f"{', '.join(unreal)}. Keep them as real and imaginary parts (torch.view_as_real)."
        )
    averages = any(
        type(callback).__name__ == "StochasticWeightAveraging" for callback in trainer.callbacks
    )
    if workers > 1 and averages and any(b.is_floating_point() for b in module.buffers()):
        raise UnsupportedSetupError(
            "StochasticWeightAveraging recomputes BatchNorm statistics in passes without an "
            f"optimizer step, which in-process workers (workers_per_process={workers}) do not "
            "merge. Use one worker per process, or GroupNorm."
        )
    one_gradient = algorithm.needs_drift or algorithm.needs_previous
    if one_gradient and any(
        isinstance(optimizer, torch.optim.LBFGS) for optimizer in strategy.optimizers
    ):
        raise UnsupportedSetupError(
            f"LBFGS evaluates its closure several times a step, and {type(algorithm).__name__} "
            "looks at the parameters of the step before. Use another optimizer, or another "
            "algorithm, such as RobustSGD()."
        )
    inside = {
        id(p)
        for optimizer in strategy.optimizers
        for part in optimizer.param_groups
        for p in part["params"]
    }
    outside = [
        name for name, p in module.named_parameters() if p.requires_grad and id(p) not in inside
    ]
    if outside and (algorithm.needs_previous or algorithm.needs_trusted):
        raise UnsupportedSetupError(
            f"{type(algorithm).__name__} computes further gradients of the optimizer's "
            "parameters. Found parameters that need a gradient and are in no optimizer: "
            f"{', '.join(outside[:3])}. Give them to the optimizer, or freeze them: "
            "requires_grad_(False)."
        )
    _check_passes(strategy, trainer, algorithm)


def _check_passes(strategy: Any, trainer: Any, algorithm: Algorithm) -> None:
    """Refuses set-ups in which the gradients that the algorithm asks for besides the minibatch's
    cannot be computed.
    """
    name, manual = type(algorithm).__name__, not strategy.lightning_module.automatic_optimization
    if algorithm.needs_previous and (trainer.accumulate_grad_batches > 1 or manual):
        found = (
            "manual optimization"
            if manual
            else f"accumulate_grad_batches={trainer.accumulate_grad_batches}"
        )
        raise UnsupportedSetupError(
            f"{name} needs the gradient of one minibatch at two iterates. Found {found}. "
            "Use automatic optimization with Trainer(accumulate_grad_batches=1) and larger batches."
        )
    if strategy.trusted_data is None:
        if algorithm.needs_trusted:
            raise UnsupportedSetupError(
                f"{algorithm!r} compares with a gradient on trusted data. Found none. Give some: "
                "ByzantineRobustStrategy(..., trusted_data=DataLoader(clean_samples, "
                "batch_size=64))."
            )
        return
    if not algorithm.uses_trusted:
        raise UnsupportedSetupError(
            f"`trusted_data` is for algorithms that compare with a gradient on it. Found {name}, "
            "which does not. Leave it out, or use DStar()."
        )
    if manual:
        raise UnsupportedSetupError(
            "`trusted_data` needs automatic optimization: its gradient is that of training_step, "
            "which takes a step of its own in manual optimization. Leave it out, or use automatic "
            "optimization."
        )


def check_local_steps(strategy: Any, trainer: Any, algorithm: Algorithm) -> None:
    """Refuses what cannot work with local steps, before the first one.

    Args:
        strategy: the RobustStrategy, with ``local_steps``.
        trainer: its trainer.
        algorithm: its resolved algorithm.

    Raises:
        UnsupportedSetupError: says what should hold, what was found, and what to do.
    """
    module, name = strategy.lightning_module, type(algorithm).__name__
    if strategy.shards is not None:
        raise UnsupportedSetupError(
            "With local_steps every worker is one process with the whole model. Found a sharded "
            "model (data_parallel_size, tensor_parallel_size). Use one of the two."
        )
    if algorithm.needs_previous or algorithm.needs_trusted or strategy.trusted_data is not None:
        raise UnsupportedSetupError(
            "With local_steps workers send differences of parameters, of which there is one each. "
            f"Found {name}, which needs further gradients of the same batch or on trusted data. "
            "Use an algorithm that does not, such as RobustSGD() or ByzEF21SGDM()."
        )
    if type(algorithm).cohort is not Algorithm.cohort and strategy.local_steps.participants:
        raise UnsupportedSetupError(
            f"`participants` draws the workers of a phase. Found {name}, which draws its own. "
            "Leave participants out, or use another algorithm, such as RobustSGD()."
        )
    if strategy.local_steps.participants and algorithm.sees_absent:
        raise UnsupportedSetupError(
            f"`participants` draws the workers of a phase, of which f may lie. Found {name}, which "
            "aggregates what it knows of all n. Leave participants out, or use another algorithm, "
            "such as RobustSGD() or EF14()."
        )
    if strategy.local_steps.participants and not module.automatic_optimization:
        raise UnsupportedSetupError(
            "`participants` needs automatic optimization: by hand a worker trains whether it is "
            "drawn or not. Leave participants out, or use automatic optimization."
        )
    if not any(part["params"] for each in strategy.optimizers for part in each.param_groups):
        raise UnsupportedSetupError(
            "Local steps are steps of the module's optimizers. Found that configure_optimizers "
            "gives none. Return one."
        )
    # not by class: callbacks import strategies, and not the other way
    compares = ("ReplicaCheck", "DuplicateBatchCheck")
    compared = [
        base.__name__
        for callback in trainer.callbacks
        for base in type(callback).__mro__
        if base.__name__ in compares
    ]
    if compared:
        raise UnsupportedSetupError(
            f"{compared[0]} compares ranks that hold the same parameters and optimizer states. "
            "With local_steps each rank has its own. Leave it out."
        )
    drawn = strategy.local_steps.participants
    if drawn is not None and drawn > strategy.n:
        raise UnsupportedSetupError(
            f"`participants` should be at most the number of workers. Found {drawn} of "
            f"n={strategy.n}."
        )
    _check_optimizers(strategy)
    if not module.automatic_optimization:
        scalers = [k for k, v in vars(module).items() if isinstance(v, torch.amp.GradScaler)]
        if scalers:
            raise UnsupportedSetupError(
                "Local steps are counted, and a loss scaler of the module's own leaves some out. "
                f"Found {scalers[0]}. Use Trainer(precision='16-mixed'), whose steps are seen."
            )
    if strategy.workers_per_process == 1:
        return
    if trainer.accumulate_grad_batches > 1:
        raise UnsupportedSetupError(
            "In-process workers take a local step with every batch. Found "
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}. Use 1 and a larger "
            "batch_size, or one worker per process."
        )
    if strategy.vectorize is True:
        raise UnsupportedSetupError(
            "With local_steps in-process workers have parameters and optimizers of their own, and "
            "are computed one after the other. Found vectorize=True. Leave it out."
        )


def _check_optimizers(strategy: Any) -> None:
    """Refuses parameters that several optimizers have."""
    seen: set[int] = set()
    for optimizer in strategy.optimizers:
        mine = {id(p) for part in optimizer.param_groups for p in part["params"]}
        if seen & mine:
            raise UnsupportedSetupError(
                "With local_steps every parameter should belong to one optimizer. Found "
                f"{len(seen & mine)} that several optimizers have. Give each to one."
            )
        seen |= mine


def check_all_gather(strategy: Any, sync_grads: bool) -> None:
    """Refuses what would let workers into each other's gradients, or gather parts that are not
    there.

    Args:
        strategy: the RobustStrategy.
        sync_grads: whether gradients are to flow through.

    Raises:
        UnsupportedSetupError: says what to do instead.
    """
    if sync_grads and strategy.n > 1:
        raise UnsupportedSetupError(
            "all_gather(sync_grads=True) would let each worker into the others' gradients, past "
            "the rule. Use sync_grads=False: the other workers' parts are then constants."
        )
    workers = strategy.workers_per_process
    if workers > 1 and strategy.sync is not None and strategy.sync.in_training_step:
        raise UnsupportedSetupError(
            "self.all_gather in training_step would gather the parts of all workers, of which "
            f"in-process workers (workers_per_process={workers}) compute one after the other. Use "
            "one worker per process: Trainer(devices=n)."
        )


def explain_one_sample(error: ValueError, samples: int, workers_per_process: int) -> None:
    """Raises the error of a training step in words about workers, if a norm layer was given one
    sample.

    Args:
        error: what the step raised.
        samples: how many samples the worker had.
        workers_per_process: workers of this process, whose parts of the batch are cut from it.
    """
    if samples == 1 and workers_per_process > 1 and "more than 1 value per channel" in str(error):
        raise ValueError(
            "Batch normalization needs at least two samples for each worker. Found one, because "
            f"a batch is cut among {workers_per_process} in-process workers. Use a batch_size of "
            f"at least {2 * workers_per_process} (and drop_last=True), fewer workers_per_process, "
            f"or a norm that looks at one sample, such as GroupNorm. torch said: {error}"
        ) from error
