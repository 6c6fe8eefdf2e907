"""The training benchmark measures what it says."""

import pytest

import glmjax
from glmjax.benchmarks import train as bench


@pytest.mark.slow
def test_every_rate_is_measured_and_printed(monkeypatch, capsys):
    tiny = glmjax.get_config("glm-tiny", max_positions=16)
    monkeypatch.setattr(bench, "SIZES", {"tiny": tiny})
    # A test does not depend on whether the optional peer is there.
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    result = bench.run(("tiny",), rows=8, rounds=2)
    assert result["matmul_flops_per_second"] > 0
    measured = result["sizes"]["tiny"]
    assert measured["parameters"] == glmjax.count_params(tiny)
    assert set(measured["steps"]) == {"glmjax", "glmjax_blanks"}
    for rates in measured["steps"].values():
        assert rates["tokens_per_second"] > 0
        per_token = rates["flops_per_second"] / rates["tokens_per_second"]
        # Three times 2 N (12 D^2) + 4 N T D + 1.5 V D at N = 2, D = 64, T = 16, V = 512.
        assert per_token == pytest.approx(
            3 * (2 * 2 * 12 * 64**2 + 4 * 2 * 16 * 64 + 1.5 * 512 * 64)
        )

    bench.show(result)
    out = capsys.readouterr().out
    assert "tiny: " in out and "pytorch is not installed" in out
