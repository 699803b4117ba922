"""The command line that every command shares: `--config FILE[:variant] --workdir DIR --config.key=value …`."""

import argparse
import errno
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import Stopped, UserError
from hgdpo_jax.run.files import PACKAGE, file_hash, json_hash, local_folder, require_plain, write_json
from hgdpo_jax.run.settings import get_setting, load_config, setting_keys

_SHOWN = 30  # seconds after which a file has been seen on every host


def parse(
    description: str, arguments: Sequence[str] | None = None, parents: Sequence[argparse.ArgumentParser] = ()
) -> tuple[ConfigDict, Path]:
    """(validated config, workdir) of a command line.

    Args:
        description: of the command.
        arguments: those of this process unless given.
        parents: of further options, which the caller has read; they are shown by --help.

    Raises:
        UserError: an argument or override that does not exist, or a workdir that cannot be used.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Any setting: --config.train.lr=1e-5 (python -m hgdpo_jax.config lists them).",
        parents=parents,
    )
    parser.add_argument("--config", required=True, help="config file with its variant, configs/stage1.py:portraits")
    parser.add_argument("--workdir", required=True, type=local_folder, help="folder of the run")
    known, rest = parser.parse_known_args(arguments)
    require_plain(known.workdir)
    config = load_config(known.config, overrides(rest))
    return config, known.workdir


def asked(config: ConfigDict) -> dict[str, Any]:
    """All settings of a config as a command line would say them, for :func:`require_same_command`."""
    return {f"--config.{key}": get_setting(config, key) for key in setting_keys(config)}


def overrides(arguments: Sequence[str]) -> list[str]:
    """`key=value` of each `--config.key=value`. Raises UserError for any other argument."""
    for argument in arguments:
        if not argument.startswith("--config."):
            raise UserError(f"argument {argument}: unknown; settings are written --config.key=value")
    return [argument.removeprefix("--config.") for argument in arguments]


def require_same_command(folder: Path, asked: Mapping[str, Any]) -> None:
    """Raises UserError, which names the host, where a process was asked something else than process 0, is of another
    version, or does not see the folder that process 0 sees.

    Args:
        folder: that all processes read and write.
        asked: what the command line says.
    """
    if processes.is_alone():
        return
    code = [file_hash(path) for path in sorted(PACKAGE.rglob("*.py"))]
    processes.require_same(
        {f"version of {name}": version(name) for name in ("jax", "flax", "orbax-checkpoint")}
        | {"hgdpo_jax": json_hash(code)[:12]}
        | {name: str(value) for name, value in asked.items()}
    )
    mark = folder / ".hosts"

    def write() -> str:
        token = secrets.token_hex(8)
        write_json(mark, {"token": token})
        return token

    token, seen = processes.broadcast(write), "nothing"
    until = time.monotonic() + _SHOWN
    while seen != token and time.monotonic() < until:
        try:
            seen = json.loads(mark.read_text())["token"]
        except OSError:
            time.sleep(1)
    if seen != token:
        raise UserError(f"{folder}: {processes.process_name()} does not see the folder that process 0 sees; all hosts "
                        "need one file system that they share, such as NFS, Lustre or Filestore")  # fmt: skip
    processes.barrier()
    if processes.is_first():
        mark.unlink()


def run(command: Callable[[], None]) -> None:
    """Runs a command, in one process or in several.

    What the user did wrong, and a full disk, become one line on stderr and exit code 1 on all of them; a signal one
    line and exit code 130 (Ctrl-C) or 75 (SIGTERM).
    """
    try:
        command()
        processes.leave()
    except UserError as error:
        _end(f"error: {error}", 1)
    except Stopped as stopped:
        processes.leave()
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
        sys.exit(stopped.args[0])
    except SystemExit as stopped:
        if stopped.code:
            _end("error: an argument cannot be read, see above", 2)
        raise
    except Exception as error:
        reason = _full_disk(error)
        if reason is not None:
            _end(f"error: {reason}; free some disk space, the same command then goes on", 1)
        if processes.is_alone():
            raise
        processes.fail(error)


def _end(line: str, code: int) -> NoReturn:
    with suppress(UserError):  # not all came: then this line is what there is to say
        processes.start()  # an argument was wrong before they met: the others wait for this process
    if not processes.is_alone():
        processes.end_all(line, code)
    print(line, file=sys.stderr)
    sys.exit(code)


def _full_disk(error: BaseException) -> str | None:
    """What an error says of a full disk, if it is about one. Some libraries raise classes of their own."""
    text = " ".join([*str(error).split(), *getattr(error, "__notes__", [])[:1]])
    if any(os.strerror(code) in text for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        return text
    return _full_disk(error.__cause__) if error.__cause__ else None
