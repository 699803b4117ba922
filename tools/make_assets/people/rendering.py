"""Draws meshes with textures, one key light, a fill light and light from behind: OpenGL through EGL, without a screen.

Mesa's software does (Debian: libegl1 libgl1-mesa-dri libegl-mesa0).
"""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from hgdpo_jax.run.errors import UserError
from tools.make_assets.people.makehuman import Mesh, Positions

try:
    moderngl: Any = importlib.import_module("moderngl")
except ImportError:  # said where it is used
    moderngl = None

_CUT = 0.55  # of opacity: what has more is drawn as if it were opaque, before what has less
_FAINT = 0.04  # and this is not drawn
_CONTRAST = 1.2  # exponent of a texture's brightness where its colour is ignored; 2.2 would keep its contrast
_GREY = 0.35  # mean of what a texture without colour reflects, so that the material's colour alone decides

_VERTEX = """#version 330
in vec3 position; in vec3 normal; in vec2 uv; in vec3 skin; in vec4 growth;
uniform mat4 projection; uniform mat3 turn; uniform vec4 grown; uniform vec4 lengths; uniform float bald;
uniform float push; uniform vec2 droop; uniform float rise; uniform float low;
out vec3 n; out vec2 place; out float height; out float reached; out float lip; out float hairy; out vec3 at;
void main() {
  vec4 here = growth * grown;
  here.w *= 1.0 - bald * skin.z;
  hairy = max(max(here.x, here.y), max(here.z, here.w));
  vec4 stands = here * lengths;
  float length = max(max(stands.x, stands.y), max(stands.z, stands.w));
  at = position + normal * (length + push * clamp((uv.y - low) / 0.12 + 0.3, 0.15, 1.0)) + vec3(0, droop * length);
  gl_Position = projection * vec4(at, 1); n = turn * normal; place = uv; height = at.y - rise * at.z;
  reached = skin.x; lip = skin.y; }"""

_FRAGMENT = """#version 330
in vec3 n; in vec2 place; in float height; in float reached; in float lip; in float hairy; in vec3 at; out vec4 colour;
uniform sampler2D picture; uniform vec3 tint; uniform float shine; uniform float gloss; uniform float least;
uniform float most; uniform float ceiling; uniform float floor_; uniform bool opaque; uniform float saturation;
uniform vec3 hair; uniform float cover; uniform float layer; uniform vec3 lips; uniform vec2 span;
uniform float ragged; uniform vec3 free; uniform vec3 stripe; uniform float stripes;
uniform vec3 key; uniform vec3 key_colour; uniform vec3 fill; uniform vec3 fill_colour; uniform vec3 rim;
uniform vec3 rim_colour; uniform vec3 sky; uniform vec3 ground;
float random(ivec2 p) {
  uint h = uint(p.x) * 73856093u ^ uint(p.y) * 19349663u;
  h = (h ^ (h >> 13)) * 0x5bd1e995u;
  return float((h ^ (h >> 15)) & 0xffffu) / 65535.0; }
float noise(vec2 p) {
  ivec2 i = ivec2(floor(p)); vec2 f = fract(p); f *= f * (3.0 - 2.0 * f);
  return mix(mix(random(i), random(i + ivec2(1, 0)), f.x), mix(random(i + ivec2(0, 1)), random(i + ivec2(1, 1)), f.x),
             f.y); }
void main() {
  vec4 seen = texture(picture, place);
  float alpha = opaque ? 1.0 : seen.a;
  if (alpha < least || alpha >= most || height > ceiling || height < floor_) discard;
  float uneven = ragged * (0.5 * noise(vec2(70.0 * place.x, 0.5)) + 0.5 * noise(vec2(190.0 * place.x, 7.5)));
  if (place.y > span.y || place.y < span.x + uneven) discard;
  if (abs(at.x) < free.x && at.z > free.z && at.y < free.y + 0.12 * at.x - 0.6 * pow(abs(at.x) / free.x, 6.0)) discard;
  vec3 m = normalize(n); if (!gl_FrontFacing && m.z < 0) m = -m;
  vec3 linear = pow(seen.rgb, vec3(2.2));
  vec3 albedo = mix(vec3(dot(linear, vec3(0.3, 0.6, 0.1))), linear, saturation) * tint;
  albedo = max(albedo, vec3(0));
  albedo *= mix(vec3(1), lips, lip);
  if (stripes > 0 && mod(place.y * stripes, 2.0) < 1.0) albedo = stripe;
  if (ragged > 0) albedo *= 0.7 + 0.6 * noise(vec2(220.0 * place.x, 3.0 * place.y));
  float shining = shine, strands = 0.6 * noise(place * vec2(430, 210)) + 0.4 * noise(place * 90.0);
  if (layer > 0) {
    if (hairy < 0.3 + 0.5 * layer + 0.5 * (strands - 0.5)) discard;
    albedo = hair * (0.6 + 0.6 * strands) * (0.6 + 0.4 * layer);
  } else if (hairy > 0) {
    float covered = cover * smoothstep(0.15, 0.75, hairy + 0.4 * (strands - 0.5));
    albedo = mix(albedo, hair * (0.7 + 0.6 * strands), covered); shining *= 1.0 - covered;
  }
  float lit = max(0.0, (dot(m, key) + 0.25) / 1.25); lit *= lit;
  float mirrored = pow(max(0.0, dot(m, normalize(key + vec3(0, 0, 1)))), gloss);
  float edge = pow(1.0 - max(0.0, m.z), 3.0) * max(0.0, dot(m, rim));
  vec3 light = mix(ground, sky, 0.5 + 0.5 * m.y) + key_colour * lit + fill_colour * max(0.0, dot(m, fill));
  vec3 sum = albedo * light * reached + shining * mirrored * key_colour + edge * rim_colour * (0.15 + albedo);
  sum = (1.0 - exp(-1.25 * sum)) / (1.0 - exp(-3.0));
  colour = vec4(pow(min(sum, 1.0), vec3(1 / 2.2)), opaque || alpha > 0.55 ? 1.0 : alpha);
}"""


