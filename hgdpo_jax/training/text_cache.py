"""Text embeddings, computed once for every caption: the text encoders then leave the devices.

    W/stageN/text_cache/ids.npy                       token ids of the captions of the stage's pairs
    W/stageN/text_cache/captions-00000-of-00002.npy   what is made of up to 256 of them
    W/stageN/text_cache/looks-1b2c3d4e.npy            of the captions that looks draw, and the empty one

See :mod:`hgdpo_jax.training.kept` for what lies beside them. A caption takes tokens · width numbers
of the computation's dtype: 0.12 MB of SD1.5 and 0.32 MB of SDXL in 16 bits, 7.9 MB of FLUX.2 klein.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from hgdpo_jax.data.loader import first_records
from hgdpo_jax.data.pairs import Pairs
from hgdpo_jax.data.record import Record, RecordSource, WithText
from hgdpo_jax.devices.sharding import parameter_placer, replicated
from hgdpo_jax.devices.transfer import local_rows, one_ahead, place, to_devices, to_host
from hgdpo_jax.diffusion.pipeline import text_of
from hgdpo_jax.diffusion.source import Source, open_source
from hgdpo_jax.models.int8 import quantise
from hgdpo_jax.models.text import Conditioner, Encoded, KeptText, encoded_shapes
from hgdpo_jax.run import processes, provenance
from hgdpo_jax.run.files import json_hash
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.progress import Progress
from hgdpo_jax.training import kept
from hgdpo_jax.training.metrics import SHOWN

_CAPTIONS = 256  # of a file
_Ids = Int[np.ndarray, "n s"]


class _Captions(NamedTuple):
    """Captions by their token ids, and the file of what is made of them."""

    ids: _Ids
    rows: kept.Rows


def attach(
    config: ConfigDict, folder: Path, pairs: Pairs, prompts: Sequence[str], base: str, mesh: Mesh, index: Index
) -> tuple[Pairs, KeptText]:
    """Pairs that bring the embeddings of their captions, which are computed where they are missing; and what takes the
    place of the text encoders, with the captions that looks draw.

    Args:
        config, pairs, mesh: of the stage.
        folder: W/stageN.
        prompts: of `train.prompts`.
        base: content hash of ε_base, for which the pairs are.
        index: spares reading files that it knows.

    Raises:
        UserError: the folder holds embeddings of something else, or one that was altered; one is not finite; the disk
            is full.
    """
    source, cache = open_source(config.model.base, config.model.vae, config.model.lora), folder / "text_cache"
    text, made_from = text_of(source, config.model.dtype), _made_from(config, pairs, base)
    row, found = _row_dtype(text), _captions(cache, pairs, text, made_from, index)
    looks = _of_looks(config, source, pairs, prompts, text)
    files = [*_parts(cache, found, row), _Captions(looks, _rows(cache / f"looks-{_name(looks)}.npy", looks, row))]
    todo = kept.missing(cache, [file.rows for file in files], made_from, "what the text encoder makes of captions")
    print(f"{config.stage}: keeps what the text encoder makes of {len(found):,} captions, {row.itemsize / 1e6:.2g} MB "
          f"each, {len(found) * row.itemsize / 1e9:,.2f} GB; while training it is not on the devices")  # fmt: skip
    _make(config, source, [files[i] for i in todo], mesh, made_from)
    *parts, of_looks = kept.opened([file.rows for file in files], index)
    encoded = Encoded(*(np.array(of_looks[name]) for name in row.names or ()))  # type: ignore[arg-type]  # to be placed
    everywhere = replicated(mesh)
    lookup = _Lookup(found, parts)
    sources = {role: [WithText(s, found.shape[1], lookup) for s in each] for role, each in pairs.sources.items()}
    return replace(pairs, sources=sources), KeptText(place(looks, everywhere), place(encoded, everywhere), text)


def bytes_of_captions(pairs: Pairs, text: Conditioner) -> int:
    """Bytes of the embeddings of all captions of pairs, which are read. `text` may have shapes instead of weights."""
    return len(_distinct(pairs, text)) * _row_dtype(text).itemsize


def planned(text: Conditioner, mesh: Mesh) -> KeptText:
    """The shapes of what takes the place of a conditioner of shapes, for a usual look."""
    count = SHOWN + 1  # the empty one
    ids = jax.ShapeDtypeStruct((count, len(text.empty_ids)), jnp.int32)
    ids, encoded = place((ids, encoded_shapes(text, count)), replicated(mesh))
    return KeptText(ids, encoded, text)


class _Lookup:
    """Token ids of a caption, as bytes → the fields of its row."""

    def __init__(self, ids: _Ids, parts: Sequence[np.ndarray]) -> None:
        self._numbers, self._parts = {caption.tobytes(): i for i, caption in enumerate(ids)}, parts

    def __call__(self, ids: bytes) -> Record:
        part, number = divmod(self._numbers[ids], _CAPTIONS)
        row = self._parts[part][number]
        return {name: row[name] for name in row.dtype.names}


def _made_from(config: ConfigDict, pairs: Pairs, base: str) -> dict[str, Any]:
    keys = ["model.dtype", *(["train.quantize"] if config.train.quantize != "none" else [])]
    content = {provenance.content_key("model.base"): base, provenance.content_key("the pairs"): pairs.hash}
    return provenance.settings(config, keys) | content


def _row_dtype(text: Conditioner) -> np.dtype:
    """Of a caption's row: a field for each of :class:`Encoded`."""
    shapes = encoded_shapes(text, 1)._asdict()
    return np.dtype([(name, x.dtype, x.shape[1:]) for name, x in shapes.items() if x is not None])


