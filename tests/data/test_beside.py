"""Which text belongs to which picture: in a folder, and in an archive, which is read the same way."""

import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.data.readers import beside
from hgdpo_jax.run.errors import UserError
from tests.data.test_readers import png

Files = Mapping[str, bytes | str]  # name → content; the text of a picture that is called by a letter is made of it


def folder_of(place: Path, files: Files) -> Path:
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return place


def archive_of(place: Path, files: Files) -> Path:
    place.mkdir(exist_ok=True)
    with tarfile.open(place / "a.tar", "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return place / "a.tar"


def read(place: Path) -> dict[tuple[str, str], tuple[int, ...]]:
    """(its name without the archive's, caption) → the colour of the photograph."""
    found = list_photographs(place, "train", heldout=0.0)
    readable, images = load_images(found, (8, 12))
    assert readable == found
    colours = [tuple(int(value) for value in ((image[0, 0] + 1) * 127.5).round()) for image in images]
    names = [p.id.removeprefix("a.tar/").removesuffix(".png").removesuffix(".PNG") for p in found]
    return {(name, p.caption): each for name, p, each in zip(names, found, colours, strict=True)}


A, B = (250, 10, 10), (10, 250, 10)
SAMPLES: dict[str, tuple[Files, dict[tuple[str, str], tuple[int, ...]]]] = {
    "dates": (
        {"IMG_2024.01.06.png": png("a"), "IMG_2024.01.06.txt": "first", "IMG_2024.01.07.png": png("b"),
         "IMG_2024.01.07.txt": "second"},
        {("IMG_2024.01.06", "first"): A, ("IMG_2024.01.07", "second"): B},
    ),
    "numbers": (
        {"1.0.png": png("a"), "1.0.txt": "first", "1.5.png": png("b"), "1.5.txt": "second"},
        {("1.0", "first"): A, ("1.5", "second"): B},
    ),
    "only one of two dates has text": (
        {"x.1.png": png("a"), "x.1.txt": "first", "x.2.png": png("b")},
        {("x.1", "first"): A},
    ),
    "a mask": (
        {"a.png": png("a"), "a.seg.png": png("b"), "a.txt": "first"},
        {("a", "first"): A},
    ),
    "a mask before it": (
        {"a.mask.png": png("b"), "a.png": png("a"), "a.txt": "first"},
        {("a", "first"): A},
    ),
    "suffixes in capitals": (
        {"a.PNG": png("a"), "a.TXT": "first", "b.png": png("b"), "b.Caption": "second"},
        {("a", "first"): A, ("b", "second"): B},
    ),
    "what systems keep": (
        {"a.png": png("a"), "a.txt": "first", "._a.png": b"\0\5\26\7", "._a.txt": b"\xff\xfe", "__MACOSX/._b.png": b"x",
         "__MACOSX/b.png": b"x", "__MACOSX/b.txt": "x", ".ipynb_checkpoints/c.png": b"x",
         ".ipynb_checkpoints/c.txt": "x", "@eaDir/d.png": b"x", "@eaDir/d.txt": "x", ".e.png": b"x", ".e.txt": "x"},
        {("a", "first"): A},
    ),
    "marks of patterns": (
        {"a[1].png": png("a"), "a[1].txt": "first", "b*?.d/c.png": png("b"), "b*?.d/c.txt": "second"},
        {("a[1]", "first"): A, ("b*?.d/c", "second"): B},
    ),
    "other data of a sample": (
        {"a.png": png("a"), "a.txt": "first", "a.h5": b"x", "a.pdf": b"x", "a.mpg": b"x", "a.npy": b"x", "a.cls": "3"},
        {("a", "first"): A},
    ),
}  # fmt: skip


@pytest.mark.parametrize("write", [folder_of, archive_of])
@pytest.mark.parametrize("case", SAMPLES)
def test_a_picture_has_its_own_text(tmp_path: Path, write: Callable[[Path, Files], Path], case: str) -> None:
    files, expected = SAMPLES[case]
    assert read(write(tmp_path / "p", files)) == expected


@pytest.mark.parametrize("write", [folder_of, archive_of])
@pytest.mark.parametrize(
    "files",
    [
        {"a.png": b"", "a.jpg": b"", "a.txt": "x"},
        {"d/a.webp": b"", "d/a.PNG": b"", "d/a.caption": "x"},
        {"a.1.tif": b"", "a.1.bmp": b"", "a.1.txt": "x", "a.1.jpg": b""},
    ],
)
def test_two_pictures_of_one_text_are_refused(
    tmp_path: Path, write: Callable[[Path, Files], Path], files: Files
) -> None:
    with pytest.raises(UserError, match="have one text, .*; which is the photograph") as error:
        list_photographs(write(tmp_path / "p", files), "train")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_texts_of_whole_names_tell_pictures_apart(tmp_path: Path) -> None:
    files = {"a.png": png("a"), "a.png.txt": "first", "a.jpg": png("b"), "a.jpg.txt": "second"}
    for place in (folder_of(tmp_path / "p", files), archive_of(tmp_path / "q", files)):
        assert {(p.id[-3:], p.caption) for p in list_photographs(place, "train", heldout=0.0)} == {
            ("png", "first"),
            ("jpg", "second"),
        }


def test_files_of_a_key_of_webdataset_are_one_example(tmp_path: Path) -> None:
    files = {"k1.image.png": png("a"), "k1.mask.png": png("b"), "k1.caption.txt": "first",
             "d.e/k2.jpg.png": png("b"), "d.e/k2.meta.json": json.dumps({"prompt": "second"})}  # fmt: skip
    assert read(archive_of(tmp_path, files)) == {("k1", "first"): A, ("d.e/k2", "second"): B}
    files = {"k.left.png": png("a"), "k.right.png": png("b"), "k.txt": "x"}
    with pytest.raises(UserError, match=r"k\.left\.png and k\.right\.png have one text, k\.txt"):
        list_photographs(archive_of(tmp_path, files), "train")


@pytest.mark.parametrize("write", [folder_of, archive_of])
def test_photographs_that_cannot_be_opened_are_counted_and_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, Files], Path],
) -> None:
    monkeypatch.setattr(beside, "SUFFIXES", beside.SUFFIXES - {".heic", ".jxl"})  # as without the extra
    monkeypatch.setattr(beside, "UNOPENED", {".heic": "a plugin", ".jxl": "a plugin", ".cr2": "develop it"})
    files = {"a.png": png("a"), "a.txt": "first", "b.heic": b"x", "b.txt": "x", "c.HEIC": b"x", "d.jxl": b"x",
             "e.CR2": b"x", "f.png": png("b")}  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert set(read(write(tmp_path / "p", files))) == {("a", "first")}
    assert (
        "3 images that cannot be opened here (.heic, .jxl: a plugin) are left out, the first is b.heic" in caplog.text
    )
    assert "1 images that cannot be opened here (.cr2: develop it) are left out, the first is e.CR2" in caplog.text
    assert "1 images without text beside them are left out, the first is f.png" in caplog.text


