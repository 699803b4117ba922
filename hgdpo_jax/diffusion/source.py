"""A checkpoint as people have it, opened but not read.

It is a folder as diffusers writes it, a single file in the original layout, or a repository of the Hugging Face hub at
a pinned revision. A file of FLUX.2's transformer lies in a folder that has the rest.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from hgdpo_jax.diffusion.family import Family, Tokenizers
from hgdpo_jax.diffusion.klein import KLEIN
from hgdpo_jax.diffusion.stable_diffusion import STABLE_DIFFUSION
from hgdpo_jax.models import ldm
from hgdpo_jax.models.architectures import Architecture, alone, recognise
from hgdpo_jax.models.convert import abstract, shapes
from hgdpo_jax.models.layouts import Layout
from hgdpo_jax.models.ldm import Translate
from hgdpo_jax.models.merged import LoRAFile
from hgdpo_jax.models.model_config import read_config, read_json
from hgdpo_jax.models.weights import Weights, chosen, open_folder, refuse_pickle, shards
from hgdpo_jax.run.errors import UserError

FAMILIES = {"StableDiffusion": STABLE_DIFFUSION, "Flux2Klein": KLEIN}  # by how the name of diffusers' pipeline begins
_HUB = re.compile(r"([\w.-]+/[\w.-]+)@(\w+)")
_TOP = ("model_index.json", "README.md")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, opened but not read.

    Attributes:
        name: what the user gave.
        configs: config.json of each model.
        open: part, keys of its model → its weights.
        files: all its safetensors files.
        family: which kind of checkpoint it is.
        tokenizers, scheduler, index, licence: see :class:`hgdpo_jax.diffusion.pipeline.Pipeline`.
        fit: part → what its weights must fit, for errors; its config.json where nothing is said.
        folder: where the folders of its models are; None of a single file with all of them.
        lora_alpha: of a merged LoRA, where it is in none of the files.
    """

    name: str
    configs: Mapping[str, Mapping[str, Any]]
    open: Callable[[str, Sequence[str]], Mapping[str, np.ndarray]]
    files: Sequence[Path]
    family: Family
    tokenizers: Tokenizers
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any]
    licence: str | None
    fit: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    lora_alpha: float | None = None

    def expected(self, part: str) -> str:
        """What the weights of a part must fit, for errors."""
        return self.fit.get(part, "its config.json")

    @property
    def layout(self) -> Layout:
        """How other programs know such a checkpoint."""
        return self.family.layout(self.configs, self.configs[self.family.denoiser])


def open_source(base: str, vae: str = "", lora: str = "") -> Source:
    """Opens a checkpoint.

    Args:
        base: a diffusers folder, a .safetensors file in the original layout, or `owner/name@revision` on the hub.
        vae: a folder or file whose VAE replaces that of the checkpoint; empty for none.
        lora: a file whose LoRA is merged into the checkpoint; empty for none.

    Raises:
        UserError: there is no such checkpoint, or it is a pickle, or a model that this package does not compute.
    """
    if not base:
        raise UserError("config key model.base: is empty; set it to a diffusers folder or a .safetensors checkpoint")
    path = Path(base)
    refuse_pickle(path)
    if path.is_file():
        source = _single_file(path, with_vae=not vae)
    elif path.is_dir():
        source = _folder(path)
    elif repository := hub_repository(base):
        source = _folder(_download(*repository))
    else:
        raise UserError(
            f"model {base}: no such folder or file; from the hub write owner/name@revision, with the revision's hash"
        )
    source = _with_vae(source, Path(vae)) if vae else source
    source.family.check(source.name, source.configs, source.tokenizers)
    source.family.process(source.scheduler, f"model {source.name}: ")  # raises for one that is not computed
    return _with_lora(source, Path(lora)) if lora else source


def hub_repository(base: str) -> tuple[str, str] | None:
    """(owner/name, revision) of a checkpoint that is on the hub; None of one that is a folder or a file here."""
    match = None if Path(base).exists() else _HUB.fullmatch(base)
    return (match[1], match[2]) if match else None


