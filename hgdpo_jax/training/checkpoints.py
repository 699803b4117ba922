"""Checkpoints with Orbax, apart by lifetime.

    W/stageN/reference/              once per stage: what the policy is compared with, and reference.json
    W/stageN/policy/STEP/            policy, its average, optimizer, data position, config
    W/stageN/policy/STEP.sha256.json written last: the hashes of the files of that step

Orbax does not notice a flipped bit and takes an empty folder for a checkpoint, hence the hashes: a step that does not
match them is reported and passed over. What was written is read back before its hashes are.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from hgdpo_jax import processes
from hgdpo_jax.errors import UserError
from hgdpo_jax.files import file_hash, need_space, require_plain, sync, write_json
from hgdpo_jax.runtime import path_name, to_host

Tree = Any
KEEP = 2
_READ_AT_ONCE = 2.5e8  # bytes


def tree_hash(tree: Tree) -> str:
    """sha256 over names, shapes and bytes of a pytree's arrays, whatever their sharding."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        value = to_host(leaf)
        digest.update(f"{path_name(path)} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): file_hash(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def _flat(tree: Tree) -> dict[str, Any]:
    """Dotted name → leaf: what is written does not depend on the container classes of Flax and optax."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _target(tree: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and shardings to restore to."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in _flat(tree).items()}


def _need_space(folder: Path, tree: Tree) -> None:
    need_space(folder, 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + 1e6, "a checkpoint")


def _unflat(values: dict[str, Any], like: Tree) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(like), [values[name] for name in _flat(like)])


@jax.jit
def _finite(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def require_finite(step: int, tree: Tree) -> None:
    """Raises UserError that names the first array of a state with a value that is no number."""
    for path, finite in jax.tree.leaves_with_path(_finite(tree)):
        if not finite:
            raise UserError(f"{path_name(path)} is NaN or infinite after step {step}: training stopped, the last good "
                            "checkpoint is kept; lower config.train.lr and run again")  # fmt: skip


def _read_back(tree: Tree, read: Callable[[dict[str, Any]], dict[str, Any]], path: Path) -> None:
    """Raises UserError unless what `read` finds under some names is, bit for bit, what the tree holds. Each process
    looks at what its devices hold.

    A part at a time: there may be no room for a second tree.
    """
    parts: list[dict[str, Any]] = [{}]
    for name, leaf in _flat(tree).items():
        if parts[-1] and sum(x.nbytes for x in parts[-1].values()) + leaf.nbytes > _READ_AT_ONCE:
            parts.append({})
        parts[-1][name] = leaf
    for part in parts:
        try:
            found = read(part)
            same = all(_same(leaf, found[name]) for name, leaf in part.items())
        except Exception as error:  # Orbax raises bare Exceptions for damaged files
            raise UserError(f"checkpoint {path}: was written, but cannot be read back") from error
        if not same:
            raise UserError(f"checkpoint {path}: was written, but reads otherwise; is the disk in order?")


def _same(a: jax.Array, b: jax.Array) -> bool:
    shards = zip(a.addressable_shards, b.addressable_shards, strict=True)
    return all(np.asarray(x.data).tobytes() == np.asarray(y.data).tobytes() for x, y in shards)


class Checkpoints:
    """The checkpoints of one stage in `folder` = W/stageN.

    Steps are only ever added; the newest two are kept.
    """

    def __init__(self, folder: Path) -> None:
        require_plain(folder)
        self.folder = folder.absolute()
        self._policy = self.folder / "policy"
        self._policy.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self._policy,
            options=ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False),
        )

    def latest(self) -> int | None:
        """The newest step whose files match their hashes, or None. Damaged steps are reported. Process 0 looks."""
        return processes.first(self._latest)

    def _latest(self) -> int | None:
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self._policy / f"{step}.sha256.json"
            if path.is_file() and json.loads(path.read_text()) == _hashes(self._policy / str(step)):
                return step
            logging.warning(
                "checkpoint %s: incomplete or altered; going back to the one before", self._policy / str(step)
            )
        return None

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Writes a step, reads it back and waits until it is on the disk.

        Raises:
            UserError: the state is not finite, the disk is full, or the step is not newer than what is there.
        """
        require_finite(step, state)
        _need_space(self.folder, state)
        # A damaged newer step would make Orbax refuse an older one.
        for damaged in [s for s in self._manager.all_steps() if s >= step]:
            self._manager.delete(damaged)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(_flat(state)), meta=ocp.args.JsonSave(meta))
        folder = self._policy / str(step)
        if not self._manager.save(step, args=items, force=True):
            raise UserError(f"checkpoint {folder}: Orbax did not write it")
        self._manager.wait_until_finished()
        _read_back(state, lambda part: self._read(step, _target(part)), folder)
        processes.together()
        if processes.first_process():
            sync(folder)
            write_json(self._policy / f"{step}.sha256.json", _hashes(folder))
            for path in self._policy.glob("*.sha256.json"):
                if not (self._policy / path.name.partition(".")[0]).is_dir():
                    path.unlink()
        processes.together()

    def meta(self, step: int) -> dict[str, Any]:
        """Config, data position, hash of the reference, and what a step is made from.

        Raises:
            UserError: it was written before that was kept.
        """
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if "made_from" not in meta:
            raise UserError(f"checkpoint {self._policy / str(step)}: was written by an older hgdpo_jax, which did not "
                            "say what it was made from; choose another --workdir")  # fmt: skip
        return meta

    def restore(self, step: int, like: Tree) -> Tree:
        """The state of a step, with the shapes and shardings of `like`; a part of the saved tree is enough.

        Raises:
            UserError: the checkpoint holds another tree.
        """
        try:
            return _unflat(self._read(step, _target(like)), like)
        except (ValueError, KeyError) as error:
            line = str(error).strip().splitlines()[0]
            raise UserError(
                f"checkpoint {self._policy / str(step)}: does not fit this config's model ({line})"
            ) from error

    def _read(self, step: int, target: dict[str, Any]) -> dict[str, Any]:
        restore = ocp.checkpoint_utils.construct_restore_args(target)
        arguments = ocp.args.PyTreeRestore(target, restore_args=restore, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]

    def save_reference(self, reference: Tree) -> str:
        """Writes the reference once and reads it back; returns its hash."""
        _need_space(self.folder, reference)
        value = tree_hash(reference)
        path = self.folder / "reference" / "weights"
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, _flat(reference), force=True)

            def read(part: dict[str, Any]) -> dict[str, Any]:
                restore = ocp.checkpoint_utils.construct_restore_args(_target(part))
                arguments = ocp.args.PyTreeRestore(_target(part), restore_args=restore, partial_restore=True)
                return checkpointer.restore(path, args=arguments)

            _read_back(reference, read, path)
        processes.together()
        if processes.first_process():
            sync(path)
            write_json(self.folder / "reference" / "reference.json", {"sha256": value})
        return value

    def restore_reference(self, like: Tree, expected: str) -> Tree:
        """The reference that a run started with.

        Raises:
            UserError: it is missing, or is not the one whose hash the checkpoint names.
        """
        path = self.folder / "reference" / "weights"
        target = _target(like)
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                arguments = ocp.checkpoint_utils.construct_restore_args(target)
                reference = _unflat(checkpointer.restore(path, item=target, restore_args=arguments), like)
            found = tree_hash(reference)
        except Exception as error:  # Orbax raises bare Exceptions for damaged files
            raise UserError(f"reference {path}: cannot be read; the stage must be trained again") from error
        if found != expected:
            raise UserError(
                f"reference {path}: its hash {found[:12]} is not {expected[:12]}, that of the checkpoint's reference"
            )
        return reference