def test_links_are_followed_once_and_those_to_nothing_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "p", {"z/b.png": png("b"), "z/b.txt": "second"})
    elsewhere = folder_of(tmp_path / "elsewhere", {"deep/a.png": png("a"), "deep/a.txt": "first"})
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder / "z")  # in the folder: it would be there twice
    (elsewhere / "deep" / "up").symlink_to(folder)  # a circle
    (folder / "loop").symlink_to(folder / "loop")
    for name in ("gone.png", "gone.jpg", "lost.txt"):
        (folder / name).symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        assert read(folder) == {("linked/deep/a", "first"): A, ("z/b", "second"): B}
    assert "2 images that are links to nothing are left out, the first is gone.jpg" in caplog.text


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "p", {"a.png": png("a"), "a.txt": "first", "closed/b.png": b""})
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\)"):
        list_photographs(folder, "train")


def test_a_folder_with_text_but_no_photograph_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path / "p", {"readme.txt": "x", "a.png": png("a")})
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="p: holds no photograph with a caption"):
        list_photographs(folder, "train")
    assert "1 images without text" in caplog.text


# Archives


def test_links_in_an_archive_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = archive_of(tmp_path, {"d/a.png": png("a"), "d/a.txt": "first", "b.txt": "second", "d/c.txt": "third"})
    with tarfile.open(place, "a") as archive:
        for name, kind, target in (("b.png", tarfile.LNKTYPE, "d/a.png"), ("d/c.png", tarfile.SYMTYPE, "a.png"),
                                   ("e.png", tarfile.SYMTYPE, "gone.png")):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    with caplog.at_level(logging.WARNING):
        assert read(place) == {("d/a", "first"): A, ("b", "second"): A, ("d/c", "third"): A}
    assert "1 images that are links to nothing are left out, the first is e.png" in caplog.text


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_that_ends_early_anywhere_is_refused(tmp_path: Path, kind: int) -> None:
    with tarfile.open(tmp_path / "whole.tar", "w", format=kind) as archive:
        for name in ("a", "ö" * 45):
            for suffix, data in (("png", png("a")), ("txt", b"x")):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    content = (tmp_path / "whole.tar").read_bytes()
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512 + 1024  # the last block, then two of zeros
    place = tmp_path / "a.tar"
    for length in [*range(0, end, 97), *range(512, end, 512), end - 1]:
        place.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"a\.tar: is not a tar file that can be read \(.*\); copy it again"):
            list_photographs(place, "train", heldout=0.0)
    for padding in (0, 512, 100_000):  # programs fill the end up differently
        place.write_bytes(content[:end] + bytes(padding))
        assert len(list_photographs(place, "train", heldout=0.0)) == 2


