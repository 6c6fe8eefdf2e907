"""Speed of decoding, beside the memory that it must read and beside PyTorch.

A token costs at least the time to read every weight once, and the keys and values so far: bytes over
the bandwidth that a large product with one row reaches in the same run. Weights are random and of
full width, in few layers, so that all kinds fit in memory side by side. The peer on a CPU is
`transformers` GPT-NeoX of equal shape, its blocks in float32, in PyTorch's dynamic int8 or in its
packed int4; all take turns in one process, so that the ratios survive a noisy machine.
"""

import datetime
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.benchmarks.document import fill
from glmjax.config import GLMConfig, Quantization, replace
from glmjax.data.cache import write_whole
from glmjax.inference.generate import advance, begin
from glmjax.inference.prompts import prompt_row, special_tokens
from glmjax.inference.sampling import Sampling
from glmjax.model.params import Params, ParamSpec, count_params, decoding_arrangement
from glmjax.model.parts import Part, assemble, part_specs
from glmjax.presets import get_config

logger = logging.getLogger(__name__)

Kind = Literal["float32", "bfloat16", "int8", "int4"]

ROOT = Path(__file__).parents[2]
RESULTS, DOCUMENT = ROOT / "experiments/results", ROOT / "docs/inference.md"
BEGIN, END = "<!-- written by glmjax bench decode -->", "<!-- end of bench decode -->"


class Contender(NamedTuple):
    """A model that decodes. `run()` gives control back when it has fed the prompt and drawn a token,
    and when it has drawn the others."""

    name: str
    bytes_per_token: float
    """Weights, and keys and values at half the answer."""
    run: Callable[[], Iterator[None]]


def run(
    model: str = "chatglm-6b",
    layers: int = 4,
    rows: int = 1,
    prompt: int = 128,
    tokens: int = 16,
    rounds: int = 3,
    kinds: tuple[Kind, ...] = (),
    write: bool = False,
) -> dict[str, Any]:
    """Measures float32 (bfloat16 on accelerators), int8 and int4 weights or only `kinds`, and those of
    PyTorch where it is installed and this is a CPU. `write` keeps what was found in RESULTS, and of
    a CPU in DOCUMENT too.

    Returns:
        For each contender the medians over rounds of seconds to the first token and tokens per
        second (of all rows), bytes per token and their share of the bandwidth. `ratios` are medians
        of ratios within a round: of integers to floats, and of ours to PyTorch's.
    """
    config = replace(get_config(model), num_layers=layers)
    device, bandwidth = jax.devices()[0], memory_bandwidth()
    kinds = kinds or ("float32" if device.platform == "cpu" else "bfloat16", "int8", "int4")
    contenders = [glmjax_contender(config, kind, rows, prompt, tokens) for kind in kinds]
    if device.platform == "cpu" and all(map(importlib.util.find_spec, ("torch", "transformers"))):
        contenders += pytorch_contenders(config, kinds, rows, prompt, tokens)
    seconds = _take_turns(contenders, tokens, rounds)
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "device": device.device_kind,
        "cpus": os.cpu_count(), "model": f"{model}, {layers} layers",
        "parameters": count_params(config), "rows": rows, "prompt": prompt, "tokens": tokens,
        "bandwidth": bandwidth, "versions": _versions(), "contenders": {},
    }  # fmt: skip
    for contender in contenders:
        first, each = np.median(seconds[contender.name], axis=0)
        found["contenders"][contender.name] = {
            "first_token_seconds": float(first), "tokens_per_second": rows / float(each),
            "bytes_per_token": contender.bytes_per_token,
            "bandwidth_share": contender.bytes_per_token / float(each) / bandwidth,
        }  # fmt: skip
    found["ratios"] = {
        f"{faster} to {slower}": _ratio(seconds[slower], seconds[faster])
        for faster, slower in [
            *((f"glmjax {kind}", f"glmjax {kinds[0]}") for kind in kinds[1:]),
            *((f"glmjax {kind}", f"pytorch {kind}") for kind in kinds),
        ]
        if slower in seconds
    }
    if write:
        file = RESULTS / f"decode_{device.platform}.json"
        write_whole(file, (json.dumps(found, indent=1) + "\n").encode())
    if write and device.platform == "cpu":
        fill(DOCUMENT, BEGIN, END, f"\n\n{table(found)}\n\n")
    return found


