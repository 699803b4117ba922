"""Floating-point operations, counted on a traced program without running it."""

import math
from typing import Any

import jax.extend

PRODUCTS = ("dot_general", "conv_general_dilated")


def operations(jaxpr: Any, of: tuple[str, ...] = PRODUCTS, trips: int = 1) -> float:
    """Floating-point operations of all products and convolutions, recomputed ones included; the compiler's own count
    takes the body of a loop once.

    Args:
        jaxpr: of a traced program.
        of: which of the two.
        trips: of loops whose number of turns is an argument of the program.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general" and name in of:
            shape = equation.invars[0].aval.shape
            total += 2.0 * out * math.prod(shape[i] for i in params["dimension_numbers"][0][0])
        elif name == "conv_general_dilated" and name in of:
            shape, outputs = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * out * math.prod(shape) / shape[outputs] / math.prod(params["lhs_dilation"])
        inner = sum(operations(sub, of, trips) for sub in jax.extend.core.jaxprs_in_params(params))
        total += inner * (params["length"] if name == "scan" else trips if name == "while" else 1)
    return total
