"""Checkpoints of a stage, written by Orbax.

    W/stageN/reference/              once per stage: what the policy is compared with, and reference.json
    W/stageN/policy/STEP/            policy, its average, optimizer, data position, config
    W/stageN/policy/STEP.sha256.json written last: the hashes of the files of that step

or in a bucket, see `train.checkpoints`; no rename and no lock is needed.

Orbax does not notice a flipped bit and takes an empty folder for a checkpoint, hence the hashes: a step that does not
match them is reported and passed over. Files are read back before their hashes are written.

Training waits only until a step is copied to the host. The host's memory then holds this process's part of the state
(and once more, at most, the slices of it that Orbax writes) until it is written and read back.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jaxtyping import PyTree

from hgdpo_jax.devices.sharding import path_name
from hgdpo_jax.devices.transfer import to_host
from hgdpo_jax.run import processes
from hgdpo_jax.run.buckets import bucket
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import file_hash, in_bucket, require_space, sync, write_json
from hgdpo_jax.run.folder import require_plain
from hgdpo_jax.training import metrics
from hgdpo_jax.training.changes import GO_ON
from hgdpo_jax.training.watchdog import watch

Tree = PyTree  # of arrays, or of shapes with shardings to restore to
HostParts = list[tuple[str, tuple[slice, ...], np.ndarray]]  # name of an array, place in it, values
LATEST, BEST = "latest", "best"  # steps by name
_READ_AT_ONCE = 2.5e8  # bytes
_FOREVER = 7 * 24 * 3600  # seconds that processes wait for each other's files: a dead one is missed by run/processes.py
# Every device that holds a copy of an array writes a part of it, for which a program is compiled. A LoRA's matrices are
# too small for that: one device writes them.
_SMALLEST_PART = 1_000_000  # bytes


def tree_hash(tree: Tree) -> str:
    """sha256 over names, shapes and bytes of a pytree's arrays, whatever their sharding."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        value = to_host(leaf)
        digest.update(f"{path_name(path)} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        yield from _files(path) if path.is_dir() else [path]


def _hashes(folder: epath.Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_hash(path) for path in _files(folder)}


def _flat(tree: Tree) -> dict[str, Any]:
    """Dotted name → leaf: files do not depend on the container classes of Flax and optax."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _unflat(values: dict[str, Any], like: Tree) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(like), [values[name] for name in _flat(like)])


def _target(tree: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and shardings to restore to."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in _flat(tree).items()}


@jax.jit
def _finite(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def require_finite(step: int, tree: Tree) -> None:
    """Raises UserError that names the first array of a state with a value that is NaN or infinite."""
    for path, finite in jax.tree.leaves_with_path(_finite(tree)):
        if not finite:
            raise UserError(f"{path_name(path)} is NaN or infinite after step {step}: training stopped, the last good "
                            f"checkpoint is kept; {GO_ON}")  # fmt: skip


def _on_host(tree: Tree) -> HostParts:
    """What this process's devices hold, each part once. The values stay: XLA writes into no memory that NumPy reads."""
    parts = {(n, str(s.index)): (n, s.index, s.data) for n, x in _flat(tree).items() for s in x.addressable_shards}
    for *_, data in parts.values():
        data.copy_to_host_async()
    return [(name, index, np.asarray(data)) for name, index, data in parts.values()]


def _read_back(folder: epath.Path, written: HostParts) -> None:
    """Raises UserError unless the files in `folder` hold, bit for bit, what this process wrote.

    Some parts at a time, to the host: there may be no room for a second state.
    """
    context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})

    def read(name: str, index: tuple[slice, ...]) -> ts.Future:
        base = f"{folder}/" if in_bucket(folder) else {"driver": "file", "path": f"{folder}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/", "cache_pool": "cache_pool#ocdbt"}
        return ts.open({"driver": "zarr", "kvstore": kvstore}, context=context).result()[index].read()

    groups: list[HostParts] = [[]]
    for part in written:
        if groups[-1] and sum(value.nbytes for *_, value in groups[-1]) + part[2].nbytes > _READ_AT_ONCE:
            groups.append([])
        groups[-1].append(part)
    try:
        handler = _arrays()
        known = handler.metadata(folder).tree
        same = set(known) == {name for name, *_ in written}
        for group in groups:
            reading = [(value, read(name, index)) for name, index, value in group]
            same = same and all(_same(value, found.result()) for value, found in reading)
        if same:  # Orbax's own notes, which TensorStore does not need
            handler.restore(folder, args=_restore(_smallest(known)))
    except Exception as error:  # Orbax and TensorStore raise all sorts of them for damaged files
        raise UserError(f"checkpoint {folder}: was written, but cannot be read back") from error
    if not same:
        raise UserError(f"checkpoint {folder}: was written, but reads otherwise; is the disk in order?")


