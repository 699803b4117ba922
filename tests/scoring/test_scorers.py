"""Each scorer against what was published, with the same random weights; and scorers of one's own."""

import re
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from hgdpo_jax.diffusion.stable_diffusion import tokenize
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import folder_hash
from hgdpo_jax.models.model_config import ModelConfig
from hgdpo_jax.models.preprocessing import Preprocessing, clip_pixels
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.places import Place, absolute, places
from hgdpo_jax.scoring import preference
from hgdpo_jax.scoring.comparison import columns
from hgdpo_jax.scoring.image_reward import reader
from hgdpo_jax.scoring.preference import CLIP_TOKENIZER
from hgdpo_jax.scoring.quality import ANTONYMS, antonym_ids
from hgdpo_jax.scoring.scorers import KINDS, listed, not_given, open_scorer, open_scorers, scorers_hash
from tests import tiny
from tests.models.parity import randomise
from tests.models.test_preprocessing import random_image
from tests.rounding import NETWORK, assert_close
from tests.scoring import published

DOCS = Path(__file__).parents[2] / "docs" / "scorers.md"
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 16, "num_hidden_layers": 2}
TOWER |= {"hidden_act": "gelu"}
RNG = np.random.default_rng(0)
IDS = np.full((3, 77), 49407, np.int32)
IDS[:, 0], IDS[:, 1:5] = 49406, RNG.integers(0, 49000, (3, 4))


def images(height: int = 32, width: int = 32) -> np.ndarray:
    """Three pictures, uint8."""
    return RNG.integers(0, 256, (3, height, width, 3)).astype(np.uint8)