def _captions(cache: Path, pairs: Pairs, text: Conditioner, made_from: Mapping[str, Any], index: Index) -> _Ids:
    """:func:`_distinct` of the pairs. They are kept, so that a later start need not read all pairs for them."""
    kept.missing(cache, (), made_from, "captions")  # refuses what was made from something else
    rows = kept.Rows(cache / "ids.npy", (), np.dtype(np.int32))
    if processes.broadcast(rows.note.is_file):
        return kept.opened([rows], index)[0]
    found = _distinct(pairs, text)
    if processes.is_first():
        with kept.written(rows._replace(shape=found.shape), made_from) as values:
            values[:] = found
    processes.barrier()
    return found


def _distinct(pairs: Pairs, text: Conditioner) -> _Ids:
    """The captions of all pairs, each once, in the order in which they come."""
    found: dict[bytes, np.ndarray] = {}
    sources: list[RecordSource] = [source for each in pairs.sources.values() for source in each]
    with Progress(total=sum(map(len, sources)), desc="captions", unit="pair", leave=False, delay=2) as bar:
        for source in sources:
            for i in range(len(source)):
                ids = source[i]["input_ids"][: len(text.empty_ids)]
                found.setdefault(ids.tobytes(), ids)
                bar.update()
    return np.stack([*found.values()])


def _of_looks(config: ConfigDict, source: Source, pairs: Pairs, prompts: Sequence[str], text: Conditioner) -> _Ids:
    """The captions that looks draw: the empty one, what takes its place in guidance, the prompts, held-out ones."""
    written = source.family.tokenize(source.tokenizers, ["", config.evaluate.negative_prompt, *prompts])
    shown = [record["input_ids"] for record in first_records(pairs.sources["heldout"], SHOWN)]
    found = np.array([ids[: len(text.empty_ids)] for ids in (*written, *shown)])
    _, first = np.unique(found, axis=0, return_index=True)
    return found[np.sort(first)]


def _name(ids: _Ids) -> str:
    return json_hash(ids.tolist())[:8]


def _rows(path: Path, ids: _Ids, row: np.dtype) -> kept.Rows:
    return kept.Rows(path, (len(ids),), row)


def _parts(cache: Path, ids: _Ids, row: np.dtype) -> list[_Captions]:
    parts = [ids[begin : begin + _CAPTIONS] for begin in range(0, len(ids), _CAPTIONS)]
    paths = [cache / f"captions-{i:05}-of-{len(parts):05}.npy" for i in range(len(parts))]
    return [_Captions(part, _rows(path, part, row)) for part, path in zip(parts, paths, strict=True)]


def _make(
    config: ConfigDict, source: Source, todo: Sequence[_Captions], mesh: Mesh, made_from: Mapping[str, Any]
) -> None:
    """Computes and writes some files, as many captions at a time as a microbatch has. The text encoders are on the
    devices for as long as that takes."""
    if not todo:
        return
    text, size = (
        text_of(source, config.model.dtype, parameter_placer(mesh)),
        config.train.batch // config.train.accumulate,
    )
    if config.train.quantize == "int8":
        quantise([text])
    graph, weights = nnx.split(text)
    rows_here = local_rows(size, mesh)

    @jax.jit(out_shardings=replicated(mesh))
    def encode(weights: Any, batch: dict[str, jax.Array]) -> Encoded:
        return nnx.merge(graph, weights).encode(batch["input_ids"])

    with Progress(total=sum(len(file.ids) for file in todo), desc="text", unit="caption") as bar:
        for ids, rows in todo:

            def start(begin: int, ids: _Ids = ids) -> tuple[int, Encoded]:
                """Gives the devices the captions from `begin` on; the last one fills up the batch."""
                batch = {"input_ids": ids[[min(begin + row, len(ids) - 1) for row in rows_here]]}
                return begin, encode(weights, to_devices(batch, mesh))

            with kept.written(rows, made_from) if processes.is_first() else nullcontext() as values:
                for begin, found in one_ahead(start, range(0, len(ids), size)):
                    end = min(begin + size, len(ids))
                    for name in rows.dtype.names or ():
                        value = to_host(getattr(found, name))[: end - begin]
                        kept.require_finite(value, "what the text encoder makes of captions", "take bfloat16")
                        if values is not None:
                            values[name][begin:end] = value
                    bar.update(end - begin)
    processes.barrier()
    for weight in jax.tree.leaves(weights):
        weight.delete()  # whoever still holds it
