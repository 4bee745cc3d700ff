"""The empty prompt's embedding: from whole files that fit each other, or not at all; known again by all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from densegeo.errors import CheckpointError
from densegeo.export.conversion import empty_prompt
from densegeo.export.sources import SourceOptions, resolve
from densegeo.models.families import FIFFDEPTH
from densegeo.models.prompt import load_prompt

transformers = pytest.importorskip("transformers")
State = dict[str, Tensor]
FEATURES = 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A diffusers directory's text encoder and tokenizer, and what they make of an empty text."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "tokenizer").mkdir()
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "b": 2, "b</w>": 3}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    config = transformers.CLIPTextConfig(
        vocab_size=4, hidden_size=FEATURES, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(11)
    encoder = transformers.CLIPTextModel(config).eval()
    encoder.save_pretrained(folder / "text_encoder")
    with torch.no_grad():
        return folder, encoder(torch.tensor([[0, 1]]))[0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "densegeo" / "prompt"


@pytest.fixture
def folder(whole: tuple[Path, Tensor], tmp_path: Path, cache: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole[0], tmp_path / "model")


def rewrite(folder: Path, change: Callable[[State], State]) -> Path:
    weights = folder / "text_encoder" / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    return weights


def plain(key: str) -> str:
    return key.removeprefix("text_model.")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state,
        lambda state: {f"text_model.{plain(key)}": tensor for key, tensor in state.items()},  # transformers 4
        lambda state: {plain(key): tensor for key, tensor in state.items()},  # transformers 5
        lambda state: {f"module.text_model.{plain(key)}": tensor for key, tensor in state.items()},
        lambda state: (
            {f"text_model.{plain(key)}": tensor for key, tensor in state.items()}
            | {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # Stable Diffusion 2's own
        ),
    ],
)
def test_what_is_whole_is_read(change: Callable[[State], State], whole: tuple[Path, Tensor], folder: Path) -> None:
    weights = rewrite(folder, change)
    actual = load_prompt(empty_prompt(folder, weights))
    torch.testing.assert_close(torch.from_numpy(actual.embeds)[None], whole[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: {k: v for k, v in state.items() if "layers.2.mlp" not in k},
            "4 missing: .*layers.2.mlp.fc1.bias",
        ),
        (lambda state: {f"wrapped.{k}": v for k, v in state.items()}, "0 of the .* tensors that are wanted"),
        (lambda state: state | {"text_projection.weight": torch.zeros(2)}, "1 unexpected: text_projection.weight"),
        (
            lambda state: {k: v[:3] if "final" in k else v for k, v in state.items()},
            r"2 wrong shape: .*\(3,\), expected",
        ),
        (lambda state: {k: v * float("nan") if "fc1" in k else v for k, v in state.items()}, "fc1.* holds .* NaN"),
    ],
)
def test_what_is_not_is_refused_and_nothing_kept(
    change: Callable[[State], State], said: str, folder: Path, cache: Path
) -> None:
    weights = rewrite(folder, change)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=said):
            empty_prompt(folder, weights)
    assert not cache.exists() or list(cache.iterdir()) == []


def _config(folder: Path, **changes: object) -> None:
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: _config(folder, hidden_act="gelu"),
        lambda folder: (folder / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": "!"}'),
        lambda folder: rewrite(folder, lambda state: {key: 2 * tensor for key, tensor in state.items()}),
    ],
)
def test_every_file_that_matters_is_known(change: Callable[[Path], object], folder: Path, cache: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    before = empty_prompt(folder, weights)
    assert empty_prompt(folder, weights) == before
    change(folder)
    assert empty_prompt(folder, weights) != before
    assert len(list(cache.iterdir())) == 2


def test_files_that_do_not_belong_together(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    vocabulary = {"<|startoftext|>": 6, "<|endoftext|>": 7, "b": 2, "b</w>": 3}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match="it is not this text encoder's"):
        empty_prompt(folder, weights)
    (folder / "tokenizer").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match="tokenizer is not there"):
        empty_prompt(folder, weights)
    _config(folder, num_hidden_layers=2)
    (folder / "elsewhere").rename(folder / "tokenizer")
    with pytest.raises(CheckpointError, match=r"16 unexpected: .*layers\.2"):
        empty_prompt(folder, weights)


def test_shards_and_variants_of_the_encoder(folder: Path, whole: tuple[Path, Tensor]) -> None:
    """`resolve` finds them as it finds networks; what is run is what was found."""
    for name in ("unet", "vae"):
        (folder / name).mkdir()
        save_file({"a": torch.zeros(1)}, folder / name / "diffusion_pytorch_model.safetensors")
        (folder / name / "config.json").write_text("{}")
    encoder = transformers.CLIPTextModel.from_pretrained(str(whole[0] / "text_encoder"))
    shutil.rmtree(folder / "text_encoder")
    encoder.save_pretrained(folder / "text_encoder", max_shard_size="10KB")
    assert len(list((folder / "text_encoder").glob("*-of-*"))) > 1
    encoder.half().save_pretrained(folder / "text_encoder", variant="fp16")
    files, origins = resolve(SourceOptions(checkpoint=str(folder)), FIFFDEPTH)
    torch.testing.assert_close(torch.from_numpy(load_prompt(files.prompt).embeds)[None], whole[1])
    assert origins["prompt"] == f"computed with {folder / 'text_encoder'}"
    for name in ("unet", "vae"):
        file = folder / name / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_suffix(".fp16.safetensors"))
    halves, _ = resolve(SourceOptions(checkpoint=str(folder), variant="fp16"), FIFFDEPTH)
    assert halves.prompt != files.prompt
    torch.testing.assert_close(
        torch.from_numpy(load_prompt(halves.prompt).embeds)[None], whole[1], atol=5e-3, rtol=1e-2
    )


def test_a_dry_run_writes_nothing(folder: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    made = empty_prompt(folder, folder / "text_encoder" / "model.safetensors", tmp_path / "scratch")
    assert made.parent == tmp_path / "scratch"
    assert not cache.parent.exists()
