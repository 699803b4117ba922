"""Several processes as one command: they start together, go by what the first decides, and end together.

JAX runs one program in all of them, and its arrays span them. What it leaves to the program is here: a decision that
one takes and all follow, an error or a signal at one that ends all within seconds in the same way, and one that died
and is missed. A few small messages go through the service that JAX's processes meet at, which process 0 runs. One
process alone decides, and is signalled, in the same way without them.
"""

import ctypes
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # the service's messages have no public name
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from hgdpo_jax.run.errors import Stopped, UserError

GOES_ON = 75  # exit code of what should be started again: the launchers do
STOPPED = {signal.SIGTERM: GOES_ON, signal.SIGINT: 130}
_TOGETHER = 300  # seconds in which all must have started
_BEAT, _DEAD, _DEAD_FOR_JAX = 1.0, 30.0, 80  # seconds between two signs of life, and without one
_GRACE = 300.0  # seconds in which a training that was asked to stop has saved, or ends as it is
_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds: what process 0 does for all may take long
_started = False
_numbers = itertools.count()  # of messages; every process counts the same


def start() -> None:
    """Joins the other processes, where `HGDPO_DISTRIBUTED=1` says that there are some, and listens for signals.
    A second call does nothing.

    JAX finds them by itself on a Cloud TPU pod, under Slurm and Open MPI and in a GKE JobSet; elsewhere
    `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say where they are.

    Raises:
        UserError: nothing says where, or not all came in time.
    """
    global _started
    if _started:
        return
    _started = True
    if os.environ.get("HGDPO_DISTRIBUTED") == "1":
        _join()
    _listen()


def _join() -> None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, index = (os.environ.get(name) for name in names)
    for name, value in zip(names[1:], (count, index), strict=True):
        if value is not None and not value.isdecimal():
            raise UserError(f"{name}={value}: expects a number")
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, which :func:`_listen` does
    _say_why_jax_aborts()
    try:
        jax.distributed.initialize(
            address,
            None if count is None else int(count),
            None if index is None else int(index),
            initialization_timeout=_TOGETHER,
            heartbeat_timeout_seconds=_DEAD_FOR_JAX,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"HGDPO_DISTRIBUTED=1: the other processes are not found ({error}); set {', '.join(names)}, or "
                        "start it on a TPU pod, under Slurm or in a JobSet") from error  # fmt: skip
    except RuntimeError as error:
        raise UserError(_not_all()) from error
    client = distributed.global_state.client
    client.key_value_set(f"hgdpo/host/{jax.process_index()}", socket.gethostname())
    if not is_first():  # one voice: errors and warnings come from all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _watch.start()


def _not_all() -> str:
    state = distributed.global_state
    return (f"{process_name()}: not all {state.num_processes} processes came to {state.coordinator_address} within "
            f"{_TOGETHER} s; those that do not say this have not started, or cannot reach it")  # fmt: skip


def is_alone() -> bool:
    """Whether there is but this process."""
    return distributed.global_state.num_processes == 1


def process_name() -> str:
    """Which process this is, in words."""
    return f"process {distributed.global_state.process_id} on {socket.gethostname()}"


def is_first() -> bool:
    """Whether this is process 0, which writes what all share."""
    return distributed.global_state.process_id == 0


def broadcast(decide: Callable[[], Any]) -> Any:
    """What process 0 decides, on all of them; the others wait for it. A value that JSON can hold."""
    client, name = distributed.global_state.client, f"hgdpo/decision/{next(_numbers)}"
    if is_alone():
        return json.loads(json.dumps(decide()))
    if not is_first():
        return json.loads(client.blocking_key_value_get(name, _FOREVER))
    text = json.dumps(decide())
    client.key_value_set(name, text)
    return json.loads(text)


def barrier(name: str | None = None) -> None:
    """Waits until all processes are here. Beside the main thread it takes a name, which is used but once: the number
    that the main thread's get would differ between processes."""
    name = f"hgdpo/together/{next(_numbers) if name is None else name}"
    if not is_alone():
        distributed.global_state.client.wait_at_barrier(name, _FOREVER)


