"""Floating-point operations, counted on a traced program without running it."""

import math
from typing import Any

import jax.extend

PRODUCTS = ("dot_general", "conv_general_dilated")
# Attention in cuDNN, which JAX cannot look into → how many products it is: the gradient computes the first again.
_CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def operations(jaxpr: Any, kinds: tuple[str, ...] = PRODUCTS, trips: int = 1) -> float:
    """Floating-point operations of all products and convolutions of a program, with those that a gradient computes
    again. XLA's own count takes the body of a loop once.

    What is computed twice from the same values counts once, since the compiler computes it once: a text encoder that
    reads the same captions again, and blocks that policy and reference share.

    Args:
        jaxpr: of a traced program.
        kinds: products, convolutions or both.
        trips: turns of loops whose number of turns is an argument of the program.
    """
    total = 0.0
    seen: dict[Any, list[Any]] = {}  # equation → its outputs
    same: dict[Any, Any] = {}  # output of a repeated equation → that of the first
    for equation in jaxpr.eqns:
        inputs = tuple(x if isinstance(x, jax.extend.core.Var) else str(x) for x in equation.invars)
        inputs = tuple(same.get(x, x) for x in inputs)
        # A function with a gradient of its own also has parameters that tell each call from the others.
        does = str(equation.params.get("call_jaxpr", equation.params))
        outputs = seen.setdefault((equation.primitive, inputs, does), equation.outvars)
        if outputs is not equation.outvars and not equation.effects:
            same |= zip(equation.outvars, outputs, strict=True)
            continue
        total += _operations(equation, kinds, trips)
    return total


def _operations(equation: Any, kinds: tuple[str, ...], trips: int) -> float:
    name, params = equation.primitive.name, equation.params
    out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    if name in PRODUCTS and name not in kinds:
        return 0.0
    if name == "dot_general":
        shape = equation.invars[0].aval.shape
        return 2.0 * out * math.prod(shape[i] for i in params["dimension_numbers"][0][0])
    if name == "conv_general_dilated":
        shape, outputs = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        return 2.0 * out * math.prod(shape) / shape[outputs] / math.prod(params["lhs_dilation"])
    if name in _CUDNN and "dot_general" in kinds:
        (b, n, heads, width), m = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
        return _CUDNN[name] * 2.0 * b * heads * n * m * width
    turns = {"scan": params.get("length"), "while": trips}.get(name, 1)
    if name == "pallas_call":
        turns = math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # whose shapes are those of one device
        turns = params["mesh"].size
    found = [operations(sub, kinds, trips) for sub in jax.extend.core.jaxprs_in_params(params)]
    return turns * (max(found) if name == "cond" else sum(found))
