"""The command line that every command shares: `--config FILE[:variant] --workdir DIR --config.key=value …`."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax import files, runtime
from hgdpo_jax.errors import UserError


def parse(description: str, arguments: Sequence[str] | None = None) -> tuple[ConfigDict, Path]:
    """(validated config, workdir) of a command line.

    Raises:
        UserError: an argument or override that does not exist, or a workdir that cannot be used.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog="Any setting: --config.train.lr=1e-5 (python -m hgdpo_jax.config lists them)."
    )
    parser.add_argument("--config", required=True, help="config file with its variant, configs/stage1.py:portraits")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    known, rest = parser.parse_known_args(arguments)
    files.require_plain(known.workdir)
    overrides = []
    for argument in rest:
        if not argument.startswith("--config."):
            raise UserError(f"argument {argument}: unknown; settings are written --config.key=value")
        overrides.append(argument.removeprefix("--config."))
    return configuration.load(known.config, overrides), known.workdir


def run(command: Callable[[], None]) -> None:
    """Runs a command. What the user did wrong, and a full disk, become one line on stderr and exit code 1; Ctrl-C one
    line and exit code 130."""
    before = signal.signal(signal.SIGINT, _stop)
    try:
        runtime.start()
        command()
    except UserError as error:
        _end(f"error: {error}", 1)
    except Exception as error:
        reason = _full_disk(error)
        if reason is None:
            raise
        _end(f"error: {reason}; free some disk space, the same command then goes on", 1)
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(*_: object) -> None:
    """Ctrl-C: the process ends at once, as if it were killed. Files are whole or absent, so that nothing is lost; the
    exception that Python would raise could be swallowed by a library or a callback."""
    os.write(2, b"\nstopped; the same command goes on from what is finished\n")
    with suppress(RuntimeError):  # what is just being written cannot be flushed
        sys.stdout.flush()
    os._exit(130)


def _end(line: str, code: int) -> None:
    print(line, file=sys.stderr)
    sys.exit(code)


def _full_disk(error: BaseException) -> str | None:
    """What an error says of a full disk, if it is about one. Some libraries raise classes of their own."""
    text = " ".join([*str(error).split(), *getattr(error, "__notes__", [])[:1]])
    if any(os.strerror(code) in text for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        return text
    return _full_disk(error.__cause__) if error.__cause__ else None
