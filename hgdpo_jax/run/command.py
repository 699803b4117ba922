"""The command line that every command shares: `--config FILE[:variant] --workdir DIR --config.key=value …`.

A mistake is answered at once: nothing here imports JAX, unless other processes wait for this one.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ml_collections import ConfigDict

from hgdpo_jax.run import environment, streams
from hgdpo_jax.run.errors import Stopped, UserError, as_line
from hgdpo_jax.run.folder import local_folder, require_plain
from hgdpo_jax.run.settings import get_setting, load_config, setting_keys


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser of `--config`, to which a command adds its own arguments; see :func:`overrides` for the rest."""
    parser = argparse.ArgumentParser(
        description=description, epilog="Any setting: --config.train.lr=1e-5 (python -m hgdpo_jax.config lists them)."
    )
    parser.add_argument("--config", required=True, help="config file with its variant, configs/stage1.py:portraits")
    return parser


def run_parser(description: str) -> argparse.ArgumentParser:
    """A parser of `--config` and `--workdir`, for :func:`parse`."""
    parser = config_parser(description)
    parser.add_argument("--workdir", required=True, type=local_folder, help="folder of the run")
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[ConfigDict, argparse.Namespace]:
    """(validated config, arguments) of a command line.

    Args:
        parser: of :func:`run_parser`.
        arguments: those of this process unless given.

    Raises:
        UserError: an argument or override that does not exist, or a workdir that cannot be used.
    """
    known, rest = parser.parse_known_args(arguments)
    require_plain(known.workdir)
    return load_config(known.config, overrides(rest)), known


def overrides(arguments: Sequence[str]) -> list[str]:
    """`key=value` of each `--config.key=value`. Raises UserError for any other argument."""
    for argument in arguments:
        if not argument.startswith("--config."):
            raise UserError(f"argument {argument}: unknown; settings are written --config.key=value")
    return [argument.removeprefix("--config.") for argument in arguments]


def as_arguments(config: ConfigDict) -> dict[str, Any]:
    """All settings of a config as a command line names them, which all processes have to agree on."""
    return {f"--config.{key}": get_setting(config, key) for key in setting_keys(config)}


def run(command: Callable[[], None]) -> None:
    """Runs a command, in one process or in several.

    A mistake of the user, a full disk and memory that ran out become one line on stderr and exit code 1 in all
    processes, arguments that cannot be read exit code 2, a signal one line and exit code 130 (Ctrl-C) or 75 (SIGTERM).
    """
    streams.prepare()
    os.environ.pop("MPLBACKEND", None)  # of a notebook, whose backend Matplotlib may not find here; figures need none
    several = os.environ.get("HGDPO_DISTRIBUTED") == "1"
    try:
        environment.require_usual()
        if several:
            from hgdpo_jax.run import lifecycle
    except (UserError, ValueError) as error:  # JAX cannot be imported: this process cannot tell the others
        sys.exit(as_line(error))
    try:
        command()
        if several:
            lifecycle.leave()
        return
    except Stopped as stopped:
        if several:
            lifecycle.leave()
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
        sys.exit(stopped.args[0])
    except SystemExit as stopped:
        if not stopped.code:
            raise
        line, code = "error: an argument cannot be read, see above", 2
    except Exception as error:
        found = as_line(error)
        if found is None:
            if several:
                lifecycle.fail(error)
            raise
        line, code = found, 1
    if several:
        with suppress(UserError):  # not all came: then this line is what there is to say
            lifecycle.start()  # an argument was wrong before they met: the others wait for this process
        lifecycle.end_all(line, code)
    print(line, file=sys.stderr)
    sys.exit(code)
