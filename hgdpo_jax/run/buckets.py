"""Folders in object storage."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import fsspec
from etils import epath

from hgdpo_jax.run.errors import UserError


def bucket(address: str, key: str) -> epath.Path:
    """A folder in object storage, which need not exist.

    Args:
        address: gs://bucket/folder.
        key: of the config that gives it.

    Raises:
        UserError: the package that reaches it is not installed, or it cannot be read.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"config key {key}={address}: needs the package gcsfs; pip install -e '.[gcs]'")
    # Other processes, and TensorStore, write there too: what was listed before is out of date.
    fsspec.config.conf["gcs"] = {"use_listings_cache": False}
    with _reached(address, key), suppress(FileNotFoundError):
        list(epath.Path(address).iterdir())
    return epath.Path(address)


def require_writable(address: str, key: str) -> None:
    """Raises UserError where nothing can be written in a folder of :func:`bucket`."""
    with _reached(address, key):
        (epath.Path(address) / ".written").write_text("")
        (epath.Path(address) / ".written").unlink()


@contextmanager
def _reached(address: str, key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of gcsfs, of Google's packages and of the network, which share no class
        raise UserError(f"config key {key}={address}: cannot be reached ({' '.join(str(error).split())}); give a "
                        "bucket that this host's credentials may read and write") from error  # fmt: skip
