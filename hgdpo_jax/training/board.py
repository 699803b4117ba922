"""The log in Weights & Biases too: a run there for each stage, which goes on where the training goes on."""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, write_json

FILE = "wandb.json"  # in a stage's logs: its project and its run there


def require_package(project: str) -> ModuleType:
    """The package wandb.

    Args:
        project: `train.wandb`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import wandb

        wandb.init  # noqa: B018  # a folder named wandb, in which it keeps runs, can be imported too
    except (ImportError, AttributeError) as error:
        raise UserError(f"config key train.wandb={project}: the package wandb is not installed; pip install wandb, or "
                        "leave the setting out") from error  # fmt: skip
    return wandb


class Board:
    """A run of W&B. Its x axis is our step: what is logged again after a stop stands where it stood.

    Args:
        package: see :func:`require_package`.
        run: of it.
    """

    def __init__(self, package: ModuleType, run: Any) -> None:
        self._package, self._run = package, run
        run.define_metric("*", step_metric="step")

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Scalars."""
        self._run.log({"step": step, **values})

    def picture(self, name: str, picture: UInt8[np.ndarray, "H W 3"], step: int) -> None:
        """What a look draws."""
        self._run.log({"step": step, name: self._package.Image(picture)})


@contextmanager
def opened(config: ConfigDict, folder: Path) -> Iterator[Board | None]:
    """The run of W&B that a stage logs to, until the block ends; None without `train.wandb`, and in all processes but
    the first.

    Args:
        config: of the stage.
        folder: W/stageN.

    Raises:
        UserError: W&B refuses, or does not answer.
    """
    project = config.train.wandb
    if not project or not processes.is_first():
        yield None
        return
    package, logs = require_package(project), folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        run = package.init(
            project=project,
            id=_id(logs / FILE, project),
            resume="allow",
            group=folder.absolute().parent.name,
            name=f"{folder.absolute().parent.name}/{config.stage}",
            config=configuration.to_json(config),
            dir=str(logs),
            settings=package.Settings(console="off", silent=True),
        )
    except package.Error as error:
        raise UserError(f"config key train.wandb={project}: W&B says {' '.join(str(error).split())}; run wandb login, "
                        "or set WANDB_MODE=offline") from error  # fmt: skip
    place = f"offline, later: wandb sync {Path(run.dir).parent}" if run.offline else run.url
    print(f"{config.stage}: W&B: {place}")
    try:
        yield Board(package, run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _id(path: Path, project: str) -> str:
    """The run of a stage in a project: the one that it has, or a new one, which is noted."""
    kept: dict[str, str] = {}
    if path.is_file():
        with as_written(path, "remove it, and another run begins"):
            kept = {str(name): str(number) for name, number in json.loads(path.read_text()).items()}
    if project not in kept:
        kept[project] = secrets.token_hex(4)
        write_json(path, kept)
    return kept[project]
