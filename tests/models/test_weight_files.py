"""Files of weights as people have them: in shards, wrapped by trainers, of another kind, damaged, with NaN in them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from densegeo.errors import CheckpointError
from densegeo.models.checkpoint import load_weights, read_lora
from densegeo.models.streaming import BlockFile
from densegeo.models.weight_file import opened, parts, plain_names, read_entries

State = dict[str, Tensor]


def network() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 5, 3), nn.LayerNorm(6))


@pytest.fixture(scope="module")
def state() -> State:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in network().state_dict().items()}


def sharded(folder: Path, state: State, shards: int = 3, name: str = "model.safetensors.index.json") -> Path:
    """The state in shards and their index, as save_pretrained writes them."""
    places = {key: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, key in enumerate(state)}
    for file in set(places.values()):
        save_file({key: state[key] for key, place in places.items() if place == file}, folder / file)
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder / name


def loads(path: Path, state: State) -> None:
    whole, streamed = network(), network()
    load_weights(whole, path)
    BlockFile(path).fill(streamed, "")
    for key, tensor in state.items():
        assert torch.equal(whole.state_dict()[key], tensor)
        assert torch.equal(streamed.state_dict()[key], tensor)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_shards_are_read_as_one(state: State, tmp_path: Path, name: str) -> None:
    index = sharded(tmp_path, state, name=name)
    loads(index, state)
    assert [path.name for path in parts(index)[1:]] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


def test_shards_that_do_not_belong_together(state: State, tmp_path: Path) -> None:
    index = sharded(tmp_path, state)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    save_file({"0.bias": state["0.bias"]}, shard)
    with pytest.raises(CheckpointError, match=r"index\.json names 1 tensors that their shards lack: 2\.weight\."):
        read_entries(index)
    save_file(state, shard)
    with pytest.raises(CheckpointError, match="both hold"):
        read_entries(index)
    shard.write_bytes(whole[:-10])
    with pytest.raises(
        CheckpointError, match=r"00002-of-00003\.safetensors is truncated: it has [\d,]+ bytes and should"
    ):
        read_entries(index)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors does not exist"):
        read_entries(index)
    index.write_text(json.dumps({"weight_map": {"0.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="must name files beside it"):
        read_entries(index)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"model.diffusion_model.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.model.{key}",
        lambda key: key.replace(".", "._fsdp_wrapped_module._orig_mod.", 1),
        lambda key: "module." + key.replace(".", "._checkpoint_wrapped_module.", 1),
    ],
)
def test_wrappers_are_left_out_of_names(wrap: Callable[[str], str], state: State, tmp_path: Path) -> None:
    save_file({wrap(key): tensor for key, tensor in state.items()}, tmp_path / "model.safetensors")
    loads(tmp_path / "model.safetensors", state)


def test_a_name_that_only_some_begin_with_stays() -> None:
    names, prefix = plain_names(["module.a", "b"])
    assert (names, prefix) == ({"module.a": "module.a", "b": "b"}, "")
    assert plain_names(["a._orig_mod.b", "a.b"])[0] == {"a._orig_mod.b": "a._orig_mod.b", "a.b": "a.b"}


def test_another_model_is_named_and_not_listed(state: State, tmp_path: Path) -> None:
    names = [f"model.diffusion_model.input_blocks.{n}.weight" for n in range(40)]
    names += [f"first_stage_model.encoder.{n}.weight" for n in range(30)]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "v2-1.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_weights(network(), tmp_path / "v2-1.safetensors")
    said = str(caught.value)
    assert "0 of the 6 tensors that are wanted" in said
    assert (
        "70 tensors: model.diffusion_model (40), first_stage_model (30). That is a whole pipeline in one file" in said
    )
    assert "input_blocks" not in said


def test_weights_of_fewer_bits_are_named(state: State, tmp_path: Path) -> None:
    save_file({key: tensor.to(torch.float8_e5m2) for key, tensor in state.items()}, tmp_path / "fp8.safetensors")
    with pytest.raises(CheckpointError, match="quantized already: take the file in full precision"):
        load_weights(network(), tmp_path / "fp8.safetensors")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 23802932552\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LFS, "is a Git LFS pointer .*: run `git lfs pull`"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file, weights quantized for .*: take the safetensors file"),
        (b"<!DOCTYPE html><html>", "is a web page .* with a token"),
        (b"/annex/objects/SHA256E-s12--ab", "git annex get"),
        (b"\x1f\x8b\x08\x00", "is a packed archive .*: unpack it"),
        (b"", r"is an empty file \(0 bytes\)"),
        (b"\x00" * 100, "another format"),
        (b"\x80\x02}q\x00.", "is a pickle file"),
    ],
)
def test_other_files_are_recognised(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_entries(path)


@pytest.mark.parametrize("length", [0x0280, 0x0580, 0x8B1F])
def test_a_header_whose_length_reads_like_another_file(length: int, tmp_path: Path) -> None:
    """The lengths' bytes are those that pickles and gzip archives begin with."""
    save_file({"a": torch.ones(2)}, tmp_path / "small.safetensors")
    data = (tmp_path / "small.safetensors").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    padded = length.to_bytes(8, "little") + header.ljust(length) + data[8 + len(header) :]
    (tmp_path / "padded.safetensors").write_bytes(padded)
    assert read_entries(tmp_path / "padded.safetensors").keys() == {"a"}


def test_a_renamed_pickle_and_a_broken_link(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "renamed.safetensors")
    with pytest.raises(CheckpointError, match=r"is a pickle file.*--convert-bin"):
        read_entries(tmp_path / "renamed.safetensors")
    with zipfile.ZipFile(tmp_path / "other.safetensors", "w") as archive:
        archive.writestr("model.safetensors", b"")
    with pytest.raises(CheckpointError, match="damaged or another format"):
        read_entries(tmp_path / "other.safetensors")
    (tmp_path / "link.safetensors").symlink_to("../../blobs/" + "a" * 64)
    with pytest.raises(CheckpointError, match=r"is a link to .* which is not there: a download was interrupted"):
        read_entries(tmp_path / "link.safetensors")


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (float("-inf"), "infinite")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_is_named_when_it_is_read(
    value: float, words: str, dtype: torch.dtype, state: State, tmp_path: Path
) -> None:
    damaged = {key: tensor.to(dtype, copy=True) for key, tensor in state.items()}
    damaged["1.weight"][4, 1, 2, 0] = value
    index = sharded(tmp_path, damaged)
    expected = (
        rf"model-0000\d-of-00003\.safetensors: 1\.weight holds 1 {words} of 90 values, the first at \[4, 1, 2, 0\]"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_weights(network(), index)
    with pytest.raises(CheckpointError, match=expected):
        BlockFile(index).fill(network(), "")


def test_large_numbers_are_no_infinity(tmp_path: Path) -> None:
    save_file({"a": torch.full((4,), 3e38)}, tmp_path / "large.safetensors")
    with opened(tmp_path / "large.safetensors") as file:
        assert torch.equal(file.finite("a"), torch.full((4,), 3e38))


def test_nan_in_a_lora_is_named(tmp_path: Path) -> None:
    lora = {"lora_unet_0.lora_down.weight": torch.zeros(2, 3), "lora_unet_0.lora_up.weight": torch.zeros(4, 2)}
    lora["lora_unet_0.alpha"] = torch.tensor(float("nan"))
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: lora_unet_0\.alpha holds 1 NaN of 1 values"):
        read_lora(tmp_path / "lora.safetensors", network())
