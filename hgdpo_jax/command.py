"""The command line that every command shares: `--config FILE[:variant] --workdir DIR --config.key=value …`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax import runtime
from hgdpo_jax.errors import UserError


def parse(description: str, arguments: Sequence[str] | None = None) -> tuple[ConfigDict, Path]:
    """(validated config, workdir) of a command line.

    Raises:
        UserError: an argument or override that does not exist.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog="Any setting: --config.train.lr=1e-5 (see hgdpo_jax/config.py)."
    )
    parser.add_argument("--config", required=True, help="config file with its variant, configs/stage1.py:portraits")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    known, rest = parser.parse_known_args(arguments)
    overrides = []
    for argument in rest:
        if not argument.startswith("--config."):
            raise UserError(f"argument {argument}: unknown; settings are written --config.key=value")
        overrides.append(argument.removeprefix("--config."))
    return configuration.load(known.config, overrides), known.workdir


def run(command: Callable[[], None]) -> None:
    """Runs a command; what the user did wrong becomes one line on stderr and exit code 1."""
    try:
        runtime.start(Path.home() / ".cache" / "hgdpo_jax" / "compiled")
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
