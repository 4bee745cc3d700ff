"""Checkpoints and LoRA from safetensors files: strict by default, every difference listed, nothing guessed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from densegeo.errors import CheckpointError
from densegeo.models.known_layouts import layout, quantized
from densegeo.models.weight_file import Entry, opened, read_entries
from densegeo.precision import FLOATS, PRECISIONS

FLOAT_DTYPES = {PRECISIONS[name].safetensors for name in FLOATS}
# A module's tensor, by name and shape -> its name and shape in a file; the elements are in the same order.
Stored = Callable[[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]


def as_is(key: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The file has the module's own names and shapes."""
    return key, shape


@dataclass
class KeyReport:
    """How a file's keys differ from what the architecture wants."""

    path: Path
    matched: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)  # "key: (2, 3), expected (3, 3)"
    wrong_dtype: list[str] = field(default_factory=list)
    hint: str = ""  # what the file seems to be, where it is another one

    @property
    def is_another(self) -> bool:
        """Whether so little fits that listing the rest would say nothing."""
        return len(self.missing) > 10 * self.matched

    def problems(self, *, allow_unexpected: bool) -> list[str]:
        """Lines that say what is wrong; empty when the file fits."""
        if self.is_another:
            expected = len(self.missing) + self.matched
            return [f"{self.matched} of the {expected} tensors that are wanted ({self.missing[0]} ...); {self.hint}"]
        groups = [("missing", self.missing), ("wrong shape", self.misshapen), ("wrong dtype", self.wrong_dtype)]
        if not allow_unexpected:
            groups.append(("unexpected", self.unexpected))
        lines = [f"{len(keys)} {trouble}: " + "; ".join(keys) for trouble, keys in groups if keys]
        return [*lines, self.hint] if lines and self.hint else lines


def compare_keys(path: Path, entries: dict[str, Entry], module: nn.Module, stored: Stored = as_is) -> KeyReport:
    """Compare a file's entries with the tensors `module` (on any device) wants."""
    expected_shapes = dict(stored(key, tuple(tensor.shape)) for key, tensor in module.state_dict().items())
    missing, unexpected = sorted(expected_shapes.keys() - entries), sorted(entries.keys() - expected_shapes)
    report = KeyReport(path, missing=missing, unexpected=unexpected)
    for key in sorted(expected_shapes.keys() & entries):
        entry = entries[key]
        report.matched += 1
        if entry.shape != expected_shapes[key]:
            report.misshapen.append(f"{key}: {entry.shape}, expected {expected_shapes[key]}")
        if entry.dtype not in FLOAT_DTYPES:
            report.wrong_dtype.append(f"{key}: {entry.dtype}, expected one of {', '.join(sorted(FLOAT_DTYPES))}")
    if quantized(entries, [entry.dtype for entry in entries.values()]):
        report.hint = (
            "these weights are quantized already: take the file in full precision (float32, bf16 or fp16) that they "
            "were made from; --precision fp8 or int8 makes 8-bit weights of it"
        )
    elif report.is_another:
        report.hint = layout(entries)
    return report


def load_weights(
    module: nn.Module,
    path: Path,
    *,
    lora: Path | None = None,
    allow_unexpected: bool = False,
    progress: Callable[[int], object] | None = None,
    stored: Stored = as_is,
    computed: tuple[str, ...] = (),
) -> None:
    """Fill `module` (made on the meta device) with a file's tensors in float32, LoRA merged.

    `progress` is called with each tensor's element count. computed: ends of names that the file may hold and nobody
    reads. Raises CheckpointError that lists every key in the way.
    """
    check_keys(module, path, allow_unexpected=allow_unexpected, stored=stored, computed=computed)
    updates = read_lora(lora, module) if lora else {}
    state: dict[str, Tensor] = {}
    with opened(path) as file:
        for key, parameter in module.state_dict().items():
            name, _ = stored(key, tuple(parameter.shape))
            tensor = file.finite(name).float().reshape(parameter.shape)
            if key in updates:
                tensor = updates[key].merge(tensor)
            state[key] = tensor
            if progress:
                progress(tensor.numel())
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)


