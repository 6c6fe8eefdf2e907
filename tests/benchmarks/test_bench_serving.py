"""The table of what serving takes, with figures made up instead of compiled."""

import json
from dataclasses import replace

import pytest

from glmjax.benchmarks import serving
from glmjax.benchmarks.serving import CASES, GIB, Case, Found, experiment_of, run, table
from glmjax.model.params import count_params


def made_up(case, prefill=5 * GIB):
    return Found(case, 1, int(15.75 * GIB), 4 * GIB, int(4.5 * GIB), prefill, 0.0125, 0.006)


@pytest.fixture
def files(tmp_path, monkeypatch):
    document, results = tmp_path / "inference.md", tmp_path / "serving.json"
    document.write_text(f"before\n{serving.BEGIN}\nold\n{serving.END}\nafter\n")
    monkeypatch.setattr(serving, "RESULTS", results)
    monkeypatch.setattr(serving, "DOCUMENT", document)
    monkeypatch.setattr(serving.importlib.metadata, "version", lambda name: "1.2")
    return document, results


def test_figures_go_into_the_document(files, monkeypatch):
    document, results = files
    monkeypatch.setattr(serving, "measure", made_up)
    run()
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert (
        text.count("| chatglm-6b | int4 | v5e:1x1 | 1 | 4.00 | 4.50 | 5.00 | 15.75 | 12.5 ms |")
        == 1
    )
    cases = json.loads(results.read_text())["cases"]
    assert len(cases) == len(CASES) and {case["needed"] for case in cases} == {5 * GIB}


def test_the_step_that_needs_more_decides():
    found = made_up(CASES[0], prefill=16 * GIB)
    assert found.needed == 16 * GIB
    assert replace(found, prefill=0).needed == found.decode
    record = serving.asdict(found) | {"needed": found.needed}
    text = table({"date": "today", "versions": {}, "cases": [record]})
    assert "| 16.00, **does not fit** | 15.75 |" in text


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("model", ["chatglm-6b", "glm-130b"])
def test_a_case_is_an_experiment(model, weights):
    config = experiment_of(Case(model, "v5e:1x1", weights, 1)).model
    bits = None if config.quantization is None else config.quantization.bits
    assert (config.name, config.dtype, bits) == (
        model, "bfloat16", {"bfloat16": None, "int8": 8, "int4": 4}[weights],
    )  # fmt: skip
    assert count_params(config) > 6e9
