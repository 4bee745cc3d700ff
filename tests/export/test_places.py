"""Where files are found: shards, variants, snapshots of the Hub's cache, revisions, folders in folders; and what is
said of everything else.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from densegeo.errors import CheckpointError, ConfigError
from densegeo.export.build_options import BuildOptions
from densegeo.export.command import dry_run_report
from densegeo.export.digests import inputs
from densegeo.export.sources import SourceOptions, resolve
from densegeo.models.families import FAMILIES
from tests.support.diffusers_checkpoint import CASES, modules, prompt

FE2E, FIFFDEPTH = FAMILIES["fe2e"], FAMILIES["fiffdepth"]
UNET, VAE = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def found(checkpoint: Path | str, family: str = "fiffdepth", **given: object) -> dict[str, str]:
    """Role -> the file's path below the checkpoint."""
    files, _ = resolve(SourceOptions(checkpoint=str(checkpoint), **given), FAMILIES[family])  # type: ignore[arg-type]
    return {role: path.relative_to(checkpoint).as_posix() for role, path in files.paths.items()}


def planned(checkpoint: Path | str, model: str = "fiffdepth", **given: object) -> str:
    """What a dry run says."""
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    size = (64, 48)
    options = BuildOptions(
        model=model,
        output=Path("never"),
        source=SourceOptions(checkpoint=str(checkpoint), **given),  # type: ignore[arg-type]
        sizes=(size,),  # type: ignore[arg-type]
    )
    dry_run_report(options.validated(), console)
    return console.export_text()


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A diffusers directory whose U-Net save_pretrained wrote in shards."""
    unet, vae = modules(CASES[0])
    unet.save_pretrained(tmp_path / "model" / "unet", max_shard_size="100KB")
    vae.save_pretrained(tmp_path / "model" / "vae")
    save_file({"empty_prompt": prompt(CASES[0])}, tmp_path / "model" / "empty_prompt.safetensors")
    assert len(list((tmp_path / "model" / "unet").glob("*-of-*"))) > 1
    return tmp_path / "model"


def test_shards_of_every_role_are_read_and_known(pipeline: Path) -> None:
    assert found(pipeline)["unet"] == f"{UNET}.safetensors.index.json"
    assert "The build can start." in planned(pipeline)
    files, origins = resolve(SourceOptions(checkpoint=str(pipeline)), FIFFDEPTH)
    known = {source.role: source for source in inputs(files, origins)}
    shards = sorted(path for path in (pipeline / "unet").glob("*-of-*.safetensors"))
    assert [known[f"unet {path.name}"].path for path in shards] == [str(path) for path in shards]
    assert sum(known[f"unet {path.name}"].bytes for path in shards) == sum(path.stat().st_size for path in shards)


def test_fe2e_in_shards(checkpoint: Path) -> None:
    """Transformer, autoencoder and LoRA, each in two shards."""
    tensors = load_file(checkpoint / "step1x-edit-i1258.safetensors")
    down = "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight"
    rows, columns = tensors["double_blocks.0.img_mod.lin.weight"].shape
    lora = {down: torch.ones(2, columns), down.replace("down", "up"): torch.ones(rows, 2)}
    save_file(lora, checkpoint / "LDRN.safetensors")
    for name in ("step1x-edit-i1258", "vae", "LDRN"):
        whole = load_file(checkpoint / f"{name}.safetensors")
        (checkpoint / f"{name}.safetensors").unlink()
        places = {key: f"{name}-0000{index % 2 + 1}-of-00002.safetensors" for index, key in enumerate(whole)}
        for shard in set(places.values()):
            save_file({key: whole[key] for key in whole if places[key] == shard}, checkpoint / shard)
        (checkpoint / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    files = found(checkpoint, "fe2e")
    assert [files[role] for role in ("dit", "vae", "lora")] == [
        f"{name}.safetensors.index.json" for name in ("step1x-edit-i1258", "vae", "LDRN")
    ]
    said = planned(checkpoint, "fe2e", config=str(checkpoint / "config.json"))
    assert "LoRA: 1 modules, ranks [2]" in said
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors is one of 2 shards: name .*index\.json"):
        resolve(
            SourceOptions(
                checkpoint=str(checkpoint), dit=str(checkpoint / "step1x-edit-i1258-00001-of-00002.safetensors")
            ),
            FE2E,
        )


def test_variants(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "unet")
    unet, vae = modules(CASES[0])
    unet.save_pretrained(pipeline / "unet", variant="fp16", max_shard_size="100KB")
    assert (pipeline / f"{UNET}.safetensors.index.fp16.json").is_file()
    assert found(pipeline)["unet"] == f"{UNET}.safetensors.index.fp16.json"  # there is no other
    assert found(pipeline)["vae"] == f"{VAE}.safetensors"
    assert "The build can start." in planned(pipeline)
    with pytest.raises(CheckpointError, match=r"vae: put vae/diffusion_pytorch_model\.fp16\.safetensors"):
        found(pipeline, variant="fp16")
    vae.save_pretrained(pipeline / "vae", variant="fp16")
    assert found(pipeline, variant="fp16")["vae"] == f"{VAE}.fp16.safetensors"
    assert found(pipeline)["vae"] == f"{VAE}.safetensors"
    for name in ("unet", "vae"):
        shutil.rmtree(pipeline / name)
    unet.save_pretrained(pipeline / "unet", variant="non_ema")
    vae.save_pretrained(pipeline / "vae")
    with pytest.raises(CheckpointError, match="weights of the variant non_ema: --variant non_ema takes them"):
        found(pipeline)
    with pytest.raises(ConfigError, match="--variant fp16 goes with --checkpoint"):
        resolve(SourceOptions(variant="fp16"), FIFFDEPTH)


def cached(pipeline: Path, folder: Path, *commits: str) -> Path:
    """The Hub's cache of a repository with these snapshots, the first of which has all files."""
    root = folder / "models--acme--depth"
    (root / "blobs").mkdir(parents=True)
    for commit in commits:
        (root / "snapshots" / commit).mkdir(parents=True)
    for path in pipeline.rglob("*"):
        if path.is_file():
            link = root / "snapshots" / commits[0] / path.relative_to(pipeline)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = root / "blobs" / re.sub(r"\W", "", str(path.relative_to(pipeline)))
            shutil.copy(path, blob)
            link.symlink_to(blob)
    return root


