"""The mesh of devices, and which batches it can split."""

import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hgdpo_jax.run.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor), see `mesh` in the settings.

    Args:
        config: the group `mesh`.
        devices: all of all processes unless given.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    count = jax.device_count() if devices is None else len(devices)
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = count // rest
    if math.prod(sizes) != count or min(sizes) < 1:
        raise UserError(
            f"config key mesh: {config.data} x {config.fsdp} x {config.tensor} does not make the {count} devices here"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices)


def local_mesh() -> Mesh:
    """This process's own devices along `data`: for work that needs no other process, such as drawing candidates."""
    devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
    return Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def host_mesh() -> Mesh:
    """This process's processor: for work that computes little, with weights that an accelerator may have no room for.

    Raises:
        UserError: JAX_PLATFORMS leaves it out.
    """
    try:
        devices = np.array(jax.local_devices(backend="cpu")[:1]).reshape(1, 1, 1)
    except RuntimeError as error:
        raise UserError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: leaves out the processor, where this is "
                        "computed; unset it, or add ,cpu") from error  # fmt: skip
    return Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def describe_mesh(mesh: Mesh) -> str:
    """Backend, devices and mesh in words."""
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{jax.default_backend()}, {mesh.size} x {' and '.join(kinds)}, mesh {axes}"


def require_divisible(batch: int, mesh: Mesh, key: str) -> None:
    """Raises UserError when a batch cannot be split evenly over the data and fsdp axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % ways:
        raise UserError(f"config key {key}={batch}: must be a multiple of {ways} (mesh.data x mesh.fsdp)")