def check_keys(
    module: nn.Module,
    path: Path,
    *,
    allow_unexpected: bool = False,
    stored: Stored = as_is,
    computed: tuple[str, ...] = (),
) -> None:
    """Raise CheckpointError that lists every key of a file in the way of filling `module`; see `load_weights`."""
    entries = {name: entry for name, entry in read_entries(path).items() if not name.endswith(computed)}
    report = compare_keys(path, entries, module, stored)
    if problems := report.problems(allow_unexpected=allow_unexpected):
        hint = ""
        if report.unexpected and not (report.missing or report.misshapen or report.wrong_dtype):
            hint = "\nIf the extra tensors are known to be harmless, pass --allow-unexpected."
        raise CheckpointError(f"{path} does not fit the model:\n  " + "\n  ".join(problems) + hint)


# The order of a LoRA. It is merged into float32 weights as they are read, before anything else happens to them:
# rewrites, then quantization, then the cast to the stored precision. Any other order gives other numbers, and no error:
# - Rewrites evaluate layers and keep their results as constants. FE2E's LoRA changes the modulation linears among
#   others, which `modulation` folds away: an update that came after it would have no layer left to land on.
# - up @ down is much smaller than W. bf16 keeps 8 bits, so that an update added to a weight of that type would mostly
#   be rounded away; added in float32 it moves the sum, which is rounded once.
# - The ranges of quantization are those of the merged weights: a plan that is calibrated without the LoRA fits another
#   network.
# The streamed path (`models.streaming`) reads tensor by tensor and merges each as it is read, which is the same order.
@dataclass(frozen=True)
class LoraUpdate:
    """One module's low-rank update; up (out, rank) and down (rank, in) as the file has them."""

    up: Tensor
    down: Tensor
    scale: float  # alpha / rank

    def merge(self, weight: Tensor) -> Tensor:
        """W + (alpha / rank) * up @ down, in float32."""
        return weight + self.scale * (self.up.float() @ self.down.float())


_LORA_KEY = re.compile(r"(lora_unet_.+)\.(lora_down\.weight|lora_up\.weight|alpha)")


def lora_ranks(path: Path) -> dict[str, int]:
    """LoRA module name -> rank, from the header."""
    return {
        match.group(1): entry.shape[0]
        for key, entry in read_entries(path).items()
        if (match := _LORA_KEY.fullmatch(key)) and match.group(2) == "lora_down.weight" and entry.shape
    }


def read_lora(path: Path, module: nn.Module) -> dict[str, LoraUpdate]:
    """Read a kohya-form LoRA for `module`: weight key -> update. An absent or zero alpha means alpha = rank.

    Raises CheckpointError when the file has keys of another form, modules that `module` lacks, a half of a pair
    only, or shapes that do not fit.
    """
    linears = {
        "lora_unet_" + name.replace(".", "_"): (f"{name}.weight", layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    tensors: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    with opened(path) as file:
        for key in file.keys():  # noqa: SIM118
            match = _LORA_KEY.fullmatch(key)
            if not match:
                problems.append(
                    f"{key}: no kohya LoRA key (lora_unet_<module>.lora_down.weight, .lora_up.weight, .alpha)"
                )
            elif match.group(1) not in linears:
                problems.append(f"{key}: the model has no such module")
            else:
                tensors.setdefault(match.group(1), {})[match.group(2)] = file.finite(key)
    updates: dict[str, LoraUpdate] = {}
    for name, parts in sorted(tensors.items()):
        weight_key, layer = linears[name]
        up, down = parts.get("lora_up.weight"), parts.get("lora_down.weight")
        if up is None or down is None:
            problems.append(f"{name}: lora_up or lora_down is missing")
            continue
        shapes = tuple(up.shape), tuple(down.shape)
        rank = down.shape[0]
        if shapes != ((layer.out_features, rank), (rank, layer.in_features)):
            problems.append(f"{name}: up {shapes[0]}, down {shapes[1]} do not fit a {tuple(layer.weight.shape)} weight")
            continue
        alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
        updates[weight_key] = LoraUpdate(up, down, (alpha or rank) / rank)
    if problems or not updates:
        problems = problems or ["it holds no LoRA tensors"]
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CheckpointError(f"the LoRA {path} is not for this model:\n  " + "\n  ".join(shown))
    return updates
