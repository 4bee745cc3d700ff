"""The options of a build as they are typed: what a bundle stores, so that messages can say how to make it again."""

from __future__ import annotations

import msgspec

from densegeo.export.build_options import BuildOptions


def flags(options: BuildOptions) -> dict[str, list[str]]:
    """Flag -> its values, none for a switch; of `densegeo build`, without --output. Defaults are left out."""
    source, engines = options.source, options.engines
    values_of: dict[str, list[str]] = {"--model": [options.model]}
    named = msgspec.structs.asdict(source)
    values_of |= {f"--{name}": [value] for name, value in named.items() if isinstance(value, str)}
    values_of |= {
        "--size": [str(size) for size in options.sizes],
        "--precision": [options.precision],
        "--backend": [options.backend],
    }
    lists = {"--batch": options.batches, "--no-rewrite": options.without, "--gpu-arch": options.architectures}
    values_of |= {flag: [str(value) for value in values] for flag, values in lists.items() if values}
    if options.base and options.base != options.precision:
        values_of["--base"] = [options.base]
    if options.calibration is not None:
        values_of["--calibration"] = [str(options.calibration)]
    if options.with_engines:
        values_of |= {"--builder": [engines.library], "--weights": [engines.weights]}
        numbers = {"--workspace-mib": engines.workspace_mib, "--optimization-level": engines.optimization_level}
        values_of |= {flag: [str(value)] for flag, value in numbers.items() if value is not None}
    switches = {
        "--tune": options.form is not None,
        "--no-tune": options.tune is False,
        "--weight-streaming": options.with_engines and engines.weight_streaming,
        "--version-compatible": options.with_engines and engines.version_compatible,
        "--authors-sizes": options.any_size,
        "--convert-bin": source.convert_bin,
        "--any-digest": source.any_digest,
        "--no-lora": source.no_lora,
        "--allow-unexpected": options.allow_unexpected,
    }
    return values_of | {flag: [] for flag, on in switches.items() if on}