@dataclass(frozen=True)
class Material:
    """What a mesh is made of.

    Attributes:
        picture: its texture; white if None.
        tint: factors of what the texture reflects; where `grey`, the mean of what is reflected, in [0, 1].
        shine, gloss: strength and sharpness of the key light's reflection.
        saturation: what is left of the texture's; 1 is all.
        opaque: whether the texture's opacity is ignored.
        least: opacity of what is drawn at all.
        grey: whether the texture's colour is, so that hair of any colour can be made of it.
        lips: factors of what lips reflect.
        stripes, stripe: how many in two units of the texture's height, and what they reflect; none if 0.
    """

    picture: Path | None = None
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shine: float = 0.02
    gloss: float = 10.0
    saturation: float = 1.0
    opaque: bool = True
    least: float = _FAINT
    grey: bool = False
    lips: tuple[float, float, float] = (1.0, 1.0, 1.0)
    stripes: float = 0.0
    stripe: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Growth(NamedTuple):
    """Hair that the skin has, as in heads.Skin.

    Attributes:
        grown: how densely each grows, in [0, 1]: moustache, beard of the chin, of the jaws, hair of the head.
        colour: what hair reflects.
        cover: of the skin at most, in [0, 1].
        lengths: in decimetres; 0 for stubble, which colours the skin alone.
        bald: how much of the crown is, in [0, 1].
        droop: where hair's tips are from where they would stand, upwards and forwards, in parts of its length.
    """

    grown: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    colour: tuple[float, float, float] = (0.0, 0.0, 0.0)
    cover: float = 0.0
    lengths: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    bald: float = 0.0
    droop: tuple[float, float] = (0.0, 0.0)