def _smallest(known: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The smallest array, on one device of this process."""
    name = min(known, key=lambda name: math.prod(known[name].shape))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {name: jax.ShapeDtypeStruct(known[name].shape, known[name].dtype, sharding=here)}


def _arrays() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of a tree of arrays."""
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SMALLEST_PART)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _restore(target: dict[str, jax.ShapeDtypeStruct]) -> ocp.args.PyTreeRestore:
    """Arguments that restore some arrays of a tree."""
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=arguments, partial_restore=True)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    first, second = (np.ascontiguousarray(x).view(np.uint8) for x in (a, b))
    return a.dtype == b.dtype and np.array_equal(first, second)


class Checkpoints:
    """The checkpoints of one stage.

    Files are written, read back and hashed in the background: a training calls `check` after every step. A `with` block
    waits for what is being written, and closes them. Reading writes nothing.

    Args:
        folder: W/stageN.
        place: `train.checkpoints` of the stage; the folder of the stage's name there takes the place of W/stageN.
        keep: `train.keep`: how many of the newest steps stay.
        keep_every: `train.keep_every`: its multiples stay too. So do the step whose held-out loss is the lowest, and
            the last one before looks that gave alarms.

    Raises:
        UserError: the place cannot be reached.
    """

    def __init__(self, folder: Path, place: str = "", keep: int = 2, keep_every: int = 0) -> None:
        require_plain(folder)
        self._logs, self._newest, self._multiples = folder / "logs", keep, keep_every
        self.folder = bucket(place, "train.checkpoints") / folder.name if place else epath.Path(folder.absolute())
        self._policy = self.folder / "policy"
        options = ocp.options.AsyncOptions(timeout_secs=_FOREVER, create_directories_asynchronously=False)
        items = ocp.CompositeCheckpointHandler(state=_arrays(), meta=ocp.JsonCheckpointHandler())
        self._orbax = ocp.AsyncCheckpointer(items, async_options=options)
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Ends the threads. A second call does nothing."""
        self._background.shutdown()
        self._orbax.close()

    def steps(self) -> list[int]:
        try:
            return sorted(int(path.name) for path in self._policy.iterdir() if path.name.isdecimal())
        except FileNotFoundError:  # a bucket has no empty folders
            return []

    def latest(self) -> int | None:
        """The newest step whose files match their hashes, or None. Process 0 reads them and reports damaged steps."""
        return processes.broadcast(lambda: self._first_undamaged(reversed(self.steps())))

    def find(self, which: str) -> int | None:
        """A step by its number, or by `latest` or `best`: that whose held-out loss is the lowest. None where it is not
        there or damaged, which process 0 reports."""
        if which == LATEST:
            return self.latest()
        if which == BEST:
            return processes.broadcast(lambda: self._first_undamaged(self._by_heldout_loss()))
        return processes.broadcast(lambda: self._first_undamaged(s for s in self.steps() if str(s) == which))

    def _by_heldout_loss(self) -> list[int]:
        """The steps at which held-out pairs were measured, that with the lowest loss first; the later of equal ones."""
        losses = metrics.heldout_losses(self._logs)
        return sorted((step for step in self.steps() if step in losses), key=lambda step: (losses[step], -step))

    def _first_undamaged(self, steps: Iterable[int]) -> int | None:
        for step in steps:
            try:
                # `exists` is not asked: where a bucket cannot be reached, it says no.
                if json.loads((self._policy / f"{step}.sha256.json").read_text()) == _hashes(self._folder_of(step)):
                    return step
            except (FileNotFoundError, ValueError, RecursionError):  # there is none, or it is damaged
                pass
            logging.warning("checkpoint %s: incomplete or altered; it is passed over", self._folder_of(step))
        return None

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Copies a step to the host, and writes it in the background. Waits for the step before.

        Raises:
            UserError: the state is not finite, or the disk is full; or the step before could not be saved.
        """
        self.wait()
        require_finite(step, state)
        self._make_room(state)
        if processes.is_first():
            hashed = [kept for kept in self.steps() if (self._policy / f"{kept}.sha256.json").exists()]
            self._remove([damaged for damaged in self.steps() if damaged >= step or damaged not in hashed])
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(_flat(state)), meta=ocp.args.JsonSave(meta))
        self._orbax.save(self._folder_of(step), args=items, force=True)
        self._saving = self._background.submit(self._finish, step, _on_host(state))

    def _make_room(self, tree: Tree) -> None:
        if not in_bucket(self.folder):
            self._policy.mkdir(parents=True, exist_ok=True)
        require_space(self.folder, 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + 1e6, "a checkpoint")

    def _finish(self, step: int, written: HostParts) -> None:
        """Runs in the background, where no arrays of several processes may be computed with."""
        folder = self._folder_of(step)
        self._orbax.wait_until_finished()
        _read_back(folder / "state", written)
        processes.barrier(f"checkpoint/{self.folder.name}/{step}")
        if processes.is_first():
            sync(folder)
            write_json(self._policy / f"{step}.sha256.json", _hashes(folder))
            self._remove([step for step in self.steps() if step not in self._kept()])

    def _kept(self) -> set[int]:
        steps = self.steps()
        multiples = [step for step in steps if self._multiples and step % self._multiples == 0]
        good = watch(metrics.read(self._logs)).good or 0
        before = [step for step in steps if step <= good]
        return {*steps[-self._newest :], *multiples, *self._by_heldout_loss()[:1], *before[-1:]}

    def go_back(self, step: int) -> int | None:
        """Takes away the steps that come after one; returns the newest that is left, or None."""
        if processes.is_first():
            self._remove([kept for kept in self.steps() if kept > step])
        processes.barrier()
        return self.latest()

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            (self._policy / f"{step}.sha256.json").unlink(missing_ok=True)
            self._folder_of(step).rmtree()

    def _folder_of(self, step: int) -> epath.Path:
        return self._policy / str(step)

    def check(self) -> None:
        """Raises what :meth:`wait` does, if writing has ended by now."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the saved step is on the disk and counts.

        Raises:
            UserError: it cannot be read back as it was. Other exceptions are those of Orbax.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def meta(self, step: int) -> dict[str, Any]:
        """Config, data position, hash of the reference, and what a step is made from.

        Raises:
            UserError: it was written by a version that did not say what it was made from.
        """
        meta = self._orbax.restore(self._folder_of(step), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if "made_from" not in meta:
            raise UserError(f"checkpoint {self._folder_of(step)}: was written by an older hgdpo_jax, which did not "
                            "say what it was made from; choose another --workdir")  # fmt: skip
        return meta

    def restore(self, step: int, like: Tree) -> Any:
        """The state of a step, with the shapes and shardings of `like`; a part of the saved tree is enough.

        Raises:
            UserError: the checkpoint holds another tree.
        """
        try:
            return _unflat(self._read(step, _target(like)), like)
        except (ValueError, KeyError) as error:
            line = str(error).strip().splitlines()[0]
            raise UserError(f"checkpoint {self._folder_of(step)}: does not fit this config's model ({line})") from error

    def _read(self, step: int, target: dict[str, Any]) -> dict[str, Any]:
        return self._orbax.restore(self._folder_of(step), args=ocp.args.Composite(state=_restore(target)))["state"]

    def save_reference(self, reference: Tree) -> str:
        """Writes the reference once and reads it back; returns its hash."""
        self._make_room(reference)
        value = tree_hash(reference)
        path = self.folder / "reference" / "weights"
        with ocp.Checkpointer(_arrays()) as checkpointer:
            checkpointer.save(path, _flat(reference), force=True)
        _read_back(path, _on_host(reference))
        processes.barrier()
        if processes.is_first():
            sync(path)
            write_json(self.folder / "reference" / "reference.json", {"sha256": value})
        return value

    def restore_reference(self, like: Tree, expected: str) -> Tree:
        """The reference that the stage started with, with the shapes and shardings of `like`.

        Raises:
            UserError: it is missing, or its hash is not `expected`.
        """
        path = self.folder / "reference" / "weights"
        try:
            with ocp.Checkpointer(_arrays()) as checkpointer:
                reference = _unflat(checkpointer.restore(path, args=_restore(_target(like))), like)
            found = tree_hash(reference)
        except Exception as error:  # Orbax raises bare Exceptions for damaged files
            raise UserError(f"reference {path}: cannot be read; the stage must be trained again") from error
        if found != expected:
            raise UserError(
                f"reference {path}: its hash {found[:12]} is not {expected[:12]}, that of the checkpoint's reference"
            )
        return reference
