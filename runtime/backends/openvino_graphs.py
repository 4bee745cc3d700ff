"""What OpenVINO's CPU plugin must be given other than a bundle's graphs have it."""

from __future__ import annotations

from typing import Any

RECIPE = 2  # to be raised by whoever changes what is done here: models that were compiled before are compiled again


def widen_affines(openvino: Any, model: Any) -> int:
    """Computes each `x * scale + shift` of constants in float32 where it is bf16, in place; returns how many they are.

    openvino: the module. model: an openvino.Model, 8-bit over bf16.

    The plugin's 8-bit transformations take such a pair for a dequantization and rewrite its shift as a subtraction of a
    float32 constant, which a bf16 one does not fit: on CPUs with bf16 loading ends with "Arguments do not have the same
    element type", or what is loaded computes nonsense (openvino 2026.4.1; on others the plugin widens the whole graph
    before). In float32 they do what they mean to, convolutions and products take scale and shift into their own
    kernels, and what these write stays bf16. Numbers lose one rounding.
    """
    operators, widened = openvino.opset13, 0
    for add in model.get_ordered_ops():
        if add.get_type_name() != "Add" or add.get_output_element_type(0) != openvino.Type.bf16:
            continue
        scaled, shift = add.input_values()
        multiply = scaled.get_node()
        if multiply.get_type_name() != "Multiply":
            continue
        x, scale = multiply.input_values()
        if not (_is_constant(scale) and _is_constant(shift)):
            continue
        x, scale, shift = (operators.convert(value, "f32") for value in (x, scale, shift))
        affine = operators.convert(operators.add(operators.multiply(x, scale), shift), "bf16")
        affine.set_friendly_name(add.get_friendly_name())
        add.output(0).replace(affine.output(0))
        widened += 1
    model.validate_nodes_and_infer_types()
    return widened


def _is_constant(value: Any) -> bool:
    """Whether an operator's input is a constant, or what is computed from constants alone."""
    node = value.get_node()
    if node.get_type_name() == "Constant":
        return True
    inputs = node.input_values()[: 1 if node.get_type_name() == "ConvertLike" else None]  # its second tells the type
    return bool(inputs) and all(map(_is_constant, inputs))
