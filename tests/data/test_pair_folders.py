"""Preference pairs in folders, laid out as other trainers' tools lay them out."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hgdpo_jax.data.photographs import Photograph, list_photographs
from hgdpo_jax.data.pixels import load_images, load_losers
from hgdpo_jax.run.errors import UserError
from tests.data.test_readers import CAPTIONS, colour, png

Place = Path | str
WON = {"1": ("a", "b"), "2": ("b", "c")}  # name of a pair → what it shows: the winner, and over whom it won


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def kohya(folder: Path) -> Place:
    """A subset with `preference = true` (sd-scripts' pull request 1427): captions may lie beside the losers too."""
    for name, (winner, loser) in WON.items():
        put(folder, {f"1_name/w/{name}.png": png(winner), f"1_name/w/{name}.caption": CAPTIONS[winner].encode(),
                     f"1_name/l/{name}.png": png(loser), f"1_name/l/{name}.caption": b"is not read"})  # fmt: skip
    return folder / "1_name"


def onetrainer(folder: Path) -> Place:
    """What OneTrainer's pair tool exports (pull request 1403): suffixes as they were, captions beside the chosen."""
    for name, (winner, loser) in WON.items():
        put(folder, {f"chosen/train/pair_{name}.png": png(winner), f"rejected/train/pair_{name}.webp": png(loser),
                     f"chosen/train/pair_{name}.txt": CAPTIONS[winner].encode()})  # fmt: skip
    put(folder, {"chosen/val/pair_3.png": png("c"), "chosen/val/pair_3.txt": b"x", "rejected/val/pair_3.png": png("a")})
    put(folder, {"manifest.json": json.dumps({"pairs": []}).encode(), "concepts.json": b"[]"})
    return folder


def labelled(folder: Path) -> Place:
    """One concept with labels, as OneTrainer's masks have them; the picture's own text is its prompt."""
    for name, (winner, loser) in WON.items():
        put(folder, {f"{name}.png": png(winner), f"{name}-rejectedlabel.jpg": png(loser),
                     f"{name}.txt": CAPTIONS[winner].encode(), f"{name}-masklabel.png": png("c")})  # fmt: skip
    return folder


def real_align(folder: Path) -> Place:
    """What RealAlign's construct_pairs writes, and beside it the list of prompts that it was given."""
    with (folder / "real_images_uid_prompt.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["uid", "prompt", "path"])
        rows.writerows([name, CAPTIONS[winner], f"images/{name}.jpg"] for name, (winner, _) in WON.items())
        rows.writerow(["999", "of a photograph that has no pair", "images/999.jpg"])
    for name, (winner, loser) in WON.items():
        put(folder, {f"real/{name}.png": png(winner), f"fake/{name}.png": png(loser), f"mask/{name}.png": png("c")})
    return folder


def two(folder: Path) -> Place:
    """Two folders of any names, at any places, with folders in them."""
    for name, (winner, loser) in WON.items():
        put(folder, {f"better/x/{name}.png": png(winner), f"old/worse/x/{name}.gif": png(loser),
                     f"better/x/{name}.txt": CAPTIONS[winner].encode()})  # fmt: skip
    return f"{folder}/better,{folder}/old/worse"


def shown(found: list[Photograph]) -> list[tuple[str, ...]]:
    """Caption, colour of the winner, colour of the loser: of each pair."""
    _, winners, losers = load_losers(*load_images(found, (8, 12)))
    names = {colour(name): name for name in "abc"}
    seen = [[names[tuple(np.round((x[0, 0] + 1) * 127.5).astype(int))] for x in side] for side in (winners, losers)]
    return list(zip((p.caption for p in found), *seen, strict=True))


@pytest.mark.parametrize("write", [kohya, onetrainer, labelled, real_align, two])
def test_each_layout_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, write: Callable[[Path], Place]) -> None:
    place = write(tmp_path)
    found = list_photographs(place, "train", heldout=0.0, given=True)
    assert shown(found) == [(CAPTIONS[winner], winner, loser) for winner, loser in WON.values()]
    assert len({p.id for p in found}) == 2
    lines = caplog.messages
    if write is onetrainer:
        assert shown(list_photographs(place, "heldout", given=True)) == [("x", "c", "a")]
    if write in (real_align, labelled):  # masks are read past, and that is said
        layout = "real/NAME nor fake/NAME" if write is real_align else "NAME nor NAME-rejectedlabel"
        first = "mask/1.png" if write is real_align else "1-masklabel.png"
        assert lines == [f"{tmp_path}: 2 images that are neither {layout} are left out, the first is {first}"]
    else:
        assert not lines


def test_pairs_that_are_not_whole_are_counted_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text, picture = b"a woman", png("a")
    put(tmp_path, {"w/1.png": picture, "w/1.txt": text, "l/1.jpg": picture})
    put(tmp_path, {"w/2.png": picture, "w/2.txt": text, "w/3.png": picture, "w/3.txt": text})  # no losers
    put(tmp_path, {"l/4.png": picture, "l/4.txt": text})  # no winner
    put(tmp_path, {"w/5.png": picture, "l/5.png": picture, "w/6.png": picture, "w/6.txt": b"\n", "l/6.png": picture})
    put(tmp_path, {"cover.png": picture, "w/7.dng": b"raw", "w/7.txt": text, "l/7.png": picture})
    with caplog.at_level(logging.WARNING):
        assert [p.id for p in list_photographs(tmp_path, "train", heldout=0.0, given=True)] == ["w/1.png"]
    for line in (
        "2 images whose loser l/NAME is missing are left out, the first is w/2.png",
        "2 images whose winner w/NAME is missing are left out, the first is l/4.png",
        "2 images without text beside them are left out, the first is w/5.png",
        "1 images that cannot be opened here (.dng: make JPEG or PNG of it) are left out, the first is w/7.dng",
        "1 images that are neither w/NAME nor l/NAME are left out, the first is cover.png",
    ):
        assert f"{tmp_path}: {line}" in caplog.messages
    (tmp_path / "w" / "1.txt").unlink()
    with pytest.raises(UserError, match="holds no whole pair with a caption"):
        list_photographs(tmp_path, "train", given=True)


def test_a_pair_whose_prompt_is_missing_in_the_list_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real_align(tmp_path)
    put(tmp_path, {"real/3.png": png("a"), "real/3.txt": b"is not looked at", "fake/3.png": png("b")})
    assert len(list_photographs(tmp_path, "train", heldout=0.0, given=True)) == 2
    line = "1 images without a prompt in the CSV file are left out, the first is real/3.png"
    assert f"{tmp_path}: {line}" in caplog.messages


def test_folders_of_several_subsets_are_read_at_once(tmp_path: Path) -> None:
    """kohya's folder of subsets; and the splits that folders name, on either side of w/ and l/."""
    for subset in ("1_people", "val"):
        put(tmp_path, {f"{subset}/w/1.png": png("a"), f"{subset}/w/1.txt": b"x", f"{subset}/l/1.png": png("b")})
    put(tmp_path, {"w/test/1.png": png("a"), "w/test/1.txt": b"x", "l/test/1.png": png("b")})
    found = list_photographs(tmp_path, "train", "heldout", given=True)
    assert {p.id: p.split for p in found} == {"1_people/w/1.png": "train", "val/w/1.png": "heldout",
                                              "w/test/1.png": "heldout"}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["w/1.png", "l/1.png", "real/1.png", "fake/1.png"],
         r"holds w/NAME with l/NAME and real/NAME with fake/NAME; which are the pairs\?"),
        (["w/1.png", "l/1.png", "data/train.parquet"], r"holds w/NAME with l/NAME and \.parquet; which"),
        (["w/1.png", "w/1.jpg", "w/1.txt", "l/1.png"], r"w/1.jpg and w/1.png have one name in their pair, 1; which"),
        (["w/1.png", "w/1.txt", "l/1.png", "l/1.jpg"], r"l/1.jpg and l/1.png have one name in their pair, 1; which"),
        (["x/w/1.png", "w/x/1.png", "l/x/1.png"], r"w/x/1.png and x/w/1.png have one name in their pair, x/1; which"),
        (["w/1.png", "w/1.txt"], "expects .jsonl, .* a folder with w/ and l/, .* or WINNERS,LOSERS"),
        (["better/1.png", "worse/1.png"], "expects .jsonl"),
    ],
)  # fmt: skip
def test_what_may_mean_two_things_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    put(tmp_path, dict.fromkeys(files, b"x"))
    with pytest.raises(UserError, match=message) as error:
        list_photographs(tmp_path, "train", given=True)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_lists_of_prompts_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    real_align(tmp_path)
    (tmp_path / "more.csv").write_text("uid,prompt\n1,a woman\n2,a man\n1,a child\n")
    with pytest.raises(UserError, match=r"more.csv and real_images_uid_prompt.csv both have prompts; take one of them"):
        list_photographs(tmp_path, "train", given=True)
    (tmp_path / "real_images_uid_prompt.csv").write_text("name,score\n1,2\n")  # of something else
    with pytest.raises(UserError, match=r"more.csv line 4: 1 has another prompt above; keep one of them"):
        list_photographs(tmp_path, "train", given=True)


def test_two_folders_are_two(tmp_path: Path) -> None:
    place = two(tmp_path)
    with pytest.raises(UserError, match="is one folder twice; give that of the winners and that of the losers"):
        list_photographs(f"{tmp_path}/better,{tmp_path}/better/.", "train", given=True)
    with pytest.raises(UserError, match="no such file or folder; set --config.data.pairs"):
        list_photographs(f"{place}x", "train", given=True)
    (tmp_path / "a,b").mkdir()
    put(tmp_path / "a,b", {"w/1.png": png("a"), "w/1.txt": b"x", "l/1.png": png("b")})
    assert len(list_photographs(tmp_path / "a,b", "train", heldout=0.0, given=True)) == 1
