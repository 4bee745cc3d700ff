"""What becomes of an estimator in other processes: python -m tests.support.processes BUNDLE BACKEND prints it as JSON.

Every child must end by itself; what an action in a forked child gave is its first word, and the seconds it took.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from densegeo import Estimator
from densegeo.errors import BackendError

HANGS_S = 60.0  # an action that takes longer counts as hanging, on a machine as busy as any
PICTURE = np.random.default_rng(1).integers(0, 256, (96, 128, 3), dtype=np.uint8)


def forked(action: Callable[[], object], leave: Callable[[int], object] = os._exit) -> dict[str, Any]:
    """What `action` gives in a forked child, and the child's status; `leave` ends it."""
    reader, writer = os.pipe()
    started = time.monotonic()
    if (child := os.fork()) == 0:
        outcome = "returned"
        try:
            action()
        except BackendError as error:
            outcome = f"BackendError: {error}"
        except BaseException as error:  # whatever it is, it is the answer
            outcome = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps([outcome, time.monotonic() - started]).encode())
        leave(7)
    os.close(writer)
    while time.monotonic() - started < HANGS_S:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with os.fdopen(reader) as pipe:
                outcome, seconds = json.loads(pipe.read())
            return {"said": outcome, "seconds": seconds, "status": os.waitstatus_to_exitcode(status)}
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return {"said": "hangs", "seconds": HANGS_S, "status": None}


def in_spawned(estimator: Estimator, answers: Any) -> None:
    """In a spawned process: what the estimator that came along makes of the picture."""
    answers.put((estimator.backend, estimator(PICTURE).prediction))


class Pictures:
    """A dataset whose items are results, as a DataLoader's workers compute them."""

    def __init__(self, estimator: Estimator) -> None:
        self.estimator = estimator

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.estimator(np.roll(PICTURE, index, axis=0)).prediction


def loaded(estimator: Estimator, way: str) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    yield from DataLoader(Pictures(estimator), batch_size=None, num_workers=2, multiprocessing_context=way)


def main(bundle: str, backend: str) -> None:
    estimator = Estimator(bundle, backend, max_queue=2)
    expected = estimator(PICTURE).prediction
    actions: dict[str, Callable[[], object]] = {"call": lambda: estimator(PICTURE)}
    outcomes = {"before threads, exit": forked(lambda: None, sys.exit)}
    outcomes["before threads, call"] = forked(actions["call"])
    stream = estimator.stream(latest=False)
    estimator.submit(PICTURE).result()
    stream.put(PICTURE)
    actions |= {
        "submit": lambda: estimator.submit(PICTURE),
        "batch": lambda: estimator.batch([PICTURE]),
        "tensors": lambda: estimator.tensors(PICTURE),
        "put": lambda: stream.put(PICTURE),
        "read": lambda: next(stream),
        "close": estimator.close,
        "close stream": stream.close,
    }
    outcomes |= {"exit": forked(lambda: None, sys.exit)} | {name: forked(action) for name, action in actions.items()}
    same = {"pickled": pickle.loads(pickle.dumps(estimator))(PICTURE).prediction}
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=in_spawned, args=(estimator, answers))
    process.start()
    name, same["spawned"] = answers.get(timeout=HANGS_S)
    process.join(HANGS_S)
    for index, prediction in enumerate(loaded(estimator, "spawn")):
        same[f"loader {index}"] = prediction if index == 0 else expected
        if index:
            assert np.array_equal(prediction, estimator(np.roll(PICTURE, index, axis=0)).prediction)
    try:
        list(loaded(estimator, "fork"))
        refused = "nothing"
    except BackendError as error:
        refused = str(error)
    report = {
        "forked": outcomes,
        "same": {key: bool(np.array_equal(prediction, expected)) for key, prediction in same.items()},
        "spawned": [name, process.exitcode],
        "loader by fork": refused,
        "afterwards": bool(np.array_equal(estimator(PICTURE).prediction, expected)),
    }
    estimator.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
