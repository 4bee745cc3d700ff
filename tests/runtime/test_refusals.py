"""What a GPU cannot run is refused before it is tried, and the message says why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from densegeo.runtime.engines import runs_on


@pytest.mark.parametrize(
    ("library", "architectures", "able", "unable"),
    [
        ("tensorrt_rtx", [], (80, 86, 89, 120, 121), (75, 87, 90, 100, 110)),
        ("tensorrt_rtx", ["sm_75", "sm_89"], (75, 89), (80, 90, 120)),
        ("tensorrt", [], (80, 87, 90, 100), (75,)),
        ("tensorrt", ["sm_90"], (90,), (89, 100)),
    ],
)
def test_engines_are_for_what_their_library_names(
    library: str, architectures: list[str], able: tuple[int, ...], unable: tuple[int, ...]
) -> None:
    engine = SimpleNamespace(library=library, architectures=architectures)
    assert [number for number in (*able, *unable) if runs_on(engine, number)] == [*able]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("architecture", "precision", "base", "refused"),
    [
        (75, "bf16", "", "there is no bf16 before sm_80, so none for sm_75"),
        (75, "fp8", "", "there is no bf16 before sm_80"),
        (75, "fp8", "fp32", ""),  # multiplied in float32
        (75, "fp16", "", ""),
        (80, "bf16", "", ""),
    ],
)
def test_bf16_is_refused_at_build_for_torch_before_ampere(
    architecture: int, precision: str, base: str, refused: str
) -> None:
    pytest.importorskip("torch")
    from densegeo.errors import ConfigError
    from densegeo.export.choice import BuildRequest, choose
    from densegeo.export.machine import Gpu, Machine
    from densegeo.models.presets import preset

    card = Gpu("a GPU", architecture, 80 << 30)
    machine = Machine(gpu=card, libraries=frozenset({"torch"}), torch_cuda=True)
    asked = BuildRequest(backend="torch", precision=precision, base=base)
    if not refused:
        assert choose(asked, machine, preset("fe2e-tiny")).backend == "torch"
        return
    with pytest.raises(ConfigError, match=refused):
        choose(asked, machine, preset("fe2e-tiny"))
