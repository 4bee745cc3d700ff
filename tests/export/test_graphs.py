"""Every rewrite's effect, read from the exported graphs: parameters, operations and nodes as predicted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from densegeo.export import onnx_graph
from densegeo.models.config import TransformerConfig
from densegeo.models.loading import Files, open_skeleton
from densegeo.models.prompt import load_prompt
from densegeo.models.vae import AttnBlock
from densegeo.runtime.bundle import Graph, read_manifest
from tests.support.checkpoints import SIZE


def graph(bundle: Path, stage: str) -> Graph:
    (bucket,) = read_manifest(bundle).buckets
    return getattr(bucket, stage)


def operators(bundle: Path, stage: str) -> Counter[str]:
    model = onnx.load(bundle / graph(bundle, stage).file, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


@pytest.fixture(scope="module")
def config(golden: Path) -> TransformerConfig:
    folder = golden / "fe2e_small"
    names = {"dit": "dit.safetensors", "vae": "vae.safetensors", "prompt": "no_info.npz", "config": "config.json"}
    files = Files.of("fe2e", **{role: folder / name for role, name in names.items()})
    actual: TransformerConfig = open_skeleton(files).denoiser.config
    return actual


@pytest.fixture(scope="module")
def tokens(golden: Path) -> tuple[int, int, int]:
    """(prompt tokens, text tokens after merging, image tokens of one half)."""
    prompt = load_prompt(golden / "fe2e_small" / "no_info.npz")
    return len(prompt.mask), len(prompt.merge_padding()[0]), (SIZE[0] // 16) * (SIZE[1] // 16)


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def change(golden_bundle, name: str, stage: str = "denoiser") -> tuple[int, int, Counter[str]]:
    """(parameters, operations, operator counts) that switching `name` off adds to a graph."""
    on, off = golden_bundle(), golden_bundle(without=(name,))
    counts = operators(off, stage)
    counts.subtract(operators(on, stage))
    before, after = graph(on, stage), graph(off, stage)
    return after.parameters - before.parameters, after.flops - before.flops, counts


def attention_flops(queries: int, keys: int, hidden: int) -> int:
    return 2 * 2 * queries * keys * hidden


def constants_off(config: TransformerConfig, text: int, half: int) -> tuple[int, int]:
    """What the first block regains without `constants`: text projection and norms, and the left half."""
    hidden, head = config.hidden_size, config.head_size
    parameters = linear(hidden, 3 * hidden) + 2 * head + 2 * hidden - 3 * hidden * (text + 1)
    flops = 2 * (text + half) * hidden * 3 * hidden + 2 * half * config.in_channels * hidden
    return parameters, flops


@pytest.mark.slow  # a bundle each, on which the numbers of the same rewrite are looked at
def test_guidance_doubles_the_work(golden_bundle, config, tokens):
    parameters, flops, counts = change(golden_bundle, "guidance")
    embedding = 2 * tokens[2] * config.in_channels * config.hidden_size  # the canvas is embedded once
    assert flops == graph(golden_bundle(), "denoiser").flops - embedding
    assert parameters == 1  # the guidance weight
    assert counts["Gemm"] == counts["MatMul"] == 0
    assert (counts["Sub"], counts["Split"]) == (1, 1)


@pytest.mark.slow  # a bundle each, on which the numbers of the same rewrite are looked at
def test_modulation_returns_with_its_embedders(golden_bundle, config, tokens):
    parameters, flops, counts = change(golden_bundle, "modulation")
    hidden, vec, (_, text, half) = config.hidden_size, config.vec_in_dim, tokens
    doubles, singles = config.depth, config.depth_single_blocks
    embedders = linear(256, hidden) + linear(vec, hidden) + 2 * linear(hidden, hidden)
    modulation = 2 * doubles * linear(hidden, 6 * hidden) + singles * linear(hidden, 3 * hidden)
    modulation += linear(hidden, 2 * hidden)
    affine = 2 * hidden * (4 * doubles + singles + 1)
    constants, constants_flops = constants_off(config, text, half)
    inputs = 256 + vec  # the timestep's sinusoid and the pooled prompt
    extra = 2  # the 1 of (1 + scale) and the canvas's 0, each stored once
    assert parameters == embedders + modulation - affine + constants + inputs + extra
    weights = embedders + modulation - 4 * hidden - 12 * hidden * doubles - 3 * hidden * singles - 2 * hidden
    assert flops == 2 * weights + constants_flops
    assert counts["Gemm"] == 4 + 2 * doubles + singles + 1 + 1  # the last: text's projection in the first block


@pytest.mark.slow  # a bundle each, on which the numbers of the same rewrite are looked at
def test_connector_returns(golden_bundle, config, tokens):
    parameters, flops, counts = change(golden_bundle, "connector")
    prompt, text, half = tokens
    wide, mlp, depth = config.connector_hidden, config.connector_mlp_hidden, config.connector_depth
    block = linear(wide, 3 * wide) + linear(wide, wide) + linear(wide, mlp) + linear(mlp, wide)
    per_block = block + linear(wide, 2 * wide)
    assert counts["Softmax"] == depth
    constants, constants_flops = constants_off(config, text, half)
    rows = 2 * prompt * (block - 3 * wide - wide - mlp - wide) * depth  # weights of linears run on all prompt tokens
    rows += depth * attention_flops(prompt, prompt, wide)
    rows += 2 * prompt * (config.prompt_dim * wide + config.context_in_dim * config.hidden_size)
    condition = 256 * wide + wide * wide + config.prompt_dim * wide + wide * wide + depth * 2 * wide * wide
    assert flops == rows + 2 * condition + constants_flops
    stored = per_block * depth + 4 * wide * depth  # with the affine norms
    stored += linear(config.prompt_dim, wide) + linear(256, wide) + linear(wide, wide)
    stored += linear(config.prompt_dim, wide) + linear(wide, wide) + linear(config.context_in_dim, config.hidden_size)
    saved = text * config.hidden_size  # the constant tokens
    inputs = 2 * prompt * config.prompt_dim  # the embedding, and its rows as the first linear takes them
    inputs += 3 * prompt + 256  # the mask, its two views, the timestep's sinusoid
    scalars = 4  # of the mask's arithmetic
    assert parameters == stored + constants - saved + inputs + scalars


@pytest.mark.slow  # a bundle each, on which the numbers of the same rewrite are looked at
def test_padding_tokens_return(golden_bundle, config, tokens):
    parameters, flops, counts = change(golden_bundle, "padding")
    prompt, text, half = tokens
    more, image, hidden, mlp = prompt - text, 2 * half, config.hidden_size, config.mlp_hidden
    linears = 2 * more * hidden * (4 * hidden + 2 * mlp)  # a text token through one block
    last = 2 * more * hidden * 2 * hidden  # trimmed: keys and values alone
    first = linears - 2 * more * hidden * 3 * hidden  # its projection is a constant
    blocks = config.depth + config.depth_single_blocks
    attention = (blocks - 1) * (
        attention_flops(prompt + image, prompt + image, hidden) - attention_flops(text + image, text + image, hidden)
    )
    attention += attention_flops(image, prompt + image, hidden) - attention_flops(image, text + image, hidden)
    assert flops == first + (blocks - 2) * linears + last + attention
    bias = text + image
    assert parameters == more * (4 * hidden + config.head_size) - bias
    assert counts["Add"] == -blocks  # no bias on the logits


@pytest.mark.slow  # a bundle each, on which the numbers of the same rewrite are looked at
def test_constants_are_projected_again(golden_bundle, config, tokens):
    parameters, flops, counts = change(golden_bundle, "constants")
    expected_parameters, expected_flops = constants_off(config, *tokens[1:])
    zeros = 1
    assert expected_parameters <= parameters <= expected_parameters + zeros
    assert flops == expected_flops
    assert counts["Gemm"] == 1


@pytest.mark.slow  # a bundle each, on which the numbers of the same rewrite are looked at
def test_trimming_spares_text_queries_and_mlp(golden_bundle, config, tokens):
    parameters, flops, counts = change(golden_bundle, "trim")
    _, text, half = tokens
    hidden, mlp, image = config.hidden_size, config.mlp_hidden, 2 * half
    linears = 2 * text * hidden * (hidden + mlp) + 2 * text * (hidden + mlp) * hidden
    assert flops == linears + attention_flops(text, text + image, hidden)
    assert parameters == 0
    assert counts["Gemm"] == -1


@pytest.mark.thorough
def test_decoder_runs_once_for_both_halves(golden_bundle):
    parameters, flops, counts = change(golden_bundle, "decoder", "decoder")
    on, off = (graph(golden_bundle(**options), "decoder") for options in ({}, {"without": ("decoder",)}))
    assert (on.inputs[0].shape[0], off.inputs[0].shape[0]) == (2, 1)
    assert flops == -on.flops // 2
    assert parameters == 0
    assert not any(counts.values())


@pytest.mark.thorough
def test_upsampling_convolves_small_images(golden_bundle, golden):
    parameters, flops, counts = change(golden_bundle, "upsample", "decoder")
    widths = {1: 32, 2: 32, 3: 32}  # channels of up.1, up.2, up.3 in the golden VAE
    predicted_flops = predicted_parameters = 0
    for level, channels in widths.items():
        big = 2 * (SIZE[0] // 2 ** (level - 1)) * (SIZE[1] // 2 ** (level - 1))  # pixels after upsampling, batch 2
        small = 2 * (SIZE[0] // 2**level + 1) * (SIZE[1] // 2**level + 1)
        predicted_flops += 2 * channels * channels * (9 * big - 16 * small)
        predicted_parameters += (9 - 16) * channels * channels + (1 - 4) * channels
    assert flops == predicted_flops > 0
    scales = 4 * len(widths)  # Resize's factors
    assert predicted_parameters <= parameters <= predicted_parameters + scales
    assert counts["Conv"] == 0


def test_wide_heads_attend_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder's attention, which no kernel fuses, holds the logits of a part of its queries at a time."""
    torch.manual_seed(0)
    block = AttnBlock(288, 32).eval()
    picture = torch.randn(1, 288, 6, 7)
    with torch.no_grad():
        expected = block(picture).numpy()
    for limit, parts in ((1 << 25, 1), (360, 5), (42, 42)):
        monkeypatch.setattr(onnx_graph, "CHUNK_LOGITS", limit)
        weights, path = tmp_path / f"{parts}.safetensors", tmp_path / f"{parts}.onnx"
        onnx_graph.write_weights(block, weights)
        onnx_graph.export_graph(block, picture, ("x", "y"), weights, path)
        actual = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
        assert actual["Softmax"] == parts
        (ours,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": picture.numpy()})
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(onnx_graph, "CHUNK_LOGITS", 1)
    assert onnx_graph.query_chunks(4096, 4096, 256) == 1  # a head that kernels fuse


class Layouts(nn.Module):
    """What moves, splits and joins tensors, as the networks do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(2, 3, 4, 6) -> (2, 24, 3)."""
        first, second = x.unflatten(-1, (2, 3)).chunk(2, dim=-2)
        joined = torch.stack((first.square(), second.double().float()), dim=2).flatten(1, 4)
        left, right = joined.transpose(1, 2).unflatten(1, (3, 1)).mean(2, keepdim=True).unbind(2)[0].split((6, 18), -1)
        return torch.cat((right, left), dim=-1).to(torch.float32).transpose(1, 2)


def test_a_graph_is_traced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.onnx would decompose gives the same graph without, and the module's numbers."""
    module, x = Layouts().eval(), torch.randn(2, 3, 4, 6)
    weights = tmp_path / "none.safetensors"
    onnx_graph.write_weights(module, weights)
    graphs = {}
    for name in ("once", "decomposed"):
        path, decomposed = tmp_path / f"{name}.onnx", []
        run = torch.export.ExportedProgram.run_decompositions
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.export.ExportedProgram,
                "run_decompositions",
                lambda self, table=None, run=run, seen=decomposed: seen.append(self) or run(self, table),
            )
            if name == "decomposed":
                patch.setattr(onnx_graph, "_is_translated", lambda target: False)
            onnx_graph.export_graph(module, x, ("x", "y"), weights, path)
        assert len(decomposed) == (name == "decomposed")
        graphs[name] = Counter(node.op_type for node in onnx.load(path).graph.node)
        (ours,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
        np.testing.assert_allclose(ours, module(x).numpy(), rtol=0, atol=1e-6)
    assert graphs["once"] == graphs["decomposed"]
