"""The same steps and images with diffusers, peft and torch.compile, where PyTorch finds the GPU.

python -m benchmarks.gpu.torch_peer step PAIRS|images IMAGES [--small]
"""

import argparse
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from benchmarks.gpu.processes import end_with_parent, say, serve
from benchmarks.gpu.results import LEFT_OUT

_DTYPE = "bfloat16"
Runs = dict[str, Callable[[int], Any]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("step", "images"))
    parser.add_argument("count", type=int)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    end_with_parent()
    try:
        import diffusers
        import peft
        import torch
    except ImportError as error:
        return say(failed=f"{LEFT_OUT}{error}")
    if not given.small and not torch.cuda.is_available():
        return say(failed=f"{LEFT_OUT}torch {torch.__version__} finds no GPU")
    versions = {module.__name__: version(module.__name__) for module in (torch, diffusers, peft)}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    runs = (steps if given.what == "step" else images)(given.count, given.small)
    for run in runs.values():  # torch.compile works at the first
        run(1)
    say(modes=[*runs], versions=versions)
    serve(runs)


def steps(pairs: int, is_small: bool) -> Runs:
    """Steps of `benchmarks.step_peer`."""
    from benchmarks.gpu.programs import small
    from benchmarks.step_peer import theirs
    from hgdpo_jax.models.architectures import SD15

    device, architecture = ("cpu", small(SD15)) if is_small else ("cuda", SD15)
    size = "32x32" if is_small else "512x512"

    def run(compiled: bool) -> Callable[[int], Any]:
        step = theirs(size, pairs, device, _DTYPE, _backend(is_small) if compiled else None, architecture)
        return _repeated(step, is_small)

    return {"as it is": run(False), "compiled": run(True)}


def images(count: int, is_small: bool) -> Runs:
    """Images drawn and decoded with diffusers' pipeline; the VAE in float32, as ours is."""
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from benchmarks.gpu.programs import CAPTION, small
    from hgdpo_jax.config import ASSETS
    from hgdpo_jax.models.architectures import SD15

    configs = (small(SD15) if is_small else SD15).configs
    device, side, turns = ("cpu", 32, 2) if is_small else ("cuda", 512, 50)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(dict(configs["unet"])).to(torch.bfloat16)
        vae = AutoencoderKL.from_config(dict(configs["vae"]))
        text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])).to(torch.bfloat16)
    drawer = StableDiffusionPipeline(
        vae.to(memory_format=torch.channels_last),
        text,
        CLIPTokenizer.from_pretrained(ASSETS / "portraits" / "base" / "tokenizer"),
        unet.to(memory_format=torch.channels_last),
        DPMSolverMultistepScheduler.from_config(dict(SD15.scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    drawer.set_progress_bar_config(disable=True)
    plain, compiled = unet, torch.compile(unet, backend=_backend(is_small))
    decoders = {False: vae.decode, True: torch.compile(vae.decode, backend=_backend(is_small))}

    @torch.inference_mode()
    def draw(fast: bool) -> Any:
        drawer.unet = compiled if fast else plain
        latents = drawer(
            [CAPTION] * count,
            height=side,
            width=side,
            num_inference_steps=turns,
            guidance_scale=5.0,
            output_type="latent",
        ).images
        parts = (latents.float() / vae.config.scaling_factor).split(4)  # as many as ours decodes at once
        return torch.cat([decoders[fast](part).sample.mean((1, 2, 3)) for part in parts])

    return {
        "as it is": _repeated(lambda: draw(False), is_small),
        "compiled": _repeated(lambda: draw(True), is_small),
    }


def _backend(is_small: bool) -> str:
    return "aot_eager" if is_small else "inductor"


def _repeated(run: Callable[[], Any], is_small: bool) -> Callable[[int], None]:
    import torch

    def repeat(count: int) -> None:
        for _ in range(count):
            run()
        if not is_small:
            torch.cuda.synchronize()

    return repeat


if __name__ == "__main__":
    main()
