"""`densegeo infer --ray`: the images of a run over the actors of a Ray cluster, by Ray Data.

The driver plans, keeps the journal and counts, as without Ray; actors read, run and save. A block of images whose actor
dies is done again by another one, which leaves out what is whole. The images of a block that never comes back are tried
once more, each by itself, and what then does not come back has failed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densegeo.errors import BackendError, BackendTimeoutError, DensegeoError
from densegeo.fleet.ray_cluster import connected, for_process, resources, share
from densegeo.fleet.shards import CONTAINERS, Shards
from densegeo.infer_options import in_options
from densegeo.inference import FATAL, Making, Outcome, Tally, reason, run_one, save_one, take
from densegeo.inputs import Input
from densegeo.notices import Notices
from densegeo.records import Results
from densegeo.runtime import Estimator
from densegeo.signals import EXIT_HUNG

if TYPE_CHECKING:
    from densegeo.infer_run import Run

log = logging.getLogger("densegeo.fleet")

TREE = "tree"
INTO = (TREE, *CONTAINERS)
BLOCK = 32  # the most images that an actor is handed at once, and that a shard holds
SHARE = 4  # blocks an actor at least, so that all end at about one time
SAY_S = 60.0  # without a result, after which it is said
TRIES = 4  # of a block whose actor dies, or whose node leaves
_LOST = f"The process that worked on it died, {TRIES} times with others and {TRIES} times with this one alone."


@dataclass(frozen=True)
class RayOptions:
    """address: "local" for a Ray of this process's own, "auto", or the address of a cluster. actors: how many, None for
    one a GPU, or as many as the cluster's CPUs carry. cpus: of each. into: of `INTO`.
    """

    address: str
    actors: int | None = None
    cpus: int = 1
    into: str = TREE


@dataclass(frozen=True)
class Job:
    """What every actor is told. results: of this run's folder, and maker, anew in each process."""

    bundle: Path
    estimator: dict[str, Any]
    making: Making
    folder: Path
    maker: dict[str, Any]
    into: str
    workers: int
    overwrite: bool

    def results(self) -> Results:
        """The output folder, as it is now."""
        return results_of(self.folder, self.maker, self.into)


def results_of(folder: Path, maker: dict[str, Any], into: str) -> Results:
    """The output folder: a tree, or shards."""
    return Results(folder, maker) if into == TREE else Shards(folder, maker, CONTAINERS[into])


class Worker:
    """An actor: an estimator, and threads that read, run and save one block of images after the other."""

    def __init__(self, job: Job) -> None:
        self._job, self._notices, self._results = job, Notices(words=in_options), job.results()
        calls = max(1, min(job.workers, os.cpu_count() or 1))
        self._unusable: Exception | None = None
        try:
            self._estimator = Estimator(job.bundle, **job.estimator, calls_at_once=calls)
        except Exception as error:
            if not _restarted():
                raise
            self._unusable = error  # Ray Data would wait for ever for an actor that cannot be made again

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        """Columns name and path of images -> columns name and outcome, JSON.

        Raises what an actor that was started again met where it opened the bundle.
        """
        if self._unusable is not None:
            raise self._unusable
        inputs = [Input(str(path), str(name)) for path, name in zip(block["path"], block["name"], strict=True)]
        with self._notices.collected(), ThreadPoolExecutor(self._job.workers) as pool:
            try:
                outcomes = self._tree(pool, inputs) if self._job.into == TREE else self._shard(pool, inputs)
            except BackendTimeoutError:  # its thread cannot be stopped: another process tries
                logging.shutdown()
                os._exit(EXIT_HUNG)
        encoded = [json.dumps([outcome.files, outcome.error, outcome.warnings]) for outcome in outcomes]
        return {"name": [item.name for item in inputs], "outcome": encoded}

    def _tree(self, pool: ThreadPoolExecutor, inputs: Sequence[Input]) -> list[Outcome]:
        def infer(item: Input) -> Outcome:
            if not self._job.overwrite and (files := self._results.done_meanwhile(item)):
                return Outcome(item, tuple(files))
            with self._notices.about(item.path) as texts:
                return run_one(self._estimator, item, self._job.making, self._results, texts)

        return list(pool.map(infer, inputs))

    def _shard(self, pool: ThreadPoolExecutor, inputs: Sequence[Input]) -> list[Outcome]:
        shards = self._results
        assert isinstance(shards, Shards)

        def infer(item: Input) -> tuple[Outcome, dict[str, bytes]]:
            with self._notices.about(item.path) as texts, tempfile.TemporaryDirectory() as folder:
                try:
                    making, maker = self._job.making, self._job.maker
                    paths = save_one(self._estimator, item, making, maker, texts, Path(folder), "")
                    sample = {path.name: path.read_bytes() for path in paths}
                except FATAL:
                    raise
                except (DensegeoError, OSError, MemoryError) as error:
                    return Outcome(item, error=reason(error), warnings=tuple(texts)), {}
                return Outcome(item, warnings=tuple(texts)), sample

        pairs = list(pool.map(infer, inputs))
        samples = {outcome.item.name: sample for outcome, sample in pairs if not outcome.error}
        file = shards.write(inputs, samples) if samples else ""
        return [replace(outcome, files=() if outcome.error else (file,)) for outcome, _ in pairs]