def show(results: Mapping[str, Any]) -> None:
    """Prints what `run` measured."""
    print(
        f"{results['model']}, {results['parameters']:,} parameters, {results['rows']} rows of "
        f"{results['prompt']} + {results['tokens']} tokens on {results['device']}, which reads "
        f"{results['bandwidth'] / 1e9:.1f} GB/s\n"
    )
    print(table(results))
    if not any(name.startswith("pytorch") for name in results["contenders"]):
        print('\nwithout PyTorch beside it: pip install "glmjax[peers]" on a CPU to compare')


def table(results: Mapping[str, Any]) -> str:
    """Markdown tables of the rates and of the ratios."""
    lines = [
        "| weights of the blocks | tokens/s | first token, s | GB read for a token | of the bandwidth |",
        "|" + " --- |" * 5,
    ]
    for name, found in results["contenders"].items():
        lines.append(
            f"| {name} | {found['tokens_per_second']:.2f} | {found['first_token_seconds']:.2f} | "
            f"{found['bytes_per_token'] / 1e9:.2f} | {found['bandwidth_share']:.0%} |"
        )
    lines += ["", "| tokens/s of | ratio |", "| --- | --- |"]
    lines += [f"| {pair} | {ratio:.2f} |" for pair, ratio in results["ratios"].items()]
    return "\n".join(lines)


