"""The command line that every command shares: `--config FILE[:variant] --workdir DIR --config.key=value …`.

A mistake is answered at once: nothing here imports JAX, unless other processes wait for this one.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hgdpo_jax.run import environment, streams
from hgdpo_jax.run.errors import Stopped, UserError, as_line
from hgdpo_jax.run.folder import STAGES, local_folder, require_plain, step_name
from hgdpo_jax.run.remembered import read_settings, remembered
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
    parser.add_argument("--settings", type=Path, metavar="FILE", help="settings as TOML or JSON, [data] with "
                        "photographs = …; a run remembers what it is made of in W/run.json")  # fmt: skip
    return parser


def add_check(parser: argparse._ActionsContainer) -> None:
    """Adds `--check` to a parser or a group of it."""
    parser.add_argument("--check", action="store_true", help="says what is read, what it needs and what is wrong, and "
                        "does nothing; exit code 1 where something is wrong")  # fmt: skip


def add_step(parser: argparse._ActionsContainer) -> None:
    """Adds `--step` of a stage to a parser or a group of it."""
    parser.add_argument("--step", type=step_name, help="the stage's checkpoint, though it is not finished: a number, "
                        "latest, or best by held-out loss; as train.hand_on says unless given")  # fmt: skip


def add_name(parser: argparse.ArgumentParser) -> None:
    """Adds `--as`: the same stage once more under another name, beside it and from its pairs."""
    parser.add_argument("--as", dest="name", metavar="NAME", help="the config's stage once more, from the same pairs, "
                        "in a folder of this name: with another rate, say")  # fmt: skip


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[ConfigDict, argparse.Namespace]:
    """(validated config, arguments) of a command line. Settings come from the config's file, from what the run
    remembers, from `--settings`, and from the command line: the later wins. `arguments.given` has the keys of the last
    three.

    Args:
        parser: of :func:`run_parser`, with `--as` if :func:`add_name` added it.
        arguments: those of this process unless given.

    Raises:
        UserError: an argument or override that does not exist, or a workdir that cannot be used.
    """
    known, rest = parser.parse_known_args(arguments)
    require_plain(known.workdir)
    own = read_settings(known.settings) if known.settings else []
    now = [*own, *overrides(rest)]
    said = [*remembered(known.workdir, now), *now]
    if getattr(known, "name", None) is not None:
        if known.name in STAGES:
            raise UserError(f"--as {known.name}: is the folder of a stage of its own; choose another name")
        named = load_config(known.config, said)
        said += [f"stage={known.name}", f"train.pairs={named.train.pairs or named.stage}"]
    known.given = tuple(line.partition("=")[0] for line in said)
    return load_config(known.config, said), known


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
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch: tokenizers need none
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
        line, code = found, error.code if isinstance(error, UserError) else 1
    if several:
        with suppress(UserError):  # not all came: then this line is what there is to say
            lifecycle.start()  # an argument was wrong before they met: the others wait for this process
        lifecycle.end_all(line, code)
    print(line, file=sys.stderr)
    sys.exit(code)