def signed(pictures: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(pictures / 127.5 - 1.0, jnp.float32)


@pytest.fixture(scope="module")
def clip() -> transformers.CLIPModel:
    text = TOWER | {"eos_token_id": 49407, "bos_token_id": 49406}
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return randomise(transformers.CLIPModel(config))


def cosines(clip: transformers.CLIPModel, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return clip(torch.tensor(IDS).long(), pixels).logits_per_image.diag() / clip.logit_scale.exp()


@pytest.fixture(scope="module")
def folder(clip: transformers.CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers writes it."""
    found = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(found)
    return found


def test_the_clip_score_is_a_hundred_times_transformers_cosine(clip: transformers.CLIPModel, folder: Path) -> None:
    pictures = images()
    expected = cosines(clip, published.pixels(pictures))
    found = open_scorer(Place("clip_score", str(folder)), tiny.mesh()).score(signed(pictures), IDS)
    assert_close(found, 100 * expected, NETWORK, size=100)
    assert found.dtype == jnp.float32 and expected.min() > 0


class Known(CLIPModel):
    """Towers whose embeddings are known."""

    def __init__(self) -> None:
        self.config = ModelConfig({"vision_config": {"image_size": 32}})

    def image_embeds(self, pixels: jnp.ndarray) -> jnp.ndarray:
        return jnp.asarray([[1.0, 0.0], [0.0, -2.0], [-1.0, 1.0]])

    def text_embeds(self, input_ids: jnp.ndarray) -> jnp.ndarray:
        return self.image_embeds(input_ids)[::-1]


def test_the_clip_score_of_a_caption_that_is_opposed_is_zero() -> None:
    assert_close(preference.clip_score(Known(), signed(images()), jnp.asarray(IDS)).score, [0.0, 100.0, 0.0], NETWORK)


def test_hps_is_the_cosine_of_open_clips_file_for_the_whole_picture_on_black(
    clip: transformers.CLIPModel, tmp_path: Path
) -> None:
    """Nothing is resized here: 32 is the long side."""
    file, pictures = tmp_path / "hps.safetensors", images(32, 21)
    save_file(published.open_clip_names(clip.state_dict()), file)
    padded = np.stack([published.on_black(picture, 32) for picture in pictures])
    found = open_scorer(Place("hps", str(file)), tiny.mesh()).score(signed(pictures), IDS)
    assert_close(found, cosines(clip, published.pixels(padded)), NETWORK, size=1)


@pytest.mark.parametrize("size", [(96, 64), (50, 70), (20, 12)])
def test_the_whole_picture_is_resized_as_hpsv2_does(size: tuple[int, int]) -> None:
    picture, how = random_image(*size), Preprocessing(whole=True)
    expected = published.pixels(published.on_black(picture, 32)[None]).permute(0, 2, 3, 1).numpy()
    found = np.asarray(clip_pixels(signed(picture[None]), 32, how))
    assert found.shape == expected.shape and np.abs(found - expected).max() < 0.02  # it rounds to 8 bits: 0.0075


def test_the_aesthetic_score_is_laions(clip: transformers.CLIPModel, folder: Path) -> None:
    widths = [8, 1024, 128, 64, 16, 1]
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    drop = nn.Dropout(0.2)
    theirs = nn.Sequential(layers[0], drop, layers[1], drop, layers[2], drop, layers[3], layers[4])
    randomise(theirs)
    head = {f"layers.{key}": value for key, value in theirs.state_dict().items()}
    save_file(head, folder / "aesthetic.safetensors")
    pictures = images()
    with torch.no_grad():
        embedding = clip.get_image_features(published.pixels(pictures)).pooler_output
        expected = theirs(embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]
    judged = open_scorer(Place("aesthetic", str(folder)), tiny.mesh()).judge(signed(pictures), IDS)
    assert_close(judged.score, expected, NETWORK)
    assert_close(judged.embedding, embedding, NETWORK)
    before = scorers_hash(f"aesthetic={folder}")
    save_file({key: value + 1 for key, value in head.items()}, folder / "aesthetic.safetensors")
    assert scorers_hash(f"aesthetic={folder}") != before
    (folder / "aesthetic.safetensors").unlink()
    with pytest.raises(UserError, match=r"aesthetic\.safetensors: no such file"):
        open_scorer(Place("aesthetic", str(folder)), tiny.mesh())


def test_clip_iqa_is_the_share_of_the_better_of_two_captions(tmp_path: Path) -> None:
    """Of pictures larger than 224 pixels a side, too: nothing is resized."""
    config = transformers.CLIPTextConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=1, num_hidden_layers=1, projection_dim=24,
        hidden_act="quick_gelu", eos_token_id=49407,
    )  # fmt: skip
    text = randomise(transformers.CLIPTextModelWithProjection(config))
    weights = published.random_resnet(4, (1, 2, 1, 1), 24)
    file, pictures = tmp_path / "rn50.safetensors", images(64, 96)
    beside = {"logit_scale": torch.tensor(4.6)}
    save_file(weights | published.open_clip_names(text.state_dict()) | beside, file)
    with torch.no_grad():
        expected = published.resnet(weights, published.pixels(pictures), heads=2)
        better, worse = text(torch.tensor(antonym_ids("natural")).long()).text_embeds
    judged = open_scorer(Place("clip_iqa_natural", str(file)), tiny.mesh()).judge(signed(pictures), IDS)
    assert_close(judged.embedding, expected, NETWORK)
    share = published.antonym_share(expected, better, worse)
    assert share.min() > 1e-3 and share.max() < 1 - 1e-3
    assert_close(judged.score, share, NETWORK, size=2 * 100 / 4)  # of two cosines times 100; a share grows by a fourth


def test_antonyms_are_tokens_of_clips_vocabulary() -> None:
    """Those of `good photo .`, as OpenAI's tokenizer gives them."""
    good, bad = (list(ids[:5]) for ids in antonym_ids("quality"))
    assert good == [49406, 886, 1125, 269, 49407] and bad == [49406, 2103, 1125, 269, 49407]
    assert list(ANTONYMS) == ["quality", "sharpness", "natural"]


def test_a_file_of_another_network_is_refused_by_name(tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    for name, weight in (("hps", "visual.class_embedding"), ("clip_iqa_quality", "visual.layer1.0.conv1.weight")):
        with pytest.raises(UserError, match=f"other.safetensors: weight {weight} is missing; expected CLIP"):
            open_scorers(f"{name}={other}", tiny.mesh())
    (tmp_path / "hps.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"hps\.pt: is a pickle; convert it"):
        open_scorers(f"hps={tmp_path / 'hps.pt'}", tiny.mesh())
    with pytest.raises(UserError, match="scorer hpsv3: unknown; choose one of pickscore, hps, "):
        listed(f"hpsv3={folder}")


def example() -> str:
    """The scorer of one's own in the docs."""
    (found,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return found


def test_a_scorer_of_ones_own_is_ten_lines(tmp_path: Path) -> None:
    file = tmp_path / "colourfulness.py"
    file.write_text(example())
    assert len(example().splitlines()) <= 10
    (own,) = open_scorers(str(file), tiny.mesh())
    pictures = images()
    red, green, blue = np.moveaxis(pictures.astype(np.float64), -1, 0)
    planes = red - green, 0.5 * (red + green) - blue
    spread, mean = (np.hypot(*(f(plane, axis=(1, 2)) for plane in planes)) for f in (np.std, np.mean))
    assert own.name == "colourfulness"
    assert_close(own.score(signed(pictures), IDS), spread + 0.3 * mean, NETWORK)
    file.write_text("def score(images, prompts): return images.mean()")
    (wrong,) = open_scorers(f"mine={file}", tiny.mesh())
    with pytest.raises(UserError, match=r"colourfulness\.py: gave numbers of shape \(\) for 3 pictures"):
        wrong.score(signed(pictures), IDS)
    for text, line in (("x = 1", "has no function score"), ("1 / 0", "ZeroDivisionError")):
        file.write_text(text)
        with pytest.raises(UserError, match=line):
            open_scorers(str(file), tiny.mesh())
    with pytest.raises(UserError, match="hps is the name of another; give yours its own"):
        listed(f"hps={file}")


def test_each_scorer_that_is_known_is_in_the_docs() -> None:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    expected = [
        f"| `{name}` | {kind.meaning} | {kind.weights} | {kind.licence} | {kind.form} | {kind.compared} |"
        for name, kind in KINDS.items()
    ]
    assert rows == expected


def test_settings_name_scorers_by_name_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b=c").mkdir()
    (tmp_path / "d").mkdir()
    assert places("") == [] and places("a, b=c") == [Place("", "a, b=c")]
    assert places("hps=x/y.safetensors, d") == [Place("hps", "x/y.safetensors"), Place("", "d")]
    assert [place.name for place in listed("d,brightness.py")] == ["pickscore", "brightness"]
    assert not_given("d", "", "hps=h.safetensors,d.py") == [name for name in KINDS if name not in ("pickscore", "hps")]
    assert absolute("hps=d,d") == f"hps={tmp_path / 'd'},{tmp_path / 'd'}" and absolute("d, e") == "d, e"
    for text, reason in (("d,d", "stands there twice"), ("sharpness=s.py", "have something else under this name")):
        with pytest.raises(UserError, match=reason):
            columns(text)


def test_the_same_network_under_another_name_is_another_scorer(folder: Path) -> None:
    alone = scorers_hash(str(folder))
    assert alone == folder_hash(folder) == scorers_hash(f"pickscore={folder}")
    assert len({alone, scorers_hash(f"clip_score={folder}"), scorers_hash(f"{folder},clip_score={folder}")}) == 3


def test_image_reward_rates_what_transformers_blip_makes_of_picture_and_caption(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "woman", "old", ",", "smiling", "man", "'", "s", "hat"]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "num_hidden_layers": 2}
    config = transformers.BlipConfig(
        vision_config=size | {"image_size": 32, "patch_size": 16, "layer_norm_eps": 1e-6},
        text_config=size | {"vocab_size": 16, "max_position_embeddings": 40, "encoder_hidden_size": 64},
    )
    blip = randomise(transformers.BlipForImageTextRetrieval(config))
    head = randomise(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise([64, 1024, 128, 64, 16, 1]))))
    numbers = dict(zip("01234", "02467", strict=True))
    rated = {f"mlp.layers.{numbers[key[0]]}{key[1:]}": value for key, value in head.state_dict().items()}
    beside = {"blip.vision_proj.weight": torch.zeros(2, 2)}
    save_file(published.blip_names(blip) | rated | beside, tmp_path / "ImageReward.safetensors")
    captions, pictures = ["An old Woman, smiling", "a man's hat", ""], images()
    ids = [[2, 1, 7, 6, 8, 9, 3], [2, 5, 10, 11, 12, 13, 3], [2, 3]]
    padded = torch.tensor([row + [0] * (35 - len(row)) for row in ids])
    with torch.no_grad():
        seen = blip.vision_model(published.pixels(pictures)).last_hidden_state
        state = blip.text_encoder(padded, attention_mask=padded != 0, encoder_hidden_states=seen).last_hidden_state
        expected = (head(state[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    prompts = tokenize(CLIPTokenizer.from_pretrained(CLIP_TOKENIZER), captions)
    assert np.array_equal(reader(tmp_path / "vocab.txt")(prompts), padded)
    found = open_scorer(Place("image_reward", str(tmp_path)), tiny.mesh()).score(signed(pictures), prompts)
    assert_close(found, expected, NETWORK)
    before = scorers_hash(f"image_reward={tmp_path}")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    assert scorers_hash(f"image_reward={tmp_path}") != before