def require_same(what: dict[str, str]) -> None:
    """Raises UserError, which names this host, where it was started with something else than process 0 was."""
    host, wanted = broadcast(lambda: [socket.gethostname(), what])
    for key, value in what.items():
        if wanted.get(key) != value:
            raise UserError(f"{process_name()}: its {key} is {value}, that of process 0 on {host} is "
                            f"{wanted.get(key)}; start all with the same")  # fmt: skip
    barrier()


def map_over_processes(count: int, work: Callable[[np.ndarray], Any], few: int | None = None, name: str = "") -> Any:
    """Work on many things, each process on its part of them; all get all results.

    Args:
        count: of things.
        work: gets the numbers of some, [k], and returns a pytree of host arrays of k rows.
        few: so many things of a process at most are worked on at once, where what they need would not fit in memory.
        name: of the work, for the progress bar over the few.
    """
    processes = jax.process_count()
    part = -(-count // processes)
    # The last processes may have less to do: they do the last thing again, since all must bring as many rows.
    mine = np.minimum(np.arange(part) + jax.process_index() * part, count - 1)
    begins = range(0, part, few or part)
    bar = tqdm(begins, desc=name, unit="batch", leave=False, disable=len(begins) < 2 or not is_first())
    parts = [work(mine[begin : begin + begins.step]) for begin in bar]
    done = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    if processes == 1:
        return done
    gathered = multihost_utils.process_allgather(done)
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:count], gathered)


class _Watch(threading.Thread):
    """Shows the others that this process lives, misses the next one, and hears of an end or of a wish to stop."""

    def __init__(self) -> None:
        super().__init__(name="hgdpo processes", daemon=True)
        self.left = False
        self.end: dict[str, Any] = {}  # what all were told to end with

    def run(self) -> None:
        client, index, count = distributed.global_state.client, jax.process_index(), jax.process_count()
        next_one, seen, at = (index + 1) % count, "", time.monotonic()
        for beat in itertools.count():
            if self.left:
                return
            try:
                client.key_value_set(f"hgdpo/beat/{index}", str(beat), allow_overwrite=True)
                end = _message("hgdpo/end")
                if end is not None:
                    self.end = json.loads(end)
                    _exit_last(**self.end)
                stop = _message("hgdpo/stop")
                if stop is not None:
                    stopping.ask(signal.Signals(int(stop)))
                found = _message(f"hgdpo/beat/{next_one}") or ""
            except RuntimeError:  # the service is gone, and JAX is about to say so
                time.sleep(_DEAD_FOR_JAX)
                continue
            if found != seen or self.left:
                seen, at = found, time.monotonic()
            elif time.monotonic() - at > _DEAD:
                host = _message(f"hgdpo/host/{next_one}")
                end_all(f"error: process {next_one} on {host} has given no sign of life for {_DEAD:.0f} s: all stop; "
                        "the same command goes on from what is finished", GOES_ON)  # fmt: skip
            time.sleep(_BEAT)


_watch = _Watch()


def _message(key: str) -> str | None:
    try:
        return distributed.global_state.client.key_value_try_get(key)
    except RuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _of_all(folder: str, count: int, seconds: float) -> list[str]:
    """The messages below a name, once there are `count`, or those that have come by then. However many processes there
    are, it asks no oftener."""
    client, until = distributed.global_state.client, time.monotonic() + seconds
    while True:
        found = client.key_value_dir_get(f"{folder}/")
        if len(found) >= count or time.monotonic() > until:
            return [value for _, value in found]
        time.sleep(0.1)


