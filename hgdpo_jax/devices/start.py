"""The start of a command, once its arguments are read: JAX is told how to compile, processes meet."""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from hgdpo_jax.devices.processor import collect_rarely
from hgdpo_jax.devices.xla import cpuinfo, settle_dtype, use_precision, xla_flags
from hgdpo_jax.run import lifecycle, processes
from hgdpo_jax.run.errors import UserError


def start(
    folder: Path | None = None,
    asked: Mapping[str, Any] | None = None,
    model: ConfigDict | None = None,
    writes: bool = True,
) -> None:
    """Joins the other processes of a run, see :func:`hgdpo_jax.run.lifecycle.start`, and turns on the persistent
    compilation cache.

    Args:
        folder, asked, writes: see :func:`hgdpo_jax.run.processes.require_same_command`, which is called where there is
            a folder; then there has to be a device, too.
        model: settings, whose dtype is settled by the devices and decides how exact products are.

    Raises:
        UserError: not all processes came, or one was asked something else; or there is no device.
    """
    collect_rarely()
    os.environ["XLA_FLAGS"] = xla_flags(os.environ.get("XLA_FLAGS", ""), cpuinfo())
    lifecycle.start()
    _use_cache()
    if folder is not None:
        processes.require_same_command(folder, asked or {}, writes)
        _find_devices()
    if model is not None:
        settle_dtype(model, jax.default_backend())
        use_precision(model.dtype)


def _find_devices() -> None:
    try:
        jax.devices()
    except Exception as error:  # of JAX and of its plugins, some without a word
        reason = " ".join(str(error).split()) or type(error).__name__
        asked = os.environ.get("JAX_PLATFORMS")
        what = f"JAX_PLATFORMS={asked}: " if asked else ""
        raise UserError(f"{what}JAX finds no device ({reason}); install jax for it, pip install -e '.[gpu]' or '.[tpu]'"
                        f"{', or unset the variable' if asked else ''}") from error  # fmt: skip


def _use_cache() -> None:
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            folder = Path.home() / ".cache" / "hgdpo_jax" / "compiled"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except (OSError, RuntimeError) as error:  # the latter where there is no home
            print(f"no compilation cache: {error}; set JAX_COMPILATION_CACHE_DIR to a folder", file=sys.stderr)
        else:
            jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Small programs too: a command has a hundred, and they take longer to compile together than the large ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
