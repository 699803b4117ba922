"""HG-DPO in JAX: preference training in which real photographs win against generated images."""
