"""A process for one answer: it gives it, or says why not, and leaves nothing."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from hgdpo_jax.planning.isolation import in_subprocess
from hgdpo_jax.run.errors import UserError
from tests.patience import patience


def answer(about: int) -> tuple[int, int, str]:
    """While a thread of its own goes on writing."""
    folder = tempfile.mkdtemp()
    threading.Thread(target=write, args=(folder,)).start()
    return about + 1, os.getpid(), folder


def write(folder: str) -> None:
    for number in range(60_000):
        (Path(folder) / str(number)).touch()
        time.sleep(0.01)


def fail() -> None:
    raise UserError("config key x: is wrong")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait() -> None:
    print(tempfile.mkdtemp(), flush=True)
    time.sleep(600)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_process_ends_with_its_answer() -> None:
    found, pid, folder = in_subprocess(answer, 41)
    assert found == 42 and pid != os.getpid() and not alive(pid) and not Path(folder).parent.exists()


def test_errors_come_with_the_place_where_they_arose() -> None:
    with pytest.raises(UserError, match="^config key x: is wrong$") as caught:
        in_subprocess(fail)
    assert "in fail" in str(caught.value.__cause__)
    with pytest.raises(UserError, match=r"was ended with -9; where memory ran out \(-9\)"):
        in_subprocess(die)


def test_it_ends_with_who_asked_for_it() -> None:
    """Who is killed cannot tell it to."""
    code = (
        "from hgdpo_jax.planning.isolation import in_subprocess; from tests.planning.test_isolation import wait; "
        "in_subprocess(wait)"
    )
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert asking.stdout
    folder = Path(asking.stdout.readline().strip())
    assert folder.is_dir()
    asking.kill()
    assert asking.communicate(timeout=patience(15)) == (
        "",
        None,
    )  # no process holds the pipe
    assert not folder.exists()
