"""The life of a command's processes: they start together, watch each other, stop at a signal and end together.

Whatever ends one process ends all with one line and one exit code: a mistake of the user within seconds, an unexpected
error or a death after half a minute or more (`_DEAD`, `_DEAD_FOR_JAX`), a signal during training once the step is saved
(`GRACE` at most). A process that is alone listens for signals in the same way.
"""

import ctypes
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the service's messages have no public name

from hgdpo_jax.run.errors import Stopped, UserError
from hgdpo_jax.run.processes import barrier, client, is_alone, is_first, process_name

START_AGAIN = 75  # exit code of what should be started again: the launchers do
EXIT_CODES = {signal.SIGTERM: START_AGAIN, signal.SIGINT: 130}
_START = 300  # seconds in which all must have started
# Seconds between two signs of life, and without one. JAX waits longer: its own line would blame process 0.
_BEAT, _DEAD, _DEAD_FOR_JAX = 1.0, 30.0, 120
GRACE = 300.0  # seconds in which a training that is stopped has to save, or ends as it is; launchers give more
_started = False


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
        if value is not None and not re.fullmatch(r"[0-9]{1,9}", value):
            raise UserError(f"{name}={value}: expects a number")
    if count is not None and index is not None and not int(index) < int(count):
        raise UserError(f"{names[2]}={index}: expects a number below {names[1]}={count}")
    if address is not None:
        host, _, port = address.rpartition(":")
        bare = ":" in host and not re.fullmatch(r"\[.*\]", host)  # an IPv6 address has colons of its own
        if not host or bare or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
            raise UserError(f"{names[0]}={address}: expects HOST:PORT of process 0, such as 10.0.0.1:1234")
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, which :func:`_listen` does
    _catch_abort()
    try:
        jax.distributed.initialize(
            address,
            None if count is None else int(count),
            None if index is None else int(index),
            initialization_timeout=_START,
            heartbeat_timeout_seconds=_DEAD_FOR_JAX,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"HGDPO_DISTRIBUTED=1: the other processes are not found ({error}); set {', '.join(names)}, or "
                        "start it on a TPU pod, under Slurm or in a JobSet") from error  # fmt: skip
    except RuntimeError as error:
        raise UserError(_not_all()) from error
    client().key_value_set(f"hgdpo/host/{jax.process_index()}", socket.gethostname())
    if not is_first():  # process 0 prints for all; errors and warnings come from each
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _watch.start()


def _not_all() -> str:
    state = distributed.global_state
    return (f"{process_name()}: not all {state.num_processes} processes came to {state.coordinator_address} within "
            f"{_START} s; those that do not say this have not started, or cannot reach it")  # fmt: skip


class _Watch(threading.Thread):
    """Shows the others that this process lives, notices the death of the next one, and hears when all shall end or
    stop."""

    def __init__(self) -> None:
        super().__init__(name="hgdpo processes", daemon=True)
        self.leaving = False
        self.end: dict[str, Any] = {}  # line and code that all were told to end with

    def run(self) -> None:
        index, count = jax.process_index(), jax.process_count()
        next_one, seen, at = (index + 1) % count, "", time.monotonic()
        for beat in itertools.count():
            if self.leaving:
                return
            try:
                client().key_value_set(f"hgdpo/beat/{index}", str(beat), allow_overwrite=True)
                end = _message("hgdpo/end")
                if end is not None:
                    self.end = json.loads(end)
                    _exit_in_order(**self.end)
                stop = _message("hgdpo/stop")
                if stop is not None:
                    stopping.ask(signal.Signals(int(stop)))
                found = _message(f"hgdpo/beat/{next_one}") or ""
            except RuntimeError:  # the service is gone, and JAX is about to say so
                time.sleep(_DEAD_FOR_JAX)
                continue
            if found != seen or self.leaving:
                seen, at = found, time.monotonic()
            elif time.monotonic() - at > _DEAD:
                host = _message(f"hgdpo/host/{next_one}")
                end_all(f"error: process {next_one} on {host} has given no sign of life for {_DEAD:.0f} s: all stop; "
                        "the same command goes on from what is finished", START_AGAIN)  # fmt: skip
            time.sleep(_BEAT)


_watch = _Watch()


def _message(key: str) -> str | None:
    try:
        return client().key_value_try_get(key)
    except RuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _messages(folder: str, count: int, seconds: float) -> list[str]:
    """The messages below a name, once there are `count`, or those that have come when the seconds are over. One request
    reads all of them."""
    until = time.monotonic() + seconds
    while True:
        found = client().key_value_dir_get(f"{folder}/")
        if len(found) >= count or time.monotonic() > until:
            return [value for _, value in found]
        time.sleep(0.1)


