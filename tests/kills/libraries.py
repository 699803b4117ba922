"""What takes a command longest to import. A process that has it already is forked for each start."""

import sys

sys.modules.update(dict.fromkeys(("torch", "diffusers", "peft")))  # type: ignore[arg-type]  # users have none of them

import array_record.python.array_record_module  # noqa: E402, F401
import flax.nnx  # noqa: E402, F401
import grain  # noqa: E402, F401
import huggingface_hub  # noqa: E402, F401
import jax  # noqa: E402, F401
import ml_collections  # noqa: E402, F401
import optax  # noqa: E402, F401
import orbax.checkpoint  # noqa: E402, F401
import tensorboardX  # noqa: E402, F401
import tensorflow_datasets  # noqa: E402, F401
import tensorstore  # noqa: E402, F401
from transformers import CLIPTokenizer  # noqa: E402, F401
