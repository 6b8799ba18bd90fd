"""FLOPs of a traced program, two for each multiplication of a product or convolution."""

import math


def flops(jaxpr):
    """The FLOPs of products and convolutions; a scan's body counts once for each iteration."""
    total = 0
    for equation in jaxpr.eqns:
        name, shape = equation.primitive.name, equation.outvars[0].aval.shape
        if name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in axes)
            total += 2 * math.prod(shape) * terms
        elif name == "conv_general_dilated":
            *kernel, out = equation.invars[1].aval.shape  # HWIO
            assert out == shape[-1]
            total += 2 * math.prod(shape) * math.prod(kernel)
        else:
            bodies = _bodies(equation)
            assert len(bodies) < 2, name
            total += equation.params.get("length", 1) * sum(flops(body) for body in bodies)
    return total


def _bodies(equation):
    """The programs that an operation runs."""
    if equation.primitive.name == "custom_vjp_call":
        return [equation.params["call_jaxpr"].jaxpr]
    inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
    return [body for body in inner if hasattr(body, "eqns")]