def _folder(folder: Path, given: Mapping[str, Weights] | None = None) -> Source:
    """A diffusers folder; weights of a part that are given take the place of its own."""
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise UserError(f"model {folder}: has no model_index.json; give a folder as diffusers writes it")
    index = read_json(index_path)
    family = _family(index)
    for part in (*family.models, *family.tokenizers, "scheduler"):
        if _class_of(index, part) and not (folder / part).is_dir():
            raise UserError(f"model {folder}: has no folder {part}; its model_index.json names one")
    parts = [part for part in family.models if _class_of(index, part)]
    for part in family.needed:
        if part not in parts:
            raise UserError(f"model {folder}: {index.get('_class_name')} has no {part}; expected {family.title}")
    given = given or {}
    weights = {part: given[part] if part in given else open_folder(folder / part) for part in parts}
    return Source(
        name=str(folder),
        configs={part: read_config(folder / part) for part in parts},
        open=lambda part, keys: weights[part],
        files=[file for part in parts for file in weights[part].files],
        family=family,
        tokenizers={
            name: family.read_tokenizer(folder / name) for name in family.tokenizers if (folder / name).is_dir()
        },
        scheduler=_scheduler(folder, index),
        index=index,
        licence=_licence(folder / "README.md"),
        folder=folder,
    )


def _family(index: Mapping[str, Any]) -> Family:
    """The kind of checkpoint that model_index.json describes; Stable Diffusion where it names no other."""
    name = str(index.get("_class_name"))
    return next((family for start, family in FAMILIES.items() if name.startswith(start)), STABLE_DIFFUSION)


def _class_of(index: Mapping[str, Any], part: str) -> str | None:
    """The class that model_index.json names for a part, if it names one."""
    kind = index.get(part)
    return kind[1] if isinstance(kind, list) and len(kind) == 2 else None


def _scheduler(folder: Path, index: Mapping[str, Any]) -> Mapping[str, Any]:
    """scheduler_config.json, for the class that model_index.json names, as diffusers reads it."""
    config, name = read_json(folder / "scheduler" / "scheduler_config.json"), _class_of(index, "scheduler")
    return {**config, "_class_name": name} if name else config


def _licence(card: Path) -> str | None:
    """`license` in the front matter of a model card."""
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license: *(\S+)", front[1], re.MULTILINE) if front else None
    return found[1].strip("\"'") if found else None


def _single_file(path: Path, with_vae: bool) -> Source:
    weights = Weights(path)
    if found := alone(weights):
        return _in_folder(path, weights, *found)
    architecture = recognise(weights, str(path), with_vae)

    def part(name: str, keys: Sequence[str]) -> Mapping[str, np.ndarray]:
        prefix, translate = architecture.parts[name]
        return ldm.TranslatedWeights(weights, prefix, translate, keys, architecture.configs[name])

    return replace(
        without_weights(architecture),
        name=str(path),
        open=part,
        files=[path],
        licence=weights.metadata.get("modelspec.license"),
        fit=dict.fromkeys(architecture.configs, f"{architecture.name}, which it was taken for"),
    )


def _in_folder(path: Path, weights: Weights, name: str, place: tuple[str, Translate]) -> Source:
    """A file that holds the model `name` alone: the others, and its config.json, are in the folder around it."""
    folder, (prefix, translate) = path.parent, place
    if not (folder / "model_index.json").is_file():
        raise UserError(f"model {path}: holds a {name} alone; move it into the folder with the rest of its model, as "
                        "diffusers writes it, beside model_index.json")  # fmt: skip
    source = _folder(folder, {name: weights})
    if name not in source.configs:
        raise UserError(f"model {path}: holds a {name}, and {folder} is a {source.family.title}; move it into the "
                        "folder of its own model")  # fmt: skip

    def part(asked: str, keys: Sequence[str]) -> Mapping[str, np.ndarray]:
        if asked != name:
            return source.open(asked, keys)
        return ldm.TranslatedWeights(weights, prefix, translate, keys, source.configs[name])

    return replace(source, name=str(path), open=part, fit={name: str(folder / name / "config.json")})


def without_weights(architecture: Architecture) -> Source:
    """A checkpoint of an architecture, without its weights."""
    family = _family(architecture.index)
    return Source(
        name=architecture.name,
        configs=architecture.configs,
        open=lambda part, keys: {},
        files=[],
        family=family,
        tokenizers=family.usual_tokenizers(architecture.index),
        scheduler=architecture.scheduler,
        index=architecture.index,
        licence=None,
    )


