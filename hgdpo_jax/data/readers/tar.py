"""WebDataset's tar shards: NAME.jpg, NAME.txt or NAME.json, … one after the other, an example for each NAME."""

import json
import posixpath
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hgdpo_jax.data.readers import beside
from hgdpo_jax.data.readers.example import Example, Examples, captions_of, split_of_file
from hgdpo_jax.pictures.read import SUFFIXES
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member

_TEXTS = (*beside.TEXTS, ".json")
_PADDING = 2**20 + 2 * tarfile.BLOCKSIZE  # tar fills its last record, which is 10 kB long unless told, with zeros


def read(shards: Sequence[Path]) -> Examples:
    """Members are read where they lie: a shard is neither unpacked nor kept open.

    Raises:
        UserError: a shard is broken or ends early, a text in it cannot be read, or two images have one text.
    """
    for shard in shards:
        try:
            members, links = _members(shard)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise UserError(f"{shard}: is not a tar file that can be read ({error}); copy it again") from error
        names = list(members)
        matches, without = beside.match(shard, names, _TEXTS, by_key=True)
        for picture, texts, name in matches:
            captions = next((found for text in texts if (found := _captions(members[text]))), [])
            if not captions:
                without.append(picture)
            for caption in captions:
                yield Example(f"{shard.name}/{name}", members[picture], caption, split_of_file(shard))
        beside.say_left_out(shard, without, names)
        beside.say(shard, "that are links to nothing", [name for name in links if beside.suffix_of(name) in SUFFIXES])


def _members(shard: Path) -> tuple[dict[str, Member], list[str]]:
    """Name → member, a link's too, and the names of links to nothing.

    Raises:
        tarfile.TarError: it is no tar file, or not whole.
    """
    found: dict[str, Member] = {}
    links: dict[str, str] = {}
    with shard.open("rb") as file:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if beside.is_passed_over(member.name):
                    continue
                if member.isfile():
                    found[member.name] = _member(shard, member)
                elif member.islnk() or member.issym():
                    folder = posixpath.dirname(member.name) if member.issym() else ""
                    links[member.name] = posixpath.normpath(posixpath.join(folder, member.linkname))
        _require_end(file, archive.offset)
    targets = {posixpath.normpath(name): member for name, member in found.items()}
    found |= {name: targets[target] for name, target in links.items() if target in targets}
    return found, [name for name in links if name not in found]


def _require_end(file: BinaryIO, begin: int) -> None:
    """Raises tarfile.ReadError unless the end of an archive begins there: two blocks of zeros, and perhaps some more.
    tarfile takes everything that is no header for the end."""
    file.seek(begin)
    rest = file.read(_PADDING + 1)
    if len(rest) < 2 * tarfile.BLOCKSIZE and not any(rest):
        raise tarfile.ReadError(f"it ends early, at byte {begin + len(rest)}")
    if any(rest):
        raise tarfile.ReadError(f"it has no member at byte {begin}, and does not end there")
    if len(rest) > _PADDING:
        raise tarfile.ReadError(f"it holds nothing but zeros from byte {begin} on")


def _member(shard: Path, member: tarfile.TarInfo) -> Member:
    begin, size = member.offset_data, member.size

    def content() -> bytes:
        with shard.open("rb") as file:
            file.seek(begin)
            return file.read(size)

    return Member(shard, member.name, content)


def _captions(text: Member) -> list[str]:
    """Those of a text or a JSON object. Raises UserError where it is neither."""
    try:
        content = text.read().decode("utf-8-sig").strip()
        if beside.suffix_of(text.inside) != ".json":
            return [content] if content else []
        entry: Any = json.loads(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{text}: is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{text}: is not JSON ({error})") from error
    return captions_of(entry) if isinstance(entry, dict) else []