class Part(NamedTuple):
    """One mesh to draw.

    Attributes:
        mesh, positions, material: what, where, of what.
        triangles, shown: some, if not all of the mesh's, and what tells them from others.
        ceiling, floor, rise: nothing above or below is drawn, in decimetres of the mesh; `rise` higher for each before.
        growth: hair on it.
        layers: of hair that stand off it, one above the other; 0 for the skin itself.
        push: how far it is moved outwards, in decimetres.
        span: what is drawn of the texture's height; `ragged` is how uneven its lower edge is.
        free: nothing is drawn before the face: less far sideways than the first, and lower than the second, unless
            further behind than the third, in decimetres of the mesh.
    """

    mesh: Mesh
    positions: Positions
    material: Material
    triangles: Int[np.ndarray, "t 3"] | None = None
    shown: str = ""
    ceiling: float = 1e9
    floor: float = -1e9
    rise: float = 0.0
    growth: Growth = Growth()
    layers: int = 0
    push: float = 0.0
    span: tuple[float, float] = (-1e9, 1e9)
    ragged: float = 0.0
    free: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Light(NamedTuple):
    """Directions towards the lights, and their colours. x points right, y up, z to the viewer."""

    key: Float[np.ndarray, "3"]
    key_colour: Float[np.ndarray, "3"]
    fill: Float[np.ndarray, "3"]
    fill_colour: Float[np.ndarray, "3"]
    rim: Float[np.ndarray, "3"]
    rim_colour: Float[np.ndarray, "3"]
    sky: Float[np.ndarray, "3"]
    ground: Float[np.ndarray, "3"]


class Camera(NamedTuple):
    """Looks along -z at a head that is turned before it.

    Attributes:
        turn: of the head.
        target: the point, of the head before it is turned, that lies at `at`.
        at: in the picture, from (-1, -1) lower left to (1, 1).
        height: of what is seen where the target is.
        distance: from there.
    """

    turn: Float[np.ndarray, "3 3"]
    target: Float[np.ndarray, "3"]
    at: tuple[float, float]
    height: float
    distance: float

    def projection(self) -> Float[np.ndarray, "4 4"]:
        """Positions of the mesh → OpenGL's clip coordinates."""
        near, far, k = 0.3 * self.distance, 3.0 * self.distance, 2.0 * self.distance / self.height
        a, b = -(far + near) / (far - near), -2.0 * far * near / (far - near)
        lens = np.array([[k, 0, 0, 0], [0, k, 0, 0], [0, 0, a, b], [0, 0, -1, 0]])
        view = np.eye(4)
        view[:3, :3] = self.turn
        view[:3, 3] = -self.turn @ self.target - np.array([0, 0, self.distance])
        view[:2, 3] += np.array(self.at) * self.height / 2
        return lens @ view


def rotation(yaw: float, pitch: float, roll: float) -> Float[np.ndarray, "3 3"]:
    """Radians: to the right, downwards, and counterclockwise, in this order."""
    (a, b, c), (d, e, f) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    turns = [[c, -f, 0], [f, c, 0], [0, 0, 1]], [[1, 0, 0], [0, b, -e], [0, e, b]], [[a, 0, d], [0, 1, 0], [-d, 0, a]]
    one, two, three = (np.array(turn) for turn in turns)
    return one @ two @ three