class Stopping:
    """A training that a signal does not end at once, but after a step, whose state is saved. A second signal does.

    Steps of several processes run apart by a few. Once a process has heard of the wish to stop, its own or another's,
    it promises not to go further than its next step before it knows the promises of all; all stop after the largest.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: signal.Signals | None = None
        self._step, self._promise = -1, 0
        self.patient = False

    def __enter__(self) -> "Stopping":
        self.patient = True
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.patient = False
        if kind is None and self._asked is not None:  # with the last step
            self.stop()

    def ask(self, asked: signal.Signals) -> None:
        """Called from any thread, as often as it likes."""
        with self._lock:
            if self._asked is not None:
                return
            self._asked, self._promise = asked, self._step + 1
        if not is_alone():
            client = distributed.global_state.client
            with suppress(RuntimeError):  # another was faster
                client.key_value_set("hgdpo/stop", str(int(asked)))
            client.key_value_set(f"hgdpo/promise/{jax.process_index()}", str(self._promise))
        line = f"error: could not save within {_GRACE:.0f} s of the signal; the same command goes on from before"
        late = threading.Timer(_GRACE, end_all, (line, STOPPED[asked]))
        late.daemon = True
        late.start()

    def after(self, step: int) -> bool:
        """Whether all processes stop after this step, whose state they should then save. Called after every step."""
        with self._lock:
            self._step = max(self._step, step)
            if self._asked is None or step < self._promise:
                return False
        promises = [self._promise] if is_alone() else map(int, _of_all("hgdpo/promise", jax.process_count(), math.inf))
        return step >= max(promises)

    def stop(self) -> NoReturn:
        """Raises Stopped, once the state is saved."""
        assert self._asked is not None
        raise Stopped(STOPPED[self._asked])


stopping = Stopping()


def _listen() -> None:
    """A thread hears of signals, whatever the main thread is doing: compiling, or waiting for other processes."""
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in STOPPED:
        signal.signal(number, lambda *_: None)

    def hear() -> None:
        heard = 0
        while True:
            number = os.read(reader, 1)[0]
            if number not in map(int, STOPPED):
                continue
            heard += 1
            if heard > 1 or not stopping.patient:
                end_all("stopped; the same command goes on from what is finished", STOPPED[signal.Signals(number)])
            os.write(2, b"\nstopping once this step is saved; a second signal stops at once\n")
            stopping.ask(signal.Signals(number))

    threading.Thread(target=hear, name="hgdpo signals", daemon=True).start()


def end_all(line: str, code: int) -> NoReturn:
    """Ends this process and all others at once, each with this line and this exit code.

    Files are whole or absent, so that nothing is lost; an exception could be swallowed by a library, and JAX's own end
    would wait minutes for processes that hang.
    """
    client = distributed.global_state.client
    if not is_alone():
        with suppress(RuntimeError):  # another said it before, or the service is gone
            client.key_value_set("hgdpo/end", json.dumps({"line": line, "code": code}))
        _exit_last(line, code)
    _exit(line, code)


def _exit_last(line: str, code: int) -> NoReturn:
    """As :func:`_exit`, process 0 after the others: its service has to outlive what they read in it."""
    with suppress(RuntimeError):  # another thread of this process was faster, or the service is gone
        if is_first():
            _of_all("hgdpo/ended", jax.process_count() - 1, 15.0)
            time.sleep(_BEAT)
        else:
            distributed.global_state.client.key_value_set(f"hgdpo/ended/{jax.process_index()}", "")
    _exit(line, code)


def _exit(line: str, code: int) -> NoReturn:
    os.write(2, f"\n{line}\n".encode())
    with suppress(RuntimeError, ValueError):  # what is just being written cannot be flushed
        sys.stdout.flush()
    os._exit(code)


def fail(error: BaseException) -> NoReturn:
    """Ends all processes after an error that is not the user's. Where it came because another process died, that is
    what is said: it will have been missed by then."""
    print(f"{process_name()}: an error; waiting to see whether another process died", file=sys.stderr)
    time.sleep(_DEAD + 5 * _BEAT)
    traceback.print_exception(error)
    end_all(f"error: {process_name()} failed, as it says in its own log", 1)


def leave() -> None:
    """The end of a command that did what it should, or stopped where all agreed to. The last message of all."""
    if not is_alone():
        barrier()
        _watch.left = True
        barrier()  # nobody goes while somebody still looks after him


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    if _watch.ident is None:  # they have not met yet
        os.write(2, f"\nerror: {_not_all()}\n".encode())
        os._exit(1)
    if _watch.end:  # process 0 went before this one had said it
        _exit(**_watch.end)
    os.write(2, b"\nerror: JAX has ended this process, as it says above; most likely process 0, which the others meet "
                b"at, is gone. The same command goes on from what is finished\n")  # fmt: skip
    os._exit(GOES_ON)


def _say_why_jax_aborts() -> None:
    """Without its service JAX aborts from a thread of its own, with a stack of C++: the last word should be ours."""
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(_aborted, ctypes.c_void_p))