class Stopping:
    """While it is entered, a signal ends the training after a step, whose state is saved; a second one ends it at once.

    Every step is computed by all processes together, so all have to stop after the same one, but the host of one may be
    some steps ahead. Each publishes the number of its next step (its promise) and waits there until it has read
    everyone's; all go on to the largest, save it and stop.
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
        """Asks all processes to stop; any thread may call it any number of times."""
        with self._lock:
            if self._asked is not None:
                return
            self._asked, self._promise = asked, self._step + 1
        if not is_alone():
            with suppress(RuntimeError):  # another was faster
                client().key_value_set("hgdpo/stop", str(int(asked)))
            client().key_value_set(f"hgdpo/promise/{jax.process_index()}", str(self._promise))
        line = f"error: could not save within {GRACE:.0f} s of the signal; the same command goes on from before"
        late = threading.Timer(GRACE, end_all, (line, EXIT_CODES[asked]))
        late.daemon = True
        late.start()

    def after(self, step: int) -> bool:
        """Whether all processes stop after this step and save its state. Called after every step."""
        with self._lock:
            self._step = max(self._step, step)
            if self._asked is None or step < self._promise:
                return False
        if is_alone():
            return True
        return step >= max(map(int, _messages("hgdpo/promise", jax.process_count(), math.inf)))

    def stop(self) -> NoReturn:
        """Raises Stopped; to be called when saving has begun.

        The `with` block of the checkpoints waits for the files.
        """
        assert self._asked is not None
        raise Stopped(EXIT_CODES[self._asked])


stopping = Stopping()


def _listen() -> None:
    """A thread hears of signals, whatever the main thread is doing: compiling, or waiting for other processes."""
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in EXIT_CODES:
        signal.signal(number, lambda *_: None)

    def hear() -> None:
        heard = 0
        while True:
            number = os.read(reader, 1)[0]
            if number not in map(int, EXIT_CODES):
                continue
            heard += 1
            if heard > 1 or not stopping.patient:
                end_all("stopped; the same command goes on from what is finished", EXIT_CODES[signal.Signals(number)])
            _say("stopping once this step is saved; a second signal stops at once")
            stopping.ask(signal.Signals(number))

    threading.Thread(target=hear, name="hgdpo signals", daemon=True).start()


def end_all(line: str, code: int) -> NoReturn:
    """Ends this process and all others at once, each with this line on stderr and this exit code.

    By `os._exit`: a library could swallow an exception, and JAX's own end would wait minutes for processes that hang.
    That is safe, since files are whole or absent; what was not saved is computed again.
    """
    if not is_alone():
        with suppress(RuntimeError):  # another said it before, or the service is gone
            client().key_value_set("hgdpo/end", json.dumps({"line": line, "code": code}))
        _exit_in_order(line, code)
    _exit(line, code)


def _exit_in_order(line: str, code: int) -> NoReturn:
    """As :func:`_exit`, process 0 after the others: its service has to outlive what they read in it."""
    with suppress(RuntimeError):  # another thread of this process was faster, or the service is gone
        if is_first():
            _messages("hgdpo/ended", jax.process_count() - 1, 15.0)
            time.sleep(_BEAT)
        else:
            client().key_value_set(f"hgdpo/ended/{jax.process_index()}", "")
    _exit(line, code)


def _exit(line: str, code: int) -> NoReturn:
    _say(line)
    with suppress(RuntimeError, ValueError, OSError):  # what is just being written cannot be flushed
        sys.stdout.flush()
    os._exit(code)


def _say(line: str) -> None:
    """A line on stderr, from any thread."""
    with suppress(OSError):  # nobody reads it
        os.write(2, f"\n{line}\n".encode(errors="backslashreplace"))


def fail(error: BaseException) -> NoReturn:
    """Ends all processes after an error that is not the user's. If it came because another process died, the watch says
    so first: it will have noticed by then."""
    print(f"{process_name()}: an error; waiting to see whether another process died", file=sys.stderr)
    time.sleep(_DEAD + 5 * _BEAT)
    traceback.print_exception(error)
    end_all(f"error: {process_name()} failed, as it says in its own log", 1)


def leave() -> None:
    """The end of a command that did its work, or that all processes agreed to stop. No message may follow."""
    if not is_alone():
        barrier()
        _watch.leaving = True
        barrier()  # no process goes while another still watches it


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    if _watch.ident is None:  # they have not met yet
        _say(f"error: {_not_all()}")
        os._exit(1)
    if _watch.end:  # process 0 went before this one had said it
        _exit(**_watch.end)
    _say("error: JAX has ended this process, as it says above; most likely process 0, which the others meet at, is "
         "gone. The same command goes on from what is finished")  # fmt: skip
    os._exit(START_AGAIN)


def _catch_abort() -> None:
    """Where its service is gone, JAX aborts from a thread of its own, with a stack of C++. Python sees no such signal;
    caught here, the last line says what to do, and the exit code is the one after which the launchers start again."""
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(_aborted, ctypes.c_void_p))
