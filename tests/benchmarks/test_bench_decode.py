"""The decoding benchmark measures what it says."""

import json

import pytest

import glmjax
from glmjax.benchmarks import decode as bench

pytestmark = pytest.mark.slow


@pytest.fixture
def measured(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "memory_bandwidth", lambda: 1e9)
    # A test does not depend on whether the optional peer is there.
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    document = tmp_path / "inference.md"
    document.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    monkeypatch.setattr(bench, "DOCUMENT", document)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    found = bench.run("chatglm-tiny", 2, prompt=12, tokens=4, rounds=2, write=True)
    assert json.loads((tmp_path / "decode_cpu.json").read_text()) == found
    return found, document.read_text()


def test_every_kind_is_measured_and_written_down(measured, capsys):
    found, document = measured
    assert set(found["contenders"]) == {"glmjax float32", "glmjax int8", "glmjax int4"}
    assert set(found["ratios"]) == {
        "glmjax int8 to glmjax float32", "glmjax int4 to glmjax float32"
    }  # fmt: skip
    for rates in found["contenders"].values():
        assert rates["tokens_per_second"] > 0 and rates["first_token_seconds"] > 0
        share = rates["bytes_per_token"] * rates["tokens_per_second"] / 1e9
        assert rates["bandwidth_share"] == pytest.approx(share)
    bench.show(found)
    assert bench.table(found) in capsys.readouterr().out
    assert bench.table(found) in document and "old" not in document
    assert document.startswith("before\n") and document.endswith("after\n")


def test_bytes_are_those_of_weights_and_cache(measured):
    found, _ = measured
    config = glmjax.get_config("chatglm-tiny")
    D, F, V = config.hidden_size, config.ffn_size, config.vocab_size
    kernels = 2 * (4 * D * D + 2 * D * F)
    rest = glmjax.count_params(config) - kernels
    scales = 2 * (3 * D + D + F + D)
    cache = (12 + 4 / 2) * 2 * 2 * D * 4
    others = 4 * V * D + 2 * (rest - V * D + scales)
    expected = {
        "float32": 4 * (kernels + rest),
        "int8": kernels + others,
        "int4": kernels / 2 + others,
    }
    for kind, weights in expected.items():
        assert found["contenders"][f"glmjax {kind}"]["bytes_per_token"] == weights + cache