def _restarted() -> bool:
    """Whether Ray started this actor again, after it had died."""
    import ray

    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def run_on_ray(
    run: Run, making: Making, results: Results, todo: Sequence[Input], tally: Tally, advance: Callable[[], None]
) -> None:
    """Work through images on a cluster; `tally` and the journal say how each went, also when this is interrupted.

    Raises ConfigError where there is no cluster, BackendError where no actor can run the bundle.
    """
    options = run.ray
    assert options is not None
    job = Job(
        bundle=run.bundle.absolute(),
        estimator=run.estimator,
        making=making,
        folder=results.folder.absolute(),
        maker=dict(results.maker),
        into=options.into,
        workers=run.workers,
        overwrite=run.overwrite,
    )
    unfinished = {item.name: item for item in todo}
    # As many actors as were asked for, also where they share the CPUs of this machine.
    with connected(options.address, (options.actors or 0) * options.cpus) as ray:
        for at_once in (BLOCK, 1):
            for outcome in _outcomes(ray, job, options, list(unfinished.values()), at_once) if unfinished else ():
                item = unfinished.pop(outcome.item.name, None)
                if item is None:
                    continue  # a block that was done twice
                outcome = replace(outcome, item=item)
                for text in outcome.warnings:
                    tally.notices.count(text, item.path)
                take(outcome, results, tally)
                advance()
    for item in unfinished.values():
        take(Outcome(item, error=_LOST), results, tally)
        advance()


def _outcomes(ray: Any, job: Job, options: RayOptions, todo: Sequence[Input], at_once: int) -> Iterator[Outcome]:
    """As they come; none of a block that is given up. Raises BackendError."""
    import pyarrow
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1
    needs, fit = share(resources(ray), job.estimator["device"], options.cpus, "actor")
    most_actors = options.actors or fit
    size = max(1, min(at_once, len(todo) // (SHARE * most_actors)))
    blocks = [
        pyarrow.table({"name": [item.name for item in part], "path": [item.path for item in part]})
        for part in (todo[start : start + size] for start in range(0, len(todo), size))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.60 says that it will name the limit on tries otherwise from 2.64 on
        # `from_arrow` would start a task a block, and wait for all of them, to count the block's rows.
        rows = ray.data.from_blocks(blocks).map_batches(
            Worker,
            batch_size=None,
            fn_constructor_args=(replace(job, estimator=for_process(job.estimator, needs)),),
            # One block at a time, so that a block that kills its actor takes no other with it.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most_actors, max_tasks_in_flight_per_actor=1),
            ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": TRIES - 1},
            **needs,
        )
    try:
        with _saying(ray, needs) as result_came:
            for row in rows.iter_rows():
                result_came()
                files, error, warned = json.loads(row["outcome"])
                yield Outcome(Input("", row["name"]), tuple(files), error, tuple(warned))
    except (ray.exceptions.RayError, ray.exceptions.RaySystemError) as error:
        cause = error.__cause__ or error
        raise BackendError(f"The actors of Ray cannot run {job.bundle}: {cause}") from error


@contextlib.contextmanager
def _saying(ray: Any, needs: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Inside, a line in the log says when nothing came for long, and what of the cluster is free. To be called when
    something came.
    """
    ended, last_result = threading.Event(), time.monotonic()

    def result_came() -> None:
        nonlocal last_result
        last_result = time.monotonic()

    def watch() -> None:
        while not ended.wait(SAY_S):
            if (seconds := time.monotonic() - last_result) >= SAY_S:
                log.warning("%s", _waiting(seconds, needs, ray.available_resources()))

    thread = threading.Thread(target=watch, name="densegeo-waiting", daemon=True)
    thread.start()
    try:
        yield result_came
    finally:
        ended.set()
        thread.join()


def _waiting(seconds: float, needs: Mapping[str, Any], free: Mapping[str, float]) -> str:
    resource_of = {"num_cpus": "CPU", "num_gpus": "GPU"}
    free_amounts = " and ".join(f"{free.get(resource_of[key], 0):g} {resource_of[key]}" for key in needs)
    needed_amounts = " and ".join(f"{count} {resource_of[key]}" for key, count in needs.items())
    return f"No result came for {seconds:.0f} s. Free in the cluster: {free_amounts}; an actor takes {needed_amounts}."
