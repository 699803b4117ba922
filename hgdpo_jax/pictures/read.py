"""Image files as people have them: any kind that Pillow opens becomes upright, sRGB, on white."""

import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from hgdpo_jax.run.files import Member, is_passing, retried

with suppress(ImportError):  # the extra `pictures` of pyproject.toml
    importlib.import_module("pillow_heif").register_heif_opener()
with suppress(ImportError):
    importlib.import_module("pillow_jxl")  # which registers itself

_ORIENTATION = 0x0112
_NAMED_ALONE = ("BUFR", "GRIB", "HDF5", "MPEG", "PDF", "WMF")  # Pillow knows their names, but cannot decode them
# What Pillow opens, by the end of a name.
SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind not in _NAMED_ALONE)
_OF_OTHERS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif"),
    ".jxl": "pip install pillow-jxl-plugin",
    **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2"), "make JPEG or PNG of it"),
}
# Photographs that cannot be opened here, by the end of a name, and what helps.
UNOPENED = {suffix: advice for suffix, advice in _OF_OTHERS.items() if suffix not in SUFFIXES}
_HEIF, _JXL = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1"), (b"\xff\x0a", b"\0\0\0\x0cJXL ")
_OF_PNG = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # parts that may say how it is turned
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # colour space of a profile → Pillow's mode
_SRGB = ImageCms.createProfile("sRGB")
_filters = Lock()  # all threads share the filters of warnings


class UnreadableImage(Exception):
    """A file that is no image, or a broken one."""


@contextmanager
def _opened(image: Path | Member) -> Iterator[Image.Image]:
    """The image, opened; an error meanwhile becomes an UnreadableImage."""
    try:
        content = image if isinstance(image, Path) else io.BytesIO(image.read())
        with _filters, warnings.catch_warnings():
            # Pillow's limit is for what strangers upload; beyond twice that it raises.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(content)  # which reads no more than the header
        with opened as file:
            yield file
    except UnidentifiedImageError as error:
        raise UnreadableImage(_kind_of(image)) from error
    except Exception as error:  # Pillow's plugins raise whatever they stumble over: SyntaxError, struct.error, …
        if is_passing(error) or isinstance(error, MemoryError):  # of the machine
            raise
        raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__) from error


def _kind_of(image: Path | Member) -> str:
    """Of a file that no plugin takes: what it is, by its first bytes."""
    begin = _content(image)[:12]
    kind = ".jxl" if begin.startswith(_JXL) else ".heic" if begin[4:8] == b"ftyp" and begin[8:] in _HEIF else ""
    if kind in UNOPENED:
        return f"it is {kind[1:].upper()}; {UNOPENED[kind]}"
    return "not an image of a known kind" if begin else "an empty file"


def _content(image: Path | Member) -> bytes:
    return image.read_bytes() if isinstance(image, Path) else image.read()


def image_shape(image: Path | Member) -> tuple[int, int]:
    """(height, width) of an image once it is upright, without decoding it.

    Raises:
        UnreadableImage: it is none.
        UserError: the disk or the file server does not answer; see :func:`hgdpo_jax.run.files.retried`.
    """
    return retried(lambda: _shape(image), image)


def _shape(image: Path | Member) -> tuple[int, int]:
    with _opened(image) as file:
        width, height = file.size
        turned = _says_orientation(image, file) and file.getexif().get(_ORIENTATION) in (5, 6, 7, 8)  # or some text
    return (width, height) if turned else (height, width)


def _says_orientation(image: Path | Member, file: Image.Image) -> bool:
    """Whether an image may say how it is turned. Of a TIFF Pillow gives the upright size at once; a PNG it decodes to
    find out, which is spared where no part says anything."""
    if file.format == "PNG":
        content = _content(image)
        return any(part in content for part in _OF_PNG)
    return file.format != "TIFF"


def read_image(path: Path | Member) -> Image.Image:
    """An image of mode RGB.

    16-bit grey is scaled to 8 bits, an embedded colour profile converted to sRGB, transparency laid on white, and the
    first of several frames taken.

    Raises:
        UnreadableImage: it is none, or broken.
        UserError: the disk or the file server does not answer; see :func:`hgdpo_jax.run.files.retried`.
    """
    return retried(lambda: _read(path), path)


def _read(path: Path | Member) -> Image.Image:
    with _opened(path) as file:
        image = ImageOps.exif_transpose(file)
        profile, alpha = file.info.get("icc_profile"), None
        if image.mode.startswith("I") or image.mode == "F":
            image = _eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
            alpha = image.getchannel("A")
        image = _in_srgb(image, profile, path) if profile else image.convert("RGB")
        if alpha is not None:
            image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of floats in [0, 1], as grey of 8 bits."""
    values = np.asarray(image, np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not (np.min(values) >= 0.0 and np.max(values) <= top):
        raise ValueError(f"grey values from {np.min(values):g} to {np.max(values):g}; expected 0 to {top:g}")
    return Image.fromarray((values * (255.0 / top)).round().astype(np.uint8))


def _in_srgb(image: Image.Image, icc: bytes, path: Path | Member) -> Image.Image:
    """Colours by their profile. A warning names a profile that cannot be used; the colours are then taken as sRGB."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image.convert("RGB")
        mode = _MODES[profile.profile.xcolor_space.strip()]
        converted = ImageCms.profileToProfile(image.convert(mode), profile, _SRGB, outputMode="RGB")
        assert converted is not None  # only a conversion in place gives None
        return converted
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError) as error:
        logging.warning("image %s: its colour profile cannot be used (%s); its colours are taken for sRGB", path, error)
        return image.convert("RGB")
