"""What differs between kinds of checkpoints: their models, their tokens, and the process that they were trained for."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int

from hgdpo_jax.diffusion.process import Process
from hgdpo_jax.diffusion.recipe import Drawing
from hgdpo_jax.models.layouts import Layout
from hgdpo_jax.models.text import Conditioner

Tokenizers = Mapping[str, Any]  # transformers', by their folders
Configs = Mapping[str, Mapping[str, Any]]  # config.json of each model, by its folder


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        title: for people.
        denoiser: folder of the model that predicts; its weights have this name everywhere.
        models: folder → class. Not every checkpoint has all of them.
        needed: the folders that every one has.
        tokenizers: folders of tokenizers, likewise.
        positions: the most tokens of a caption that are read; a tokenizer may say fewer.
        read_tokenizer: one from its folder. Raises UserError.
        usual_tokenizers: those of a checkpoint without any, from its model_index.json: a single file, or a plan.
        tokenize: captions → int32 ids, padded and cut; what the conditioner reads.
        count: the number of tokens of each caption before it is cut.
        conditioner: (name of the checkpoint, models, tokenizers, model_index.json) → the text conditioner.
        process: (scheduler_config.json, how a line about it begins) → the process. Raises UserError.
        overflows: its numbers grow beyond float16's.
        trains: which values of `train.params` it can take.
        check: raises UserError where parts are not of one model, of the checkpoint's name, configs and tokenizers.
        layout: (folders of its models, config of its denoiser) → how other programs know such a checkpoint.
        drawing: model_index.json → how the recipe draws with it.
        told: (tokenizers, models) → arguments without which diffusers' pipeline would read captions otherwise.
    """

    title: str
    denoiser: str
    models: Mapping[str, type[nnx.Module]]
    needed: Sequence[str]
    tokenizers: Sequence[str]
    positions: int
    read_tokenizer: Callable[[Path], Any]
    usual_tokenizers: Callable[[Mapping[str, Any]], Tokenizers]
    tokenize: Callable[[Tokenizers, Sequence[str]], Int[np.ndarray, "b s"]]
    count: Callable[[Tokenizers, Sequence[str]], list[int]]
    conditioner: Callable[[str, Mapping[str, Any], Tokenizers, Mapping[str, Any]], Conditioner]
    process: Callable[[Mapping[str, Any], str], Process]
    overflows: bool
    trains: Sequence[str]
    check: Callable[[str, Configs, Tokenizers], None]
    layout: Callable[[Container[str], Mapping[str, Any]], Layout]
    drawing: Callable[[Mapping[str, Any]], Drawing]
    told: Callable[[Tokenizers, Mapping[str, Any]], dict[str, Any]]