def _download(repository: str, revision: str) -> Path:
    """Downloads the files of a repository that will be read, and no others: many hold each weight in several forms."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(f"model {repository}@{revision}: give the 40 characters of a commit; a branch can change")
    folders = {*(part for family in FAMILIES.values() for part in (*family.models, *family.tokenizers)), "scheduler"}
    small = [f"{folder}/*{kind}" for folder in sorted(folders) for kind in (".json", ".txt", ".jinja")]
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[*_TOP, *small]))
        try:
            about = HfApi().model_info(repository, revision=revision)  # asks once; `list_repo_files` goes on for 15 s
            names, weights = {file.rfilename for file in about.siblings or ()}, []
        except Exception as error:  # the network's errors have no class in common
            logging.warning("model %s@%s: the hub does not answer (%s); what was fetched before is used", repository,
                            revision, " ".join(str(error).split())[:200])  # fmt: skip
            return folder
        for part in _family(read_json(folder / "model_index.json")).models:
            name = chosen({path.removeprefix(f"{part}/") for path in names if path.startswith(f"{part}/")})
            files = [] if name is None else shards(folder / part / name) if name.endswith(".json") else [name]
            weights += [f"{part}/{file}" for file in files]
        snapshot_download(repository, revision=revision, allow_patterns=weights)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {repository}@{revision}: cannot be downloaded ({reason})") from error
    return folder


def _with_vae(source: Source, path: Path) -> Source:
    """The source with another VAE: a model folder, or a file in either layout, alone or in a whole checkpoint."""
    config, fit = source.configs["vae"], "its config.json"
    try:
        refuse_pickle(path)
        if path.is_dir():
            _require_vae(path, source.family.models["vae"].__name__)
            config, weights = read_config(path), open_folder(path)
        elif not source.layout.is_whole:
            raise UserError(f"{path}: is a file; of {source.family.title} give the VAE's folder, with its config.json")
        else:
            weights, instead = Weights(path), "give a folder with its config.json"
            fit = f"the VAE that --config.model.vae={path} replaces; {instead}"
    except UserError as error:  # which begins with the path
        raise UserError(f"config key model.vae={error}") from error
    conv_in = "encoder.conv_in.weight"  # in both layouts
    prefix = next((prefix for prefix in ("", ldm.VAE_PREFIX) if prefix + conv_in in weights), None)
    if prefix is None:
        raise UserError(f"config key model.vae={path}: is no VAE, it has no weight {conv_in}")

    def part(name: str, keys: Sequence[str]) -> Mapping[str, np.ndarray]:
        if name != "vae":
            return source.open(name, keys)
        if f"{prefix}{ldm.VAE_CONV}" in weights:
            return ldm.TranslatedWeights(weights, prefix, ldm.vae_part, keys, config)
        return weights

    return replace(
        source,
        configs={**source.configs, "vae": config},
        open=part,
        files=[*source.files, *weights.files],
        fit={**source.fit, "vae": fit},
    )


def _require_vae(folder: Path, wanted: str) -> None:
    """Raises UserError for a folder of anything but a VAE of the class `wanted`."""
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: is a whole checkpoint; give its VAE, {folder / 'vae'}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json; expected the folder of an {wanted}")
    config = read_config(folder)
    kind = config.get("_class_name", wanted)
    if kind != wanted or "block_out_channels" not in config:
        kind = (config.get("architectures") or [kind])[0] if kind == wanted else kind
        raise UserError(f"{folder}: is no VAE ({kind}); expected the folder of an {wanted}")


def _with_lora(source: Source, path: Path) -> Source:
    """The source with a LoRA merged into its denoiser and, where programs read one of them, text encoders."""
    known = source.layout.lora
    kinds, configs = source.family.models, {part: x for part, x in source.configs.items() if part in known}
    lora = LoRAFile(path, {part: (x, shapes(abstract(kinds[part], x))) for part, x in configs.items()})

    def part(name: str, keys: Sequence[str]) -> Mapping[str, np.ndarray]:
        weights = source.open(name, keys)
        return lora.into(name, weights) if name in known else weights

    return replace(source, open=part, files=[*source.files, *lora.weights.files], lora_alpha=lora.alpha)