def test_the_hubs_cache_is_a_checkpoint(pipeline: Path, tmp_path: Path) -> None:
    root = cached(pipeline, tmp_path / "hub", "a" * 40, "b" * 40)
    with pytest.raises(CheckpointError, match="with 2 snapshots, and none is its main one: give one of them"):
        found(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    assert found(root)["unet"] == f"snapshots/{'a' * 40}/{UNET}.safetensors.index.json"
    assert found(root / "snapshots" / ("a" * 40))["vae"] == f"{VAE}.safetensors"
    with pytest.raises(CheckpointError, match="is the Hub's cache: name a repository in it, acme/depth"):
        found(tmp_path / "hub")
    next(path for path in (root / "blobs").iterdir() if "vae" in path.name and "tensors" in path.name).unlink()
    with pytest.raises(CheckpointError, match="is a link to what is not there: download it again"):
        found(root)


def test_without_a_network_what_was_downloaded_is_used(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = cached(pipeline, tmp_path / "hub", "a" * 40)
    (root / "refs").mkdir()
    (root / "refs" / "v2").write_text("a" * 40)
    given = SourceOptions(checkpoint="acme/depth@v2", offline=True)
    files, origins = resolve(given, FIFFDEPTH)
    assert files.paths["vae"].resolve().read_bytes() == (pipeline / f"{VAE}.safetensors").read_bytes()
    assert origins["vae"] == f"acme/depth@{'a' * 40}:{VAE}.safetensors"
    with pytest.raises(CheckpointError, match="acme/depth is not on this machine, and fetching is off"):
        resolve(SourceOptions(checkpoint="acme/depth", offline=True), FIFFDEPTH)  # of v2 alone


def test_folders_in_folders_are_named(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "download" / "v1").mkdir(parents=True)
    pipeline.rename(tmp_path / "download" / "v1" / "weights")
    with pytest.raises(
        CheckpointError, match=r"its folder v1/weights holds them: say --checkpoint .*/download/v1/weights"
    ):
        found(tmp_path / "download")


def test_what_lies_there_instead_is_said(pipeline: Path, checkpoint: Path, tmp_path: Path) -> None:
    (pipeline / "model_index.json").write_text('{"_class_name": "Step1XEditPipeline"}')
    with pytest.raises(CheckpointError) as caught:
        found(pipeline, "fe2e")
    said = str(caught.value)
    for words in (
        "dit: give --dit FILE",
        "stepfun-ai/Step1X-Edit",
        "AMAP-ML/FE2E",
        "unet/, vae/",
        "a Step1XEditPipeline",
    ):
        assert words in said
    assert "CLIP" not in said
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is empty"):
        found(tmp_path / "empty")
    (checkpoint / "step1x-edit-i1258.safetensors").rename(checkpoint / "mine.safetensors")
    with pytest.raises(
        CheckpointError, match=r"if mine\.safetensors is one of them under another name, say so with --dit"
    ):
        found(checkpoint, "fe2e", no_lora=True)
    with pytest.raises(CheckpointError, match="is a file: give the directory that holds all files"):
        found(checkpoint / "mine.safetensors", "fe2e")
    with pytest.raises(CheckpointError, match=r"is a directory: name the file in it.*\n.* mine\.safetensors"):
        resolve(SourceOptions(dit=str(checkpoint), checkpoint=str(checkpoint), no_lora=True), FE2E)


def test_pointers_are_recognised_in_every_role(pipeline: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    for name in (f"{VAE}.safetensors", "empty_prompt.safetensors", "unet/config.json"):
        before = (pipeline / name).read_bytes()
        (pipeline / name).write_bytes(pointer)
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} is a Git LFS pointer"):
            found(pipeline)
        (pipeline / name).write_bytes(before)


@pytest.mark.parametrize(
    "wrap", [lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": {"module": state}}]
)
@pytest.mark.parametrize("name", ["model.ckpt", "model.pth"])
def test_trainers_pickles(checkpoint: Path, no_cache: Path, wrap, name: str) -> None:
    """Read on request for any role, wherever the trainer keeps the weights; a dry run keeps nothing."""
    whole = load_file(checkpoint / "step1x-edit-i1258.safetensors")
    (checkpoint / "step1x-edit-i1258.safetensors").unlink()
    torch.save(wrap({f"module.{key}": tensor for key, tensor in whole.items()}), checkpoint / name)
    given = {"dit": str(checkpoint / name), "no_lora": True, "config": str(checkpoint / "config.json")}
    with pytest.raises(CheckpointError, match=rf"{name} is a pickle file.*--convert-bin"):
        found(checkpoint, "fe2e", **given)
    assert "The build can start." in planned(checkpoint, "fe2e", convert_bin=True, **given)
    assert not no_cache.exists()
    files, _ = resolve(SourceOptions(checkpoint=str(checkpoint), convert_bin=True, **given), FE2E)
    assert load_file(files.paths["dit"]).keys() == {f"module.{key}" for key in whole}


def test_sharded_pickles_are_named(pipeline: Path) -> None:
    (pipeline / f"{VAE}.safetensors").unlink()
    (pipeline / f"{VAE}.bin.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names shards that are pickle files"):
        found(pipeline)


def test_the_carried_model_takes_no_other_weights(tmp_path: Path) -> None:
    for given in (
        SourceOptions(checkpoint="elsewhere"),
        SourceOptions(vae="vae.safetensors"),
        SourceOptions(prompt="p.npz"),
    ):
        with pytest.raises(ConfigError, match=r"fe2e-tiny has weights that come with densegeo.*--model fe2e$"):
            BuildOptions(model="fe2e-tiny", output=tmp_path, source=given).validated()
