"""What is said of photographs and captions before anything is drawn."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from PIL import Image

from hgdpo_jax.curriculum import summary
from hgdpo_jax.curriculum.plan import ShardPlan, made_from, plan_shards
from hgdpo_jax.data.photographs import Photograph, list_examples
from hgdpo_jax.diffusion.pipeline import Pipeline, of_shapes
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.provenance import require_same
from tests import tiny


@pytest.fixture(scope="module")
def pipeline(one_level: Path) -> Pipeline:
    return of_shapes(open_source(str(one_level)))


def config_of(base: Path, place: Path, resolutions: tuple[str, ...], **data: object) -> ConfigDict:
    config = tiny.config(base)
    config.data.update(photographs=str(place), resolutions=resolutions, **data)
    config.pairs.loser = "none"
    return config


def summarised(config: ConfigDict, pipeline: Pipeline) -> list[str]:
    index = Index()
    listed = list_examples(config, "train", "heldout", index=index)
    plan = plan_shards(config, Path(), dict(zip(("train", "heldout"), listed, strict=True)), None, index)
    return summary.summarise(config, plan, pipeline, index)


def test_photographs_their_shapes_and_captions_are_three_lines(
    one_level: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    """Half as high as wide, and the other way round; one is small, one almost square, one has two captions."""
    shapes = {"a": (64, 128), "b": (64, 128), "c": (64, 128), "d": (128, 64), "e": (60, 30), "f": (64, 72)}
    for name, (height, width) in shapes.items():
        Image.new("RGB", (width, height), "red").save(tmp_path / f"{name}.png")
    texts = {name: ["a woman"] for name in shapes} | {"b": ["a woman", "a woman who laughs"]}
    splits = {name: "heldout" if name == "c" else "train" for name in shapes}
    lines = [{"file": f"{n}.png", "caption": texts[n], "split": splits[n]} for n in shapes]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = config_of(one_level, tmp_path, ("64x128", "128x64"))
    assert summarised(config, pipeline) == [
        "6 photographs, captions from captions.jsonl; 5 train, 1 held out; 7 examples with further captions",
        "64x128 (height x width): 4, 128x64: 2; 2 enlarged, 1 cropped by more than 10%",
        "captions of 4 to 6 tokens (77 fit), such as 'a woman'",
    ]
    config.data.update(caption_prefix="sks person, ", mirror=True)
    counted, _, said = summarised(config, pipeline)
    assert counted.endswith("; 5 train, 1 held out; 14 examples with mirror images")
    own = pipeline.count_tokens(["sks person,"])[0] - 2  # without begin and end
    assert said == (f"captions of {4 + own} to {6 + own} tokens (77 fit), {own} of them of data.caption_prefix, such "
                    "as 'sks person, a woman'")  # fmt: skip


def test_of_many_captions_the_tokens_of_some_are_counted(
    one_level: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(summary, "_COUNTED", 4)
    config = config_of(one_level, Path(), ("32x32",))
    monkeypatch.setattr(summary, "form_of", lambda _: "nowhere")
    photographs = [Photograph(f"{i}.png", Path(f"{i}.png"), "a " * (i % 100)) for i in range(240)]
    for some in (photographs, photographs[75:78]):  # of the first every 60th
        plan = [ShardPlan(Path(), "train", "32x32", some)]
        said = summary.summarise(config, plan, pipeline, Index())[-1]
    assert said == f"captions of 77 to 79 tokens (77 fit), such as '{('a ' * 75)[:80]}…'"
    assert caplog.messages == [
        "1 of 4 captions (240 in all) have more than 77 tokens, the first of which are used; that of 180.png has 82",
        "2 of 3 captions (3 in all) have more than 77 tokens, the first of which are used; that of 77.png has 79",
    ]


def test_a_prefix_is_part_of_each_caption_and_of_what_pairs_are_made_from(one_level: Path, tmp_path: Path) -> None:
    folder = tiny.write_photographs(tmp_path / "photographs", train=2, heldout=1)
    given = [{"caption": "a man", "winner": f"{n}.png", "loser": "x.png"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, given)))
    for name in "0123x":
        Image.new("RGB", (32, 32), f"#00{ord(name):02x}00").save(tmp_path / f"{name}.png")
    config = config_of(one_level, folder, ("32x32",))
    plain = list_examples(config, "train", "heldout", index=Index())

    def inputs() -> dict[str, object]:
        found = list_examples(config, "train", "heldout", index=Index())
        return made_from(config, dict(zip(("train", "heldout"), found, strict=True)), None, Index())

    before = inputs()
    for prefix in ("sks person,", "sks person, "):  # with one blank between, as kohya's scripts put it
        config.data.caption_prefix = prefix
        found = list_examples(config, "train", "heldout", index=Index())
        assert [[p.caption for p in role] for role in found] == [
            [f"sks person, {p.caption}" for p in role] for role in plain
        ]
    with pytest.raises(UserError, match=r"config key data\.caption_prefix='sks person, ': pairs was made with ''"):
        require_same(before, inputs(), "pairs", "use that")
    config.pairs.update(winner="given", loser="given")
    config.data.pairs = str(tmp_path / "pairs.jsonl")
    assert {p.caption for role in list_examples(config, "train", "heldout", index=Index()) for p in role} == {
        "sks person, a man"
    }
