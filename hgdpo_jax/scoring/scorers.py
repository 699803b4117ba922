"""Scorers of single pictures: what there is, by name, and what each is made of.

A setting names one or several, `NAME=PLACE`, where PLACE is a file or folder of weights; a folder alone is that of
`pickscore`. A Python file with a function `score(images, prompts)` is a scorer of one's own, under any other name.
Nothing is downloaded. docs/scorers.md says where weights are published, and how they are converted.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from hgdpo_jax.devices.sharding import replicated
from hgdpo_jax.faces.quality import FaceQuality
from hgdpo_jax.models import open_clip
from hgdpo_jax.models.blip import read_blip
from hgdpo_jax.models.clip import CLIPModel, CLIPVisionModelWithProjection
from hgdpo_jax.models.convert import abstract, folder_hash, from_torch
from hgdpo_jax.models.ip_adapter import image_encoder_config
from hgdpo_jax.models.model_config import read_config
from hgdpo_jax.models.preprocessing import Preprocessing, read_preprocessing
from hgdpo_jax.models.rating import Rating
from hgdpo_jax.models.weights import Weights, open_folder, under
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import json_hash
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.places import Place, places
from hgdpo_jax.scoring import preference, quality
from hgdpo_jax.scoring.image_reward import image_reward, reader
from hgdpo_jax.scoring.preference import Images, Judgement, TokenIds

PICKSCORE = "pickscore"
_AESTHETIC = "aesthetic.safetensors"
_IMAGE_REWARD, _BERT = "ImageReward.safetensors", "vocab.txt"
_HEADS = 16  # of each tower of ViT-H/14


@dataclass(frozen=True)
class Scorer:
    """A named scorer of pictures. Higher is better; no picture's score depends on the others of its batch.

    Attributes:
        name: see :data:`KINDS`, or a name of the user's.
        judge: (images [b, H, W, 3] in [-1, 1], prompts) → scores, and embeddings where it has some.
    """

    name: str
    judge: Callable[[Images, TokenIds], Judgement]

    def score(self, images: Images, prompts: TokenIds) -> Float[Array | np.ndarray, "b"]:
        """float32 scores of images in [-1, 1]. Prompts are token ids of CLIP's vocabulary, as the pipeline's (first)
        tokenizer gives them; those after the first end of text do not count."""
        return self.judge(images, prompts).score


class Network(NamedTuple):
    """A network, still without numbers, those that fill it, the file or folder that they are in, and what they have to
    fit."""

    model: Any
    weights: Mapping[str, np.ndarray]
    place: str
    expected_by: str = "its config.json"


class Parts(NamedTuple):
    """What a scorer is made of.

    Attributes:
        networks: which compute.
        judge: (networks…, images, prompts) → :class:`Judgement`.
        compiled: whether that can be compiled.
        read: what prompts become before, where a network has a tokenizer of its own.
    """

    networks: tuple[Network, ...]
    judge: Callable[..., Judgement]
    compiled: bool = True
    read: Callable[[TokenIds], TokenIds] = lambda prompts: prompts


class Kind(NamedTuple):
    """A scorer that is known by name.

    Attributes:
        title: of its column; meaning: in a line.
        weights, licence, form: which weights, whose, and in which form they are read.
        compared: what it is tested against.
        parts: of the scorer at a place; reads headers of weights alone.
    """

    title: str
    meaning: str
    weights: str
    licence: str
    form: str
    compared: str
    parts: Callable[[Path], Parts]


def _clip(function: Callable[..., Judgement], folder: Path) -> Parts:
    """A function of a CLIPModel in a folder."""
    model = abstract(CLIPModel, read_config(folder))
    how = read_preprocessing(folder, model.config["vision_config"]["image_size"])
    return Parts((Network(model, open_folder(folder), str(folder)),), partial(function, how=how))


def _hps(file: Path) -> Parts:
    model, weights = open_clip.vit(Weights(file), _HEADS)
    network = Network(model, weights, str(file), "ViT-H/14")
    return Parts((network,), partial(preference.cosine, how=Preprocessing(whole=True)))


def _aesthetic(folder: Path) -> Parts:
    tower = abstract(CLIPVisionModelWithProjection, image_encoder_config(folder))
    how = read_preprocessing(folder, tower.config["image_size"])
    head = folder / _AESTHETIC
    predictor = abstract(Rating, {"width": tower.config["projection_dim"]})
    networks = (
        Network(tower, open_folder(folder), str(folder)),
        Network(predictor, Weights(head), str(head), "LAION's predictor v2"),
    )
    return Parts(networks, lambda tower, predictor, images, prompts: quality.aesthetics(tower, predictor, images, how))


def _clip_iqa(antonyms: str, file: Path) -> Parts:
    weights, ids = Weights(file), quality.antonym_ids(antonyms)
    towers = (open_clip.resnet(weights), open_clip.resnet_text(weights))
    networks = tuple(Network(model, numbers, str(file), "OpenAI's RN50") for model, numbers in towers)
    return Parts(networks, lambda tower, text, images, prompts: quality.clip_iqa(tower, text, images, ids))


def _image_reward(folder: Path) -> Parts:
    file = folder / _IMAGE_REWARD
    weights = Weights(file)
    blip, numbers = read_blip(weights, "blip.")
    head = Network(
        abstract(Rating, {"width": blip.config["text_width"]}), under(weights, "mlp."), str(file), "its head"
    )
    networks = (Network(blip, numbers, str(file), "ImageReward"), head)
    return Parts(networks, image_reward, read=reader(folder / _BERT))


def _face_quality(file: Path) -> Parts:
    quality_of = FaceQuality(str(file))
    return Parts((), lambda images, prompts: Judgement(quality_of(images)), compiled=False)


_CLIP_FORM = "folder of a CLIPModel (config.json, model.safetensors)"
_RESNET = "OpenAI's CLIP RN50: timm/resnet50_clip.openai, open_clip_model.safetensors"
_RESNET_COMPARED = "OpenAI's network and torchmetrics' formula, written anew in PyTorch"
KINDS: dict[str, Kind] = {
    PICKSCORE: Kind(
        "PickScore ↑",
        "exp(logit_scale) · cosine of picture and caption, of a network that learnt what people prefer",
        "yuvalkirstain/PickScore_v1",
        "MIT (code; the weights state none)",
        _CLIP_FORM,
        "transformers' CLIPModel and CLIPImageProcessor",
        partial(_clip, preference.judge),
    ),
    "hps": Kind(
        "HPS v2.1 ↑",
        "cosine of picture and caption, of a network that learnt what people prefer; the whole picture, on black",
        "xswu/HPSv2, HPS_v2.1_compressed.pt",
        "Apache-2.0",
        "that file, converted",
        "transformers' CLIPModel with the same weights, and HPSv2's transform",
        _hps,
    ),
    "image_reward": Kind(
        "ImageReward ↑",
        "reward by a network that read picture and caption together and learnt how people rank drawings; about 0 ± 1",
        "THUDM/ImageReward, ImageReward.pt; vocab.txt of google-bert/bert-base-uncased",
        "Apache-2.0 (code); Apache-2.0",
        f"folder with the converted {_IMAGE_REWARD} and {_BERT}",
        "transformers' BLIP with the same weights",
        _image_reward,
    ),
    "clip_score": Kind(
        "CLIP score ↑",
        "100 · cosine of picture and caption, at least 0: how well the picture shows what the caption says",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "MIT",
        _CLIP_FORM,
        "transformers' CLIPModel and CLIPImageProcessor",
        partial(_clip, preference.clip_score),
    ),
    "aesthetic": Kind(
        "aesthetic score ↑",
        "rating from about 1 to 10 by LAION's predictor v2, which learnt how people rate pictures without captions",
        "openai/clip-vit-large-patch14; sac+logos+ava1-l14-linearMSE.pth of improved-aesthetic-predictor",
        "MIT; Apache-2.0",
        f"{_CLIP_FORM}, and in it the converted second file as {_AESTHETIC}",
        "transformers' CLIPModel and the predictor in PyTorch",
        _aesthetic,
    ),
    **{
        f"clip_iqa_{name}": Kind(
            f"CLIP-IQA {name} ↑",
            f"how much nearer to “{better}” than to “{worse}” CLIP sees the picture, 0 to 1",
            _RESNET,
            "MIT",
            "that file",
            _RESNET_COMPARED,
            partial(_clip_iqa, name),
        )
        for name, (better, worse) in quality.ANTONYMS.items()
    },
    "face_quality": Kind(
        "face quality ↑",
        "how good the face is for recognition, about 0 to 1, by eDifFIQA(T); 0 where none is found",
        "opencv/opencv_zoo, ediffiqa_tiny_jun2024.onnx",
        "CC-BY-4.0",
        "that file",
        "an ONNX network whose formula is computed in NumPy, on faces aligned as for ArcFace",
        _face_quality,
    ),
}


def _own(file: Path) -> Parts:
    """A scorer of the user's, which is not compiled: it may compute as it likes.

    Raises:
        UserError: the file cannot be run, or has no function `score`; later, where that fails or returns anything but a
            number for each picture.
    """
    name = f"hgdpo_jax_scorer_{hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UserError(f"scorer {file}: no such file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"scorer {file}: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
    if not callable(getattr(module, "score", None)):
        raise UserError(f"scorer {file}: has no function score(images, prompts)")

    def judge(images: Images, prompts: TokenIds) -> Judgement:
        try:
            found = jnp.asarray(module.score(images, prompts), jnp.float32)
        except Exception as error:
            raise UserError(f"scorer {file}: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
        if found.shape != (len(images),):
            raise UserError(f"scorer {file}: gave numbers of shape {found.shape} for {len(images)} pictures; expected "
                            f"({len(images)},)")  # fmt: skip
        return Judgement(found)

    return Parts((), judge, compiled=False)


def listed(text: str) -> list[Place]:
    """The scorers that a setting names, each with its name.

    Raises:
        UserError: a name is unknown.
    """
    return [place._replace(name=_name(place)) for place in places(text)]


def not_given(*settings: str) -> list[str]:
    """The names of :data:`KINDS` that none of these settings gives a place to."""
    given = {place.name for text in settings for place in listed(text)}
    return [name for name in KINDS if name not in given]


def _name(place: Place) -> str:
    own = place.path.endswith(".py")
    name = place.name or (Path(place.path).stem if own else PICKSCORE)
    if own and name in KINDS:
        raise UserError(f"scorer {place}: {name} is the name of another; give yours its own")
    if not own and name not in KINDS:
        raise UserError(f"scorer {name}: unknown; choose one of {', '.join(KINDS)}, or give a Python file")
    return name


def parts(place: Place) -> Parts:
    """What a scorer is made of; of weights only headers are read.

    Raises:
        UserError: a file is missing or broken, or does not hold what the scorer is made of.
    """
    path = Path(place.path)
    return KINDS[place.name].parts(path) if place.name in KINDS else _own(path)


def open_scorer(place: Place, mesh: Mesh) -> Scorer:
    """A scorer with its networks on every device of a mesh. Raises UserError as :func:`parts` does."""
    networks, judge, compiled, read = parts(place)
    if not compiled:
        return Scorer(place.name, judge)
    for network in networks:
        from_torch(network.weights, network.model, network.place, expected_by=network.expected_by)
    graphs, states = zip(*(nnx.split(network.model) for network in networks), strict=True)

    @jax.jit
    def run(weights: Any, images: Images, prompts: TokenIds) -> Judgement:
        return judge(*map(nnx.merge, graphs, weights), images, prompts)

    weights = jax.device_put(states, replicated(mesh))
    return Scorer(place.name, lambda images, prompts: run(weights, images, read(prompts)))


def open_scorers(text: str, mesh: Mesh) -> list[Scorer]:
    """The scorers that a setting names. Raises UserError as :func:`listed` and :func:`parts` do."""
    return [open_scorer(place, mesh) for place in listed(text)]


def scorers_hash(text: str, index: Index | None = None) -> str:
    """sha256 over what the scorers of a setting compute with, wherever that lies.

    Raises:
        UserError: a file is missing or broken.
    """
    index = index or Index()
    found = [_hash(place, index) for place in listed(text)]
    return found[0] if len(found) == 1 else json_hash(found)


def _hash(place: Place, index: Index) -> str:
    path = Path(place.path)
    if place.name == PICKSCORE:
        return folder_hash(path, index)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if place.name == "image_reward":
        return json_hash([place.name, *(index.hash(path / name) for name in (_IMAGE_REWARD, _BERT))])
    content = [index.hash(path) if path.is_file() else folder_hash(path, index)]
    if place.name == "aesthetic":
        content += [index.hash(path / _AESTHETIC)]
    return json_hash([place.name, *content])
