"""The options of a build as they are typed: what a bundle stores, so that messages can say how to make it again."""

from __future__ import annotations

import msgspec

from densegeo.export.options import BuildOptions


def flags(options: BuildOptions) -> dict[str, list[str]]:
    """Flag -> its values, none for a switch; of `densegeo build`, without --output. Defaults are left out."""
    given, engines = options.given, options.engines
    found: dict[str, list[str]] = {"--model": [options.model]}
    named = msgspec.structs.asdict(given)
    found |= {f"--{name}": [value] for name, value in named.items() if isinstance(value, str)}
    found |= {
        "--size": [str(size) for size in options.sizes],
        "--precision": [options.precision],
        "--backend": [options.backend],
    }
    lists = {"--batch": options.batches, "--no-rewrite": options.without, "--gpu-arch": options.architectures}
    found |= {flag: [str(value) for value in values] for flag, values in lists.items() if values}
    if options.base and options.base != options.precision:
        found["--base"] = [options.base]
    if options.calibration is not None:
        found["--calibration"] = [str(options.calibration)]
    if options.with_engines:
        found |= {"--builder": [engines.library], "--weights": [engines.weights]}
        numbers = {"--workspace-mib": engines.workspace_mib, "--optimization-level": engines.optimization_level}
        found |= {flag: [str(value)] for flag, value in numbers.items() if value is not None}
    switches = {
        "--weight-streaming": options.with_engines and engines.weight_streaming,
        "--version-compatible": options.with_engines and engines.version_compatible,
        "--authors-sizes": options.any_size,
        "--convert-bin": given.convert_bin,
        "--any-digest": given.any_digest,
        "--no-lora": given.no_lora,
        "--allow-unexpected": options.allow_unexpected,
    }
    return found | {flag: [] for flag, on in switches.items() if on}