@pytest.mark.parametrize("rest", ["another archive", "rubbish", "a file that was made at full size"])
def test_an_archive_with_more_behind_its_end_is_refused(tmp_path: Path, rest: str) -> None:
    place = archive_of(tmp_path, {"a.png": png("a"), "a.txt": "first"})
    content = place.read_bytes()
    more = {"another archive": content, "rubbish": b"rubbish", "a file that was made at full size": bytes(2**21)}[rest]
    place.write_bytes(content + more)
    with pytest.raises(UserError, match="does not end there|nothing but zeros"):
        list_photographs(place, "train")
    broken = bytearray(content)
    broken[2 * 512 + 148] ^= 1  # in the checksum of the second member
    place.write_bytes(broken)
    with pytest.raises(UserError, match="has no member at byte 1024, and does not end there"):
        list_photographs(place, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "is not UTF-8"),
        ("a.json", b'{"caption"', "is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b"1" * 5000, "is not JSON"),
        ("d/a.b.json", '{"caption": "ö"}'.encode("utf-16"), "is not UTF-8"),
    ],
)
def test_a_broken_text_in_an_archive_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    place = archive_of(tmp_path, {name.rpartition(".")[0] + ".png": png("a"), name: content})
    with pytest.raises(UserError, match=message) as error:
        list_photographs(place, "train")
    assert f"a.tar, {name}: " in str(error.value) and "\n" not in str(error.value)
    assert "copy it again" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "captions"),
    [
        ({"caption": ["one", "two"]}, ["one", "two"]),
        ({"caption": None, "text": "one"}, ["one"]),
        ({"caption": ["one", None, 3]}, ["one"]),
        ({"caption": None}, []),
        ({"caption": []}, []),
        ({"caption": {"en": "one"}}, []),
        ([1], []),
        (None, []),
    ],
)
def test_captions_in_json(tmp_path: Path, caplog: pytest.LogCaptureFixture, entry: object, captions: list[str]) -> None:
    files = {"a.png": png("a"), "a.json": json.dumps(entry), "b.png": png("b"), "b.txt": "last"}
    with caplog.at_level(logging.WARNING):
        found = list_photographs(archive_of(tmp_path, files), "train", heldout=0.0)
    assert [p.caption for p in found] == [*captions, "last"]
    assert ("1 images without text" in caplog.text) == (not captions)


def test_shards_that_systems_left_are_passed_over(tmp_path: Path) -> None:
    place = archive_of(tmp_path, {"a.png": png("a"), "a.txt": "first"})
    place.rename(tmp_path / "a.TAR")
    (tmp_path / "._a.tar").write_bytes(b"\0\5\26\7")
    assert [p.caption for p in list_photographs(tmp_path, "train", heldout=0.0)] == ["first"]


def test_pictures_of_a_link_are_the_files(tmp_path: Path) -> None:
    """A linked picture beside its own text is read as the file that it leads to."""
    folder = folder_of(tmp_path / "p", {"a.txt": "first"})
    Image.new("RGB", (4, 4), A).save(tmp_path / "elsewhere.png")
    (folder / "a.png").symlink_to(tmp_path / "elsewhere.png")
    assert read(folder) == {("a", "first"): A}