class Renderer:
    """Keeps textures, triangles and buffers of what it has drawn."""

    def __init__(self, size: int) -> None:
        """`size` is that of its pictures, in pixels a side. Raises UserError without moderngl or Mesa."""
        if moderngl is None:
            raise UserError("moderngl is missing: pip install moderngl==5.13.0")
        os.environ.setdefault("LIBGL_ALWAYS_SOFTWARE", "1")  # the same pictures, whatever device there is
        try:
            self._context: Any = moderngl.create_context(standalone=True, backend="egl")
        except Exception as error:
            raise UserError(f"no OpenGL through EGL ({error}); install libegl1 libgl1-mesa-dri libegl-mesa0") from error
        self._size = size
        self._program = self._context.program(vertex_shader=_VERTEX, fragment_shader=_FRAGMENT)
        self._frame = self._context.simple_framebuffer((size, size), 4)
        self._textures: dict[tuple[Path | None, bool], Any] = {}
        self._buffers: dict[tuple[str, str], tuple[Any, Any]] = {}
        one, rest = moderngl.ONE, moderngl.ONE_MINUS_SRC_ALPHA
        self._context.blend_func = (moderngl.SRC_ALPHA, rest, one, rest)

    def draw(self, parts: Sequence[Part], camera: Camera, light: Light) -> UInt8[np.ndarray, "s s 4"]:
        """One picture: colour, times opacity, and opacity."""
        program = self._program
        for name, value in light._asdict().items():
            program[name] = tuple(map(float, value))
        program["projection"].write(camera.projection().T.astype("f4").tobytes())
        program["turn"].write(camera.turn.T.astype("f4").tobytes())
        self._frame.use()
        self._frame.clear(0.0, 0.0, 0.0, 0.0)
        self._context.enable(moderngl.DEPTH_TEST)
        self._context.disable(moderngl.BLEND)
        arrays = [self._fill(part) for part in parts]
        for part, array in zip(parts, arrays, strict=True):
            self._draw(part, array, max(_CUT, part.material.least), 2.0)
        self._context.enable(moderngl.BLEND)
        self._frame.depth_mask = False
        for part, array in zip(parts, arrays, strict=True):
            if not part.material.opaque and part.material.least < _CUT:
                self._draw(part, array, part.material.least, _CUT)
        self._frame.depth_mask = True
        pixels = np.frombuffer(self._frame.read(components=4), np.uint8)
        return pixels.reshape(self._size, self._size, 4)[::-1]

    def _draw(self, part: Part, array: Any, least: float, most: float) -> None:
        program, material = self._program, part.material
        program["tint"] = tuple(map(float, np.divide(material.tint, _GREY) if material.grey else material.tint))
        program["shine"], program["gloss"] = material.shine, material.gloss
        program["saturation"] = material.saturation
        program["opaque"], program["least"], program["most"] = material.opaque, least, most
        program["ceiling"], program["floor_"], program["rise"] = part.ceiling, part.floor, part.rise
        program["lips"], program["stripe"], program["stripes"] = material.lips, material.stripe, material.stripes
        program["span"], program["ragged"] = part.span, part.ragged
        program["free"], program["low"] = part.free, part.span[0]
        hair = part.growth
        program["grown"], program["hair"], program["cover"] = hair.grown, hair.colour, hair.cover
        program["bald"], program["push"] = hair.bald, part.push
        self._texture(material.picture, material.grey).use(0)
        for i in range(max(part.layers, 1)):
            layer = (i + 1) / part.layers if part.layers else 0.0
            program["layer"], program["lengths"] = layer, tuple(layer * length for length in hair.lengths)
            program["droop"] = tuple(layer * far for far in hair.droop)
            array.render()

    def _fill(self, part: Part) -> Any:
        """The vertex array of a part, with its positions of today."""
        mesh, key = part.mesh, (part.mesh.name, part.shown)
        if key not in self._buffers:
            triangles = mesh.triangles if part.triangles is None else part.triangles
            moving, still = (self._context.buffer(reserve=4 * k * len(mesh.corners)) for k in (6, 9))
            still.write(np.concatenate([mesh.uv, mesh.skin], 1).astype("f4").tobytes())
            indices = self._context.buffer(np.ascontiguousarray(triangles, "i4").tobytes())
            content = [(moving, "3f 3f", "position", "normal"), (still, "2f 3f 4f", "uv", "skin", "growth")]
            self._buffers[key] = moving, self._context.vertex_array(self._program, content, indices)
        moving, array = self._buffers[key]
        both = np.concatenate([part.positions, mesh.normals(part.positions)], 1)
        moving.write(both[mesh.corners].astype("f4").tobytes())
        return array

    def _texture(self, file: Path | None, grey: bool) -> Any:
        if (file, grey) not in self._textures:
            image = Image.open(file) if file else Image.new("RGB", (1, 1), "white")
            pixels = np.asarray(image.convert("RGBA").transpose(Image.Transpose.FLIP_TOP_BOTTOM))
            pixels = without_colour(pixels) if grey else pixels
            texture = self._context.texture(pixels.shape[1::-1], 4, pixels.tobytes())
            texture.build_mipmaps()
            texture.filter = moderngl.LINEAR_MIPMAP_LINEAR, moderngl.LINEAR
            self._textures[file, grey] = texture
        return self._textures[file, grey]


def without_colour(pixels: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 4"]:
    """A texture's brightness alone: what it reflects has the same mean, where it is opaque, whatever it was."""
    linear = (pixels[..., :3] / 255.0).mean(-1) ** _CONTRAST
    mean = np.average(linear, weights=pixels[..., 3] + 1e-6)
    grey = np.clip(linear * (_GREY / max(mean, 1e-3)), 0.0, 1.0) ** (1 / 2.2) * 255.0
    return np.concatenate([np.repeat(grey[..., None], 3, -1).round().astype(np.uint8), pixels[..., 3:]], -1)
