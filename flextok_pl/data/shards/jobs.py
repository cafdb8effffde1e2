"""Work spread over processes: the results come in order, and no process outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

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
    """Run a job for each item, in this process or in several, and show how far it is.

    Args:
        job: picklable, and so are its results.
        items: one for each job.
        num_workers: processes; 0 and 1 are this one, None is one per core.
        description: text of the progress bar.
        unit: of the progress bar.
        sizes: units of each item; default one.

    Returns:
        The results in the order of the items.

    Raises:
        ValueError: `num_workers` is out of range.
        OSError: a worker was killed.
    """
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must be 0 (this process) or more")
    workers = os.cpu_count() or 1 if num_workers is None else num_workers
    done: dict[int, ResultT] = {}
    units = [1] * len(items) if sizes is None else sizes
    with tqdm(total=sum(units), desc=description, unit=unit) as bar:
        for number, result in _in_processes(job, items, workers) if workers > 1 else enumerate(map(job, items)):
            done[number] = result
            bar.update(units[number])
    return [done[number] for number in range(len(items))]


def _in_processes(
    job: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int
) -> Iterator[tuple[int, ResultT]]:
    """Number and result of each item, as they end."""
    # Forking is immediate, and safe here: the jobs use neither torch nor an accelerator.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        futures = {pool.submit(job, item): number for number, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was killed, perhaps for want of memory; give a smaller num_workers (what is complete "
                "is kept)"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this worker when its parent dies: an orphan would write the same files as the run that goes on."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
