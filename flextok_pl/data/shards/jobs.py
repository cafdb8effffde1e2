"""Run jobs in several processes: results come in order, and no process outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

from tqdm import tqdm

from flextok_pl.data.shards.index import ShardError
from flextok_pl.errors import is_for_the_user

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def run_jobs(
    job: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    num_workers: int | None,
    description: str,
    unit: str,
    sizes: Sequence[int] | None = None,
) -> list[ResultT]:
    """Run a job on each item and yield the results in order, behind a progress bar.

    `num_workers` processes run it, for which job and results must be picklable; 0 and 1 use this process, None one per
    core. The bar counts `sizes` units for the items, default one each. A worker that is killed raises `OSError`.
    """
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must be 0 (this process) or more")
    workers = os.cpu_count() or 1 if num_workers is None else num_workers
    results: list[ResultT] = []
    units = [1] * len(items) if sizes is None else sizes
    with tqdm(total=sum(units), desc=description, unit=unit) as bar:
        for result in _in_processes(job, items, workers) if workers > 1 else map(job, items):
            bar.update(units[len(results)])
            results.append(result)
    return results


def _in_processes(job: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int) -> Iterator[ResultT]:
    # Forking is immediate. It is safe here, because the jobs use neither torch nor an accelerator; on macOS it is not.
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            yield from pool.map(partial(_judged, job), items)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was killed, perhaps because memory ran out; give a smaller num_workers (complete "
                "files are kept)"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _judged(job: Callable[[ItemT], ResultT], item: ItemT) -> ResultT:
    """Run a job in a worker; only there is it known where an error comes from and whether it is for the user."""
    try:
        return job(item)
    except ValueError as error:
        if is_for_the_user(error):
            raise ShardError(str(error)) from error
        raise


def _end_with_parent() -> None:
    """End this worker when its parent dies: an orphan would write the same files as a resumed run."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
