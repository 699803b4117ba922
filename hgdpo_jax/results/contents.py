"""What an export holds: names of its files, and what they are made of."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.recipe import Drawing
from hgdpo_jax.models.layouts import Layout
from hgdpo_jax.run.folder import blocks_of

PEFT_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya_lora.safetensors"
# The text encoders' LoRA, and for the recipe that of the stage before the hard one.
PEFT_TEXT_FILE, KOHYA_TEXT_FILE = "text_encoder_lora.safetensors", "kohya_text_encoder_lora.safetensors"
PEFT_NORMAL_FILE = "normal_lora.safetensors"
# The LoRA as the recipe draws with it in the up blocks, for programs that know one strength for all blocks.
KOHYA_RECIPE_FILE = "kohya_recipe_lora.safetensors"
CHECKPOINT_FILE = "checkpoint.safetensors"
ADAPTER_FILE = "ip_adapter.safetensors"
RECIPE, RECIPE_FILE = configuration.ASSETS / "diffusers_recipe.py", "hgdpo_recipe.py"
FOLDER = "a diffusers folder"
ABOUT_FILE = "hgdpo.json"


class Contents(NamedTuple):
    """What is exported.

    Attributes:
        pipeline: with float32 parameters of all stages in `configs`.
        stage: whose policy the models get.
        step: of that policy.
        configs, policies: of each stage that is written, `stage` last.
        formats: some of diffusers, peft, kohya, ldm.
        merge: how the stage's LoRA is merged into the models: as the `recipe` draws with it, or `whole`; None where
            none is merged.
    """

    pipeline: Pipeline
    stage: str
    step: int
    configs: Mapping[str, ConfigDict]
    policies: Mapping[str, Any]
    formats: Sequence[str]
    merge: str | None

    @property
    def config(self) -> ConfigDict:
        """Of the stage."""
        return self.configs[self.stage]

    @property
    def blocks(self) -> str:
        """The UNet's blocks in which the stage's LoRA draws; see :func:`hgdpo_jax.diffusion.recipe.as_drawn`."""
        return blocks_of(self.config, self.config.recipe.blocks) if self.config.train.params == "lora" else "all"

    @property
    def layout(self) -> Layout:
        """Of the pipeline."""
        return self.pipeline.layout

    @property
    def drawing(self) -> Drawing:
        """How diffusers draws with it."""
        return self.pipeline.drawing

    @property
    def weight(self) -> float:
        """Of the LoRA in the recipe."""
        return self.config.recipe.weight
