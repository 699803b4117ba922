"""Image files as people have them."""

import errno
import io
import logging
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from hgdpo_jax.data.photographs import Photograph, sort_by_shape
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.pictures import read
from hgdpo_jax.pictures.read import UnreadableImage, image_shape, read_image
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def written(folder: Path, image: Image.Image, name: str, **settings: object) -> Path:
    image.save(folder / name, **settings)
    return folder / name


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "gif", "avif", "bmp", "jpg"])
def test_what_pillow_opens_is_read(tmp_path: Path, kind: str) -> None:
    lossless = {"webp": {"lossless": True}, "avif": {"quality": 100}, "jpg": {"quality": 100}}.get(kind, {})
    found = read_image(written(tmp_path, Image.fromarray(RAMP), f"a.{kind}", **lossless))
    assert found.mode == "RGB" and image_shape(tmp_path / f"a.{kind}") == (16, 16)
    assert np.abs(np.asarray(found).astype(int) - RAMP[..., None]).max() <= (3 if kind in ("avif", "jpg") else 0)


def test_cmyk_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "a.jpg", quality=100)
    assert np.abs(np.asarray(read_image(path)).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("kind", ["png", "tiff", "float"])
def test_grey_of_sixteen_bits_is_scaled(tmp_path: Path, kind: str) -> None:
    if kind == "float":
        path = written(tmp_path, Image.fromarray(RAMP.astype(np.float32) / 255), "a.tiff")
    else:
        path = written(tmp_path, Image.fromarray(RAMP.astype(np.uint16) * 257), f"a.{kind}")
    assert np.array_equal(np.asarray(read_image(path)), np.repeat(RAMP[..., None], 3, -1))


def test_grey_of_another_range_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, Image.fromarray(np.array([[0.0, 700.0]], np.float32)), "a.tiff")
    with pytest.raises(UnreadableImage, match="grey values from 0 to 700; expected 0 to 1"):
        read_image(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([200, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        path = written(tmp_path, image, "a.png", transparency=0)
    else:
        path = written(tmp_path, image.convert(mode), "a.png")
    assert np.asarray(read_image(path)).tolist() == [[[255] * 3, [0] * 3]]


def test_half_of_it_is_half_of_white(tmp_path: Path) -> None:
    path = written(tmp_path, Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "a.png")
    assert np.asarray(read_image(path)).tolist() == [[[127] * 3]]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def display_p3() -> bytes:
    """An ICC profile, version 2, of three primaries and a gamma of 2.2: Display P3's, adapted to D50."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    text = b"a wide space\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 78
    tags = {
        b"desc": description + b"\0" * (-len(description) % 4),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.5151, 0.2412, -0.0011),
        b"gXYZ": xyz(0.2920, 0.6922, 0.0419),
        b"bXYZ": xyz(0.1571, 0.0666, 0.7841),
        **{kind + b"TRC": gamma for kind in (b"r", b"g", b"b")},
    }
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def test_an_embedded_profile_is_converted(tmp_path: Path) -> None:
    # In linear light, P3's primaries in sRGB's, of the colour (200, 120, 90) with a gamma of 2.2.
    linear = (np.array([200, 120, 90]) / 255) ** 2.2
    matrix = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])
    wanted = matrix @ linear
    wanted = 255 * np.where(wanted > 0.0031308, 1.055 * wanted ** (1 / 2.4) - 0.055, 12.92 * wanted)
    path = written(tmp_path, Image.new("RGB", (2, 2), (200, 120, 90)), "a.png", icc_profile=display_p3())
    found = np.asarray(read_image(path))[0, 0]
    assert np.abs(found - wanted).max() <= 3 and np.abs(found.astype(int) - (200, 120, 90)).max() > 8
    white = written(tmp_path, Image.new("RGBA", (1, 1), (90, 10, 10, 0)), "b.png", icc_profile=display_p3())
    assert np.asarray(read_image(white)).tolist() == [[[255] * 3]]


def test_srgbs_own_profile_changes_nothing_and_a_broken_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, text in ((srgb, ""), (b"no profile at all", "its colour profile cannot be used")):
        caplog.clear()
        path = written(tmp_path, Image.new("RGB", (1, 1), (200, 120, 90)), "a.png", icc_profile=profile)
        with caplog.at_level(logging.WARNING):
            assert np.asarray(read_image(path)).tolist() == [[[200, 120, 90]]]
        assert text in caplog.text and (str(path) in caplog.text) == bool(text)


def test_a_picture_is_turned_upright_and_an_orientation_that_is_text_is_none(tmp_path: Path) -> None:
    tiff = b"MM\0*\0\0\0\x08" + struct.pack(">H", 1) + struct.pack(">HHI4s", 0x0112, 2, 2, b"6\0\0\0") + b"\0" * 4
    turned = Image.Exif()
    turned[0x0112] = 6
    path = written(tmp_path, Image.new("RGB", (20, 30)), "a.jpg", exif=turned)
    assert image_shape(path) == (20, 30) and read_image(path).size == (30, 20)
    path = written(tmp_path, Image.new("RGB", (20, 30)), "a.jpg", exif=b"Exif\0\0" + tiff)
    assert image_shape(path) == (30, 20) and read_image(path).size == (20, 30)
    photograph = Photograph("a", path, "")
    found = sort_by_shape([photograph], {"128x64": (128, 64), "64x128": (64, 128)})
    assert found == {"128x64": [photograph], "64x128": []}


CORNER = np.kron(np.array([[1, 0, 0], [0, 0, 0]], np.uint8) * 255, np.ones((8, 8), np.uint8))  # white at the top left
TURNED = {  # EXIF's orientation → the picture upright, by the standard's table of what row and column 0 are
    1: CORNER, 2: CORNER[:, ::-1], 3: CORNER[::-1, ::-1], 4: CORNER[::-1], 5: CORNER.T, 6: CORNER.T[:, ::-1],
    7: CORNER.T[::-1, ::-1], 8: CORNER.T[::-1],
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("jpg", {}), ("png", {}), ("webp", {}), ("avif", {}), ("mpo", {}), ("jxl", {}), ("heic", {}), ("tiff", {}),
     ("tiff", {"compression": "tiff_lzw"}), ("tiff", {"compression": "jpeg"})],
)  # fmt: skip
def test_each_format_is_turned_upright(
    tmp_path: Path, kind: str, settings: dict[str, object], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, expected = Image.fromarray(CORNER).convert("RGB"), TURNED[orientation]
    if kind == "heic":  # its own boxes say how it is turned, which its plugin writes where the image knows it
        image.info["exif"] = exif.tobytes()
        path = written(tmp_path, image, "a.heic")
    else:
        path = written(tmp_path, image, f"a.{kind}", exif=exif.tobytes(), **settings)
    member = Member(path, "inside", path.read_bytes)
    for found in (path, member):
        assert image_shape(found) == expected.shape
        upright = np.asarray(read_image(found))
        assert upright.shape == (*expected.shape, 3)
        assert np.abs(upright.mean(-1) - expected).mean() < 20


@pytest.mark.parametrize("where", ["before", "after", "xmp"])
def test_a_png_may_say_anywhere_how_it_is_turned(tmp_path: Path, where: str) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(CORNER).save(buffer, "png")
    content, chunk = buffer.getvalue(), _chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    if where == "xmp":
        text = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
        chunk = _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text)
    at = 33 if where == "before" else len(content) - 12  # after the header, or before the end
    (tmp_path / "a.png").write_bytes(content[:at] + chunk + content[at:])
    assert image_shape(tmp_path / "a.png") == TURNED[8].shape
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 0], TURNED[8])


def test_a_png_that_says_nothing_is_not_decoded_for_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, Image.fromarray(CORNER), "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("decoded"))
    assert image_shape(path) == CORNER.shape


@pytest.mark.parametrize("kind", ["heic", "jxl"])
def test_what_the_extra_opens_is_read_by_its_content_too(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, Image.fromarray(RAMP).convert("RGB"), f"a.{kind}", quality=95)
    path.rename(tmp_path / "a.jpg")  # as telephones export them
    found = read_image(tmp_path / "a.jpg")
    assert found.mode == "RGB" and np.abs(np.asarray(found)[..., 0].astype(int) - RAMP).max() <= 8
    assert f".{kind}" in read.SUFFIXES and f".{kind}" not in read.UNOPENED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC; pip install pillow-heif"),
        (b"\xff\x0a\x41\x20", "it is JXL; pip install pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "it is JXL; pip install pillow-jxl-plugin"),
        (b"<svg></svg>", "not an image of a known kind"),
        (b"", "an empty file"),
    ],
)
def test_what_cannot_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    """As without the extra, whose plugins would take the first three."""
    monkeypatch.setattr(read, "UNOPENED", {k: v for k, v in read._OF_OTHERS.items() if k in (".heic", ".jxl")})
    known = [kind for kind in Image.ID if kind not in ("HEIF", "JXL")]
    monkeypatch.setattr(Image, "ID", known)
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for image in (path, Member(path, "inside", path.read_bytes)):
        for look in (image_shape, read_image):
            with pytest.raises(UnreadableImage) as error:
                look(image)
            assert str(error.value) == message


def test_a_broken_chunk_is_named_and_the_rest_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = written(tmp_path, Image.fromarray(RAMP), "good.png")
    content = bytearray(good.read_bytes())
    content[29] ^= 1  # in the checksum of its header
    (tmp_path / "bad.png").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        readable, pixels = load_images([Photograph("b", tmp_path / "bad.png", ""), Photograph("g", good, "")], (8, 8))
    assert [p.id for p in readable] == ["g"] and len(pixels) == 1
    assert "bad.png cannot be read (" in caplog.text and "left out" in caplog.text


def test_a_picture_too_large_for_pillow_is_named_and_a_large_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, Image.fromarray(RAMP), "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(read.Image, "MAX_IMAGE_PIXELS", 200)
        assert read_image(path).size == (16, 16)
        monkeypatch.setattr(read.Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(UnreadableImage, match="decompression bomb"):
            read_image(path)


def test_text_that_inflates_without_end_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RAMP).save(buffer, "png")
    content = buffer.getvalue()
    bomb = _chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (PngImagePlugin.MAX_TEXT_CHUNK + 1)))
    (tmp_path / "a.png").write_bytes(content[:33] + bomb + content[33:])
    with pytest.raises(UnreadableImage, match="[Dd]ecompressed"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_a_photograph_that_the_disk_does_not_give_is_not_left_out(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where it is opened, nor where it is decoded; nor in an archive."""
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png")
    content, waited = (tmp_path / "a.png").read_bytes(), []
    monkeypatch.setattr("time.sleep", waited.append)
    faults = [OSError(code, os.strerror(code))]

    def bytes_of() -> bytes:
        if faults:
            raise faults.pop()
        return content

    member = Member(tmp_path / "a.tar", "a.png", bytes_of)
    assert image_shape(member) == (4, 8) and waited == [1]
    (image,) = load_images([Photograph("a", tmp_path / "a.png", "a")], (4, 8))[1]
    for owner, name, function in ((Image, "open", Image.open), (Image.Image, "convert", Image.Image.convert)):
        faults.append(OSError(code, os.strerror(code)))
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *given, f=function, **more: bytes_of() and f(*given, **more))
            assert np.array_equal(load_images([Photograph("a", tmp_path / "a.png", "a")], (4, 8))[1][0], image)
            faults[:] = [OSError(code, os.strerror(code))] * 9
            with pytest.raises(UserError, match=r"a.png: cannot be read .*, the same command then goes on"):
                load_images([Photograph("a", tmp_path / "a.png", "a")], (4, 8))
            faults.clear()


def test_memory_that_ran_out_drops_no_photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        load_images([Photograph("a", tmp_path / "a.png", "a")], (4, 8))
