"""HG-DPO in JAX: preference training in which real photographs win against generated images."""

__version__ = "0.2.0"
