"""What all processes of a run share: its folders and its index of files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from hgdpo_jax.devices.transfer import Result
from hgdpo_jax.run import processes
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.locks import lock


@contextmanager
def lock_for_all(folder: Path) -> Iterator[None]:
    """See :func:`hgdpo_jax.run.locks.lock`; process 0 owns it for all, which begin and end together."""
    with lock(folder) if processes.is_first() else nullcontext():
        processes.barrier()
        yield
        processes.barrier()


def index_of_run(workdir: Path) -> Index:
    """The index of a run, which process 0 writes."""
    return Index(workdir / "content.json", keep=processes.is_first())


def first_process_first(index: Index, work: Callable[[], Result]) -> Result:
    """The same work on every process: on process 0 first, whose index the others then read, so that they need not look
    into files themselves."""
    if processes.is_first():
        found = work()
        index.save()
        processes.barrier()
        return found
    processes.barrier()
    index.read()
    return work()
