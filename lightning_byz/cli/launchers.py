"""Where the cells of a grid run: processes of this machine, jobs of SLURM, or tasks of Ray.

A `Launcher` gets the cells that have no result yet, and gives their results as they come.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

from lightning_byz.cli import grid_cells
from lightning_byz.cli.grid_file import Grid, GridError
from lightning_byz.optional_dependencies import require

log = logging.getLogger("lightning_byz")

LOG = "log.txt"
"""Of a grid's folder: what the runs printed."""

Result = dict[str, Any]
Results = Generator[tuple[str, Result], None, None]
Cells = Iterable[tuple[str, Mapping[str, Any]]]
"""Names and configurations of cells. The next one is made ready when it is asked for."""


class Launcher(ABC):
    """Runs cells of a grid.

    Args:
        grid: whose cells they are.
        output: the grid's folder.
        jobs: the most cells at a time; None: as many as there is room for.

    Raises:
        GridError: if the launcher cannot be used here.
    """

    def __init__(self, grid: Grid, output: Path, jobs: int | None) -> None:
        self.grid, self.output, self.jobs = grid, output, jobs

    @property
    def where(self) -> str:
        """Where they run, and how many at a time, for people."""
        room = "as many at a time as there is room for"
        return (room if self.jobs is None else f"{self.jobs} at a time") + self.place

    place: ClassVar[str] = ""
    """Where, as the end of a sentence."""

    @abstractmethod
    def results(self, cells: Cells) -> Results:
        """Runs the cells, and gives the results by name as they come.

        Closing the iterator ends the cells that run.
        """

    def _log(self, said: str) -> None:
        """Keeps what a run elsewhere has printed."""
        with (self.output / LOG).open("a") as file:
            file.write(said)


def _died(reason: str) -> Result:
    """The result of a cell whose process gave none."""
    return {"status": "failed", "reason": reason, "curve": {}, "seconds": None}


# -- this machine ----------------------------------------------------------------------------------