def memory_bandwidth(nbytes: int = 2 * 10**9, times: int = 5) -> float:
    """Bytes a second that a product of one float32 row with a large matrix reads: the best of some."""
    columns = 8192
    matrix = jnp.zeros((nbytes // 4 // columns, columns))
    row = jnp.zeros((1, columns))
    product = jax.jit(lambda row, matrix: jnp.einsum("bk,nk->bn", row, matrix))
    seconds = [_time(lambda: product(row, matrix).block_until_ready()) for _ in range(times + 1)]
    return matrix.nbytes / min(seconds[1:])


def random_model(config: GLMConfig, kind: Kind) -> tuple[GLMConfig, Params]:
    """A model of random weights laid out for decoding here; where the blocks are integers the other
    weights are as `glmjax.load` gives them: as published, in float16, with the table of words in
    float32, or on accelerators all in bfloat16."""
    on_cpu = jax.devices()[0].platform == "cpu"
    activations, floats = ("float32", "float16") if on_cpu else ("bfloat16", "bfloat16")
    if kind in ("int8", "int4"):
        config = replace(config, quantization=Quantization(8 if kind == "int8" else 4))
    else:
        floats = kind
    config = replace(config, dtype=activations)
    random = np.random.default_rng(0)

    def part(spec: ParamSpec) -> Part:
        is_table = spec.axes[0] == "vocab" and spec.dtype == "float32"
        dtype = np.dtype(floats if spec.dtype == "float32" else spec.dtype)
        if on_cpu and is_table:
            dtype = np.dtype(np.float32)

        def read() -> np.ndarray:
            if dtype == np.int8:
                return np.frombuffer(random.bytes(math.prod(spec.shape)), np.int8).reshape(
                    spec.shape
                )
            # As large as keeps products near the size of what comes in, or scales of such weights.
            size = 2e-4 if spec.dtype == "float16" else 0.02
            values = random.random(min(2**20, math.prod(spec.shape)), np.float32) - 0.5
            return np.resize(values * size, spec.shape).astype(dtype)

        return Part(spec.shape, dtype, read)

    parts = {key: part(spec) for key, spec in part_specs(config).items()}
    return config, assemble(config, parts, arrangement=decoding_arrangement())


def glmjax_contender(
    config: GLMConfig, kind: Kind, rows: int, prompt: int, tokens: int
) -> Contender:
    """A model of ours that draws greedily and never ends."""
    config, params = random_model(config, kind)
    special = special_tokens(config)
    words = np.setdiff1d(np.arange(config.vocab_size), [*special.masks, special.sop])
    ids = np.random.default_rng(1).choice(words, (rows, prompt - 2)).tolist()
    mask = special.mask if special.gmask is None else special.gmask
    prompts = [prompt_row(config, [*row, mask, special.sop], "prompt") for row in ids]
    greedy = Sampling(temperature=0.0, min_new_tokens=tokens)
    streams = [(row, 0) for row in range(rows)]

    def draw() -> Iterator[None]:
        decoding = begin(config, params, prompts, tokens, greedy, streams)
        for count in (1, tokens - 1):
            decoding = jax.block_until_ready(advance(config, params, decoding, count))
            yield

    weights = sum(leaf.size * _bits(leaf.dtype) / 8 for leaf in jax.tree.leaves(params))
    return Contender(f"glmjax {kind}", weights + _cache_bytes(config, rows, prompt, tokens), draw)


def pytorch_contenders(
    config: GLMConfig, kinds: Sequence[Kind], rows: int, prompt: int, tokens: int
) -> list[Contender]:
    """GPT-NeoX of equal shape in `transformers` with blocks of these kinds; embedding and output
    layer are one float32 matrix that all share."""
    import torch
    from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    shape = GPTNeoXConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        intermediate_size=config.ffn_size, hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=config.max_positions, use_parallel_residual=False,
        tie_word_embeddings=True,
    )  # fmt: skip
    embedding = torch.nn.Parameter(torch.empty(config.vocab_size, config.hidden_size).uniform_())
    ids = torch.randint(config.vocab_size, (rows, prompt))

    def make(kind: Kind) -> Any:
        with torch.device("meta"):
            model = GPTNeoXForCausalLM(shape)
        model.get_input_embeddings().weight = embedding
        model.get_output_embeddings().weight = embedding
        for module in (*model.gpt_neox.layers, model.gpt_neox.final_layer_norm):
            module.to_empty(device="cpu")
            for weight in module.parameters():
                torch.nn.init.uniform_(weight, -0.02, 0.02)
        model.gpt_neox.rotary_emb = GPTNeoXRotaryEmbedding(shape)
        if kind == "int8":
            model.gpt_neox.layers = torch.ao.quantization.quantize_dynamic(
                model.gpt_neox.layers, {torch.nn.Linear}, dtype=torch.qint8
            )
        if kind == "int4":
            for layer in model.gpt_neox.layers:
                for block in layer.children():
                    for name, child in list(block.named_children()):
                        if isinstance(child, torch.nn.Linear):
                            setattr(block, name, _packed_int4(child))
        return model.eval()

    def contender(kind: Kind) -> Contender:
        model = make(kind)

        @torch.inference_mode()
        def draw() -> Iterator[None]:
            cache, fed = DynamicCache(), ids
            for count in (1, tokens - 1):
                for _ in range(count):
                    out = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    fed = out.logits[:, -1:].argmax(-1)
                yield

        blocks = count_params(config) - math.prod(embedding.shape)
        bits = {"float32": 32, "int8": 8, "int4": 4}[kind]
        weights = blocks * bits / 8 + embedding.nbytes
        return Contender(
            f"pytorch {kind}", weights + _cache_bytes(config, rows, prompt, tokens), draw
        )

    return [contender(kind) for kind in kinds]


def _packed_int4(linear: Any, group: int = 128) -> Any:
    """A linear layer of PyTorch with random weights in its packed int4, which has a scale and a zero
    point for every group of inputs, and is fast for bfloat16 numbers alone."""
    import torch

    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    outputs, inputs = linear.weight.shape
    values = pack(torch.randint(0, 16, (outputs, inputs), dtype=torch.int32), 1)
    scale_zero = torch.full((inputs // group, outputs, 2), 1e-3, dtype=torch.bfloat16)

    class PackedInt4(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            rows = x.reshape(-1, inputs).to(torch.bfloat16)
            y = multiply(rows, values, group, scale_zero).to(x.dtype)
            return y.reshape(*x.shape[:-1], outputs) + linear.bias

    linear.weight = None
    return PackedInt4()


def _take_turns(
    contenders: Sequence[Contender], tokens: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds to the first token and of each later one, in every round, after one to warm up."""
    seconds: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    for number in range(rounds + 1):
        for contender in contenders:
            drawing = contender.run()
            first, rest = (_time(lambda: next(drawing)) for _ in range(2))  # noqa: B023
            logger.info("%s, round %d: %.3f s, then %.3f", contender.name, number, first, rest)
            if number:
                seconds[contender.name].append((first, rest / (tokens - 1)))
    return seconds


def _ratio(slower: Sequence[tuple[float, float]], faster: Sequence[tuple[float, float]]) -> float:
    """How many times as many tokens a second, the median over rounds."""
    return float(np.median([s[1] / f[1] for s, f in zip(slower, faster, strict=True)]))


def _cache_bytes(config: GLMConfig, rows: int, prompt: int, tokens: int) -> float:
    """Keys and values that a token of every row reads at half the answer."""
    width = 2 * config.num_layers * config.kv_heads * config.head_size
    dtype = config.cache_dtype or config.dtype
    return rows * (prompt + tokens / 2) * width * np.dtype(dtype).itemsize


def _bits(dtype: Any) -> int:
    return 4 if dtype == jnp.int4 else 8 * np.dtype(dtype).itemsize


def _versions() -> dict[str, str]:
    names = ("jax", "numpy", "torch", "transformers")
    return {name: version(name) for name in names if importlib.util.find_spec(name)}


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
