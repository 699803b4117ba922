"""Several processes as one command: process 0 decides for all, and each does its part of the work.

JAX runs one program in all processes, and its arrays span them. What it leaves to the program goes as small messages
through the service where JAX's processes meet, which process 0 runs. A process that is alone needs no messages.
"""

import itertools
import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the service's messages have no public name
from jax.experimental import multihost_utils
from jaxtyping import Int

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import PACKAGE, file_hash, json_hash, write_json
from hgdpo_jax.run.progress import Progress

_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds: what process 0 does for all may take long
_VISIBLE = 30  # seconds until every host sees a new file
_numbers = itertools.count()  # of messages; every process counts the same


def client() -> Any:
    """JAX's client of the service, once the processes have met."""
    return distributed.global_state.client


def is_alone() -> bool:
    """Whether this is the only process."""
    return distributed.global_state.num_processes == 1


def is_first() -> bool:
    """Whether this is process 0, which writes what all share."""
    return distributed.global_state.process_id == 0


def process_name() -> str:
    """Number and host of this process, for messages."""
    return f"process {distributed.global_state.process_id} on {socket.gethostname()}"


def broadcast(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on process 0, which JSON can hold; the others wait for it and do not call `decide`."""
    name = f"hgdpo/decision/{next(_numbers)}"
    if not is_first():
        return json.loads(client().blocking_key_value_get(name, _FOREVER))
    text = json.dumps(decide())
    if not is_alone():
        client().key_value_set(name, text)
    return json.loads(text)


def barrier(name: str | None = None) -> None:
    """Waits until all processes are here. A thread beside the main one gives a `name`, which is used once: its number
    would differ between processes."""
    name = f"hgdpo/barrier/{next(_numbers) if name is None else name}"
    if not is_alone():
        client().wait_at_barrier(name, _FOREVER)


def require_same(what: Mapping[str, str]) -> None:
    """Raises UserError, which names this host, where a value differs from that of process 0."""
    host, wanted = broadcast(lambda: [socket.gethostname(), what])
    for key, value in what.items():
        if wanted.get(key) != value:
            raise UserError(f"{process_name()}: its {key} is {value}, that of process 0 on {host} is "
                            f"{wanted.get(key)}; start all with the same")  # fmt: skip
    barrier()


def require_same_command(folder: Path, settings: Mapping[str, Any], writes: bool = True) -> None:
    """Checks that all processes run the same command, with the same versions, on the same folder.

    Args:
        folder: of a run, or of what is drawn, that all processes read and write.
        settings: what the command line says.
        writes: whether the command may write there; otherwise all have to find the same stages there.

    Raises:
        UserError: something differs from process 0; the message names the host.
    """
    if is_alone():
        return
    code = [file_hash(path) for path in sorted(PACKAGE.rglob("*.py"))]
    require_same(
        {f"version of {name}": version(name) for name in ("jax", "flax", "orbax-checkpoint")}
        | {"hgdpo_jax": json_hash(code)[:12]}
        | {name: str(value) for name, value in settings.items()}
    )
    if not writes:
        stages = {str(path.relative_to(folder)): file_hash(path) for path in folder.glob("*/config.json")}
        require_same({f"content of {folder}": json_hash(stages)[:12]})
        return

    def write() -> str:
        name = f".hosts.{secrets.token_hex(8)}"  # of this command: another may begin on the same folder
        try:
            write_json(folder / name, {})
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
        return name

    mark, until = folder / broadcast(write), time.monotonic() + _VISIBLE
    while not mark.is_file() and time.monotonic() < until:
        time.sleep(1)
    if not mark.is_file():
        raise UserError(f"{folder}: {process_name()} does not see the folder that process 0 sees; all hosts need one "
                        "file system that they share, such as NFS, Lustre or Filestore")  # fmt: skip
    barrier()
    if is_first():
        mark.unlink()


def map_over_processes(
    count: int, work: Callable[[Int[np.ndarray, "n"]], Any], few: int | None = None, name: str = ""
) -> Any:
    """Works on `count` items, each process on its part of them; all processes get all results.

    Args:
        count: of items.
        work: gets the numbers of some items, [n], and returns a pytree of host arrays of n rows.
        few: most items that a process works on at once, where what they need would not fit in memory.
        name: of the work, for the progress bar.
    """
    part = -(-count // jax.process_count())
    # The last processes may have less to do: they repeat the last item, since all must bring as many rows.
    mine = np.minimum(np.arange(part) + jax.process_index() * part, count - 1)
    begins = range(0, part, few or part)
    bar = Progress(begins, desc=name, unit="batch", leave=False, disable=len(begins) < 2)
    parts = [work(mine[begin : begin + begins.step]) for begin in bar]
    done = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    if is_alone():
        return done
    gathered = multihost_utils.process_allgather(done)
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:count], gathered)