class _Worker:
    """A process that runs cells, and is started anew after one that killed it."""

    def __init__(self, said: Path, threads: int) -> None:
        self._arguments = (str(said), threads)
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), grid_cells.prepare, self._arguments
        )
        self._pid = self._pool.submit(grid_cells.pid)

    def submit(self, config: Mapping[str, Any], metric: str) -> Future[Result]:
        return self._pool.submit(grid_cells.run, config, metric)

    def restart(self) -> None:
        self._pool.shutdown(wait=False)
        self._start()

    def end(self) -> None:
        """At once, whatever it does."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._pid.done() and self._pid.exception() is None:
            try:
                os.kill(self._pid.result(), signal.SIGKILL)
            except ProcessLookupError:
                return


class LocalLauncher(Launcher):
    """Processes of this machine, which stay warm between cells; one for each core by default."""

    def __init__(self, grid: Grid, output: Path, jobs: int | None) -> None:
        super().__init__(grid, output, jobs or os.cpu_count() or 1)

    def results(self, cells: Cells) -> Results:
        assert self.jobs is not None
        waiting, said = iter(cells), self.output / LOG
        first = list(itertools.islice(waiting, self.jobs))
        threads = max(1, (os.cpu_count() or 1) // max(1, len(first)))
        running: dict[Future[Result], tuple[str, _Worker]] = {}
        workers = [_Worker(said, threads) for _ in first]
        try:
            for worker, (name, config) in zip(workers, first, strict=True):
                running[worker.submit(config, self.grid.metric)] = name, worker
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    name, worker = running.pop(future)
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        result = _died(
                            f"its process died, for want of memory perhaps; {said} holds what it "
                            "said last"
                        )
                        worker.restart()
                    for following, config in itertools.islice(waiting, 1):
                        running[worker.submit(config, self.grid.metric)] = following, worker
                    yield name, result
        finally:
            for worker in workers:
                worker.end()


# -- SLURM -----------------------------------------------------------------------------------------


class SlurmLauncher(Launcher):
    """A job of SLURM for each cell, all in one array, by submitit.

    The grid file's ``slurm`` says what a job gets: parameters of submitit's SlurmExecutor. The
    grid's folder should be one that all nodes see.
    """

    place = ", as jobs of SLURM"
    pause = 2.0
    """Seconds between looks at the queue."""
    patience = 15.0
    """Seconds that a file system may take to show the result of a job that has ended."""

    def __init__(self, grid: Grid, output: Path, jobs: int | None) -> None:
        super().__init__(grid, output, jobs)
        require("lightning-byz grid --launcher slurm", "slurm", "submitit")
        missing = [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]
        if missing:
            raise GridError(
                "--launcher slurm should be used where jobs can be submitted. Not found: "
                f"{', '.join(missing)}. Log in to a host of the cluster that has them, or use "
                "--launcher local."
            )
        import submitit

        (output / "slurm").mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=time.strftime("%Y-%m-%d_%H-%M-%S_"), dir=output / "slurm")
        # Without srun there are no tasks of a parallel program, such as MPI's, to take a cell for.
        defaults = {"job_name": grid.name, "time": 60, "use_srun": False}
        parameters = {**defaults, **grid.launchers["slurm"]}
        if jobs is not None:
            parameters["array_parallelism"] = jobs
        self._threads = int(parameters.get("cpus_per_task", 1))
        self._executor = submitit.SlurmExecutor(Path(folder).resolve())
        try:
            self._executor.update_parameters(**parameters)
        except ValueError as error:
            raise GridError(f"`slurm` in the grid file: {error}") from None

    def results(self, cells: Cells) -> Results:
        ready = dict(cells)
        if not ready:
            return
        metrics = [self.grid.metric] * len(ready)
        run = partial(grid_cells.run_elsewhere, os.getcwd(), sys.path, self._threads)
        try:
            jobs = self._executor.map_array(run, ready.values(), metrics)
        except Exception as error:  # submitit's own, or a subprocess's
            raise GridError(f"SLURM has not taken the jobs. It said: {error}") from error
        running = dict(zip(ready, jobs, strict=True))
        left: dict[str, float] = {}  # those that the queue does not know any more, and since when
        try:
            while running:
                queued = _queued()
                for name, job in list(running.items()):
                    there = job.paths.result_pickle.exists()
                    if not there and (queued is None or job.job_id in queued):
                        continue
                    since = left.setdefault(name, time.monotonic())
                    if there or time.monotonic() - since > self.patience:
                        del running[name]
                        yield name, self._result(job) if there else _died(_why(job))
                time.sleep(self.pause if running else 0)
        finally:
            if running:
                subprocess.run(["scancel", *(job.job_id for job in running.values())], check=False)

    def _result(self, job: Any) -> Result:
        error = job.exception()
        if error is not None:
            self._log(f"{error}\n")
            return _died(str(error).strip().splitlines()[-1])
        result, said = job.result()
        self._log(said)
        return dict(result)


def _queued() -> set[str] | None:
    """The jobs of this user that wait or run; None: SLURM does not answer."""
    command = ["squeue", "--array", "--noheader", "--format=%i", f"--user={os.getuid()}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(done.stdout.split()) if done.returncode == 0 else None


def _why(job: Any) -> str:
    """What a job that has ended without a result said last."""
    said = (job.stderr() or "").strip().splitlines()
    return (
        f"its job {job.job_id} ended without a result: {said[-1] if said else 'it said nothing'} "
        f"({job.paths.stderr})"
    )


# -- Ray -------------------------------------------------------------------------------------------


class RayLauncher(Launcher):
    """A task of Ray for each cell, on the cluster that RAY_ADDRESS names, or on this machine.

    The grid file's ``ray`` says what a task gets: options of a remote function, such as
    ``num_cpus`` (1 by default) and ``num_gpus``. All nodes should see the same files.
    """

    place = ", as tasks of Ray"

    def __init__(self, grid: Grid, output: Path, jobs: int | None) -> None:
        super().__init__(grid, output, jobs)
        require("lightning-byz grid --launcher ray", "ray", "ray")
        import ray

        self._options = {"num_cpus": 1, "max_retries": 0, **grid.launchers["ray"]}
        self._threads = max(1, int(self._options["num_cpus"]))
        try:
            self._run = ray.remote(grid_cells.run_elsewhere).options(**self._options)
        except (TypeError, ValueError) as error:
            raise GridError(f"`ray` in the grid file: {error}") from None

    def results(self, cells: Cells) -> Results:
        import ray

        waiting, running = iter(cells), {}
        first = list(itertools.islice(waiting, 1))
        if not first:
            return
        ours = not ray.is_initialized()
        if ours:
            before = signal.getsignal(signal.SIGTERM)
            ray.init(log_to_driver=False, logging_level="error")
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray's would end the program at once
        self._warn_if_no_node_suffices(ray.nodes())
        waiting = itertools.chain(first, waiting)
        here = os.getcwd(), sys.path, self._threads

        def give(most: int | None) -> None:
            for name, config in itertools.islice(waiting, most):
                running[self._run.remote(*here, config, self.grid.metric)] = name

        try:
            give(self.jobs)
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                name = running.pop(done)
                give(1)
                try:
                    result, said = ray.get(done)
                except ray.exceptions.RayError as error:
                    result, said = _died(_first_line(error)), f"{error}\n"
                self._log(said)
                yield name, result
        finally:
            for task in running:
                ray.cancel(task, force=True)
            if ours:
                ray.shutdown()

    def _warn_if_no_node_suffices(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        """Ray keeps tasks waiting for a node that may never come."""
        asked = {
            "CPU": self._options["num_cpus"],
            "GPU": self._options.get("num_gpus") or 0,
            **self._options.get("resources", {}),
        }
        have = [node["Resources"] for node in nodes if node["Alive"]]
        if not any(all(room.get(k, 0) >= v for k, v in asked.items()) for room in have):
            found = "; ".join(str({k: room.get(k, 0) for k in asked}) for room in have)
            log.warning(
                f"A node of Ray's should have room for a cell, which asks for {asked}. Found "
                f"{found}. The cells wait until such a node joins. Lower `ray` in the grid file, "
                "or add nodes."
            )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


LAUNCHERS: dict[str, type[Launcher]] = {
    "local": LocalLauncher,
    "slurm": SlurmLauncher,
    "ray": RayLauncher,
}
"""By the name that ``--launcher`` takes."""
