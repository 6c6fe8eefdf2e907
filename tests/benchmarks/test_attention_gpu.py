"""The GPU benchmark of attention measures what it says; here on the CPU, without times."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from glmjax.benchmarks import attention_gpu as bench
from glmjax.kernels.blank_attention import blockwise, reference

ON_CPU = {
    "reference": bench.jax_steps(reference.attend),
    "blockwise": bench.jax_steps(blockwise.attend),
}
SMALL = {"masks": ("prefix 700", "8 samples"), "lengths": (64,), "batch": 2, "heads": 3}


@pytest.fixture(scope="module")
def results():
    return bench.run(ON_CPU, **SMALL, head_size=16, rounds=2, calls=2)


def test_every_implementation_is_measured_on_every_mask(results):
    assert [(row["length"], row["mask"], row["implementation"]) for row in results["rows"]] == [
        (64, mask, name) for mask in SMALL["masks"] for name in ON_CPU
    ]
    assert set(results["environment"]) >= {"device", "platform", "jax", "jaxlib", "command"}
    for row in results["rows"]:
        case = bench.make_case(row["mask"], 2, 64, 3, 16)
        for passes in ("forward", "both"):
            seconds = row[passes]["milliseconds"] / 1e3
            done = row[passes]["tflops"] * 1e12 * seconds
            assert done == pytest.approx(bench.flops(case, passes == "both"))
    json.dumps(results)


def test_flops_count_visible_scores():
    causal = bench.make_case("prefix 0", 2, 64, 3, 16)
    assert bench.flops(causal, both=False) == 2 * 3 * 4 * 16 * (64 * 65 // 2)
    full = bench.make_case("prefix 2048", 2, 64, 3, 16)
    assert bench.flops(full, both=True) == 2 * 3 * 14 * 16 * 64 * 64
    # 8 samples of 8 tokens, of which the first 4 see 4 keys and the others 5, 6, 7, 8.
    packed = bench.make_case("8 samples", 1, 64, 1, 16)
    assert bench.flops(packed, both=False) == 4 * 16 * 8 * (4 * 4 + 5 + 6 + 7 + 8)
    assert packed.k_start[0, 8:24].tolist() == [8] * 8 + [16] * 8


def test_a_wrong_implementation_is_not_timed():
    def sees_itself_only(q, k, v, k_start, k_end):
        return v

    with pytest.raises(ValueError, match="output of wrong differs from the reference by "):
        bench.run({"wrong": bench.jax_steps(sees_itself_only)}, **SMALL, head_size=16)


def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and jax finds only cpu"):
        bench.run()


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("mask", SMALL["masks"])
def test_flex_attention_gets_the_same_mask(mask):
    """Forward only: PyTorch has no backward pass of FlexAttention on the CPU."""
    case = bench.make_case(mask, 2, 64, 3, 16)
    steps = bench.flex_attention_steps("cpu")(case)
    expected = bench.jax_steps(reference.attend, "float32")(case)
    (got,), (want,) = steps.numpy(steps.forward()), expected.numpy(expected.forward())
    assert np.abs(got - want).max() <= 8 * 2**-7 * max(1, np.abs(want).max())


def test_results_are_saved_and_shown(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- attention_gpu -->\nold\n<!-- end -->\nafter\n")
    bench.save(results, tmp_path)
    assert json.loads((tmp_path / "attention_gpu.json").read_text()) == results
    text = readme.read_text()
    assert text.startswith("before\n<!-- attention_gpu -->\n| length |")
    assert text.endswith("<!-- end -->\nafter\n") and "old" not in text
    assert "| 2048 | 8 samples | tokamax | not measured | not measured |" in text
    assert "| 64 | 8 samples | blockwise | " in text and f"- jax: {results['environment']['jax']}"
    bench.save(results, tmp_path)
    assert readme.read_text() == text

    bench.show(results)
    assert "TFLOP/s" in capsys.readouterr().out


def test_the_committed_table_is_that_of_the_committed_results():
    folder = Path(__file__).parents[2] / bench.RESULTS
    file = folder / "attention_gpu.json"
    results = json.loads(file.read_text()) if file.exists() else None
    assert bench.table(results) in (folder / "README.md").read_text()
