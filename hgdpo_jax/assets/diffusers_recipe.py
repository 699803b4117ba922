"""HG-DPO's inference recipe in diffusers, for the files beside this one. Needs PyTorch, diffusers and peft only.

    import torch
    from diffusers import DiffusionPipeline
    from hgdpo_recipe import draw, load

    pipeline = DiffusionPipeline.from_pretrained("THE_BASE_MODEL", dtype=torch.float32)
    load(pipeline, "THIS_FOLDER")
    draw(pipeline, "a portrait photograph of a woman").images[0].save("woman.png")

The recipe: DPM-Solver++ with 50 steps and guidance 5; the UNet's LoRA at the weight and in the blocks that hgdpo.json
says; the text encoder's LoRA at that weight while the timestep is at least 900.
"""

import json
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from peft.tuners.tuners_utils import BaseTunerLayer

TEXT_FROM = 900
_BLOCKS = ("all", "up", "up+normal")
_FILES = {
    "policy": "pytorch_lora_weights.safetensors",
    "normal": "normal_lora.safetensors",
    "text": "text_encoder_lora.safetensors",
}


def load(pipeline, folder, weight=None, blocks=None):
    """Gives a StableDiffusionPipeline or StableDiffusionXLPipeline of the base model the scheduler and the LoRA.

    Args:
        pipeline: of the base model.
        folder: of this file.
        weight: of all LoRA; that of hgdpo.json unless given.
        blocks: where the stage's LoRA acts. `up`: in the up blocks, the others being the base's; `up+normal`: the
            others keep the normal stage's; `all`: everywhere. Unless given, what hgdpo.json says.
    """
    about = json.loads((Path(folder) / "hgdpo.json").read_text())
    weight = about["weight"] if weight is None else weight
    blocks = about["blocks"] if blocks is None else blocks
    if blocks not in _BLOCKS:
        raise ValueError(f"blocks {blocks!r}: expects one of {', '.join(_BLOCKS)}")
    if blocks == "up+normal" and not (Path(folder) / _FILES["normal"]).is_file():
        raise ValueError(f"blocks {blocks!r}: {folder} has no {_FILES['normal']}; the stage did not start from normal")
    wanted = {"policy": {part: weight if part == "up" or blocks == "all" else 0.0 for part in ("down", "mid", "up")}}
    if blocks == "up+normal":
        wanted["normal"] = {"down": weight, "mid": weight, "up": 0.0}
    pipeline.hgdpo_unet, pipeline.hgdpo_text, pipeline.hgdpo_blocks = {}, {}, wanted
    for name, file in _FILES.items():
        if (name in wanted or name == "text") and (Path(folder) / file).is_file():
            pipeline.load_lora_weights(folder, weight_name=file, adapter_name=name)
            if name == "text":
                pipeline.hgdpo_text[name] = weight
            else:
                pipeline.hgdpo_unet[name] = 1.0
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def _weigh_blocks(pipeline):
    """Gives each layer of the UNet the weight of its part. diffusers knows parts of attention layers alone."""
    for path, layer in pipeline.unet.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for name, weights in pipeline.hgdpo_blocks.items():
                layer.set_scale(name, weights[path.split("_")[0]])


def _encode(pipeline, scales, prompt, images, guided, negative):
    """Embeddings under some adapters: what the pipeline is called with, and what its loop works on."""
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))
        _weigh_blocks(pipeline)
    found = pipeline.encode_prompt(
        prompt=prompt,
        device=pipeline._execution_device,
        num_images_per_prompt=images,
        do_classifier_free_guidance=guided,
        negative_prompt=negative,
    )
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    called = {name: value for name, value in zip(names, found, strict=False) if value is not None}
    inside = {"prompt_embeds": found[0:2]} | ({"add_text_embeds": found[2:4]} if len(found) == 4 else {})
    return called, {name: torch.cat([no, yes]) if guided else yes for name, (yes, no) in inside.items()}


def draw(
    pipeline,
    prompt,
    negative_prompt=None,
    num_images_per_prompt=1,
    num_inference_steps=50,
    guidance_scale=5.0,
    **arguments,
):
    """What the pipeline returns; further arguments are the pipeline's own."""
    rest = (prompt, num_images_per_prompt, guidance_scale > 1, negative_prompt)
    early, _ = _encode(pipeline, pipeline.hgdpo_unet | pipeline.hgdpo_text, *rest)
    late, inside = _encode(pipeline, pipeline.hgdpo_unet | dict.fromkeys(pipeline.hgdpo_text, 0.0), *rest)

    def switch(pipe, step, timestep, values):
        following = pipe.scheduler.timesteps[step + 1 :]
        return inside if len(following) and following[0] < TEXT_FROM else {}

    pipeline.scheduler.set_timesteps(num_inference_steps)
    return pipeline(
        **(early if pipeline.scheduler.timesteps[0] >= TEXT_FROM else late),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        callback_on_step_end=switch,
        callback_on_step_end_tensor_inputs=list(inside),
        **arguments,
    )
