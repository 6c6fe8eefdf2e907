"""The ablations: what they would train at every scale, what they measure, and one of them whole."""

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tiny_run

from experiments.ablations import ABLATIONS, summary_table
from experiments.classics import SEEDS, base
from experiments.context import continuations
from experiments.documents import write_short
from glmjax.cli import main
from glmjax.config import Experiment, SpecialTokens, replace
from glmjax.data.blanks import text_length
from glmjax.data.readers import read_documents
from glmjax.model.params import count_params
from glmjax.sweep.ablation import variant
from glmjax.sweep.results import read_results
from glmjax.sweep.trials import Scale, Sweep, settings_digest
from glmjax.training.metrics import flops

TOKENS = SpecialTokens(mask=2, sop=3, eop=4, eos=5, pad=0, gmask=6)


def sweep_of(name: str, scale: Scale) -> Sweep:
    return importlib.import_module(f"experiments.{name}").sweep(scale)


@pytest.mark.parametrize("scale", get_args(Scale))
def test_ablations_share_their_trainings(scale):
    """25 trainings for each seed; every ablation but norms and documents has the base or another's
    variant among its own."""
    sweeps = {name: sweep_of(name, scale) for name in ABLATIONS}
    assert [sweep.name for sweep in sweeps.values()] == list(ABLATIONS)
    digests = {
        name: {settings_digest(trial.experiment) for trial in sweep.trials}
        for name, sweep in sweeps.items()
    }
    assert {name: len(own) // SEEDS[scale] for name, own in digests.items()} == {
        "positions": 4, "feed_forward": 2, "norms": 8, "embedding_shrink": 6, "objectives": 3,
        "context": 1, "span_order": 2, "decoder_noise": 2, "documents": 2, "softmax_precision": 4,
    }  # fmt: skip
    # The corpus at hand at tiny scale is that of the base, whose documents are apart.
    distinct = 25 if scale == "tiny" else 26
    assert len(set().union(*digests.values())) == distinct * SEEDS[scale]
    alone = {"norms"} if scale == "tiny" else {"norms", "documents"}
    for name in set(ABLATIONS) - alone:
        others = set().union(*(own for other, own in digests.items() if other != name))
        assert digests[name] & others, name


@pytest.mark.parametrize("name", ABLATIONS)
def test_trends_are_of_variants_and_metrics_there_are(name):
    module = importlib.import_module(f"experiments.{name}")
    variants = {", ".join(map(str, t.factors.values())) for t in module.sweep("cpu").trials}
    assert module.TRENDS
    for trend in module.TRENDS:
        assert {trend.better, trend.worse} <= variants
        assert {trend.metric, trend.worse_metric or trend.metric} <= set(module.METRICS)
        assert (trend.better, trend.metric) != (trend.worse, trend.worse_metric or trend.metric)


@pytest.mark.parametrize("scale", get_args(Scale))
def test_a_gated_feed_forward_has_as_many_parameters(scale):
    counts = {
        trial.factors["feed_forward"]: count_params(trial.experiment.model)
        for trial in sweep_of("feed_forward", scale).trials
    }
    assert counts["geglu"] == pytest.approx(counts["gelu"], rel=1e-3)
    # No other width comes closer: one more column has 3 D + 2 parameters in each layer.
    model = base(scale).model
    column = model.num_layers * (3 * model.hidden_size + 2)
    assert abs(counts["geglu"] - counts["gelu"]) <= column / 2


@pytest.mark.parametrize("scale", get_args(Scale))
def test_deep_models_cost_no_more_than_the_base(scale):
    def cost(experiment: Experiment) -> float:
        return flops(experiment.model, 1, experiment.data.sequence_length)

    deep = sweep_of("norms", scale).trials[0].experiment
    assert deep.model.num_layers == 4 * base(scale).model.num_layers
    assert 0.5 < cost(deep) / cost(base(scale)) < 1.1


@pytest.mark.parametrize("name", ABLATIONS)
def test_variants_of_a_seed_read_the_same_text(name):
    """Settings that choose rows of text are equal, so that pairs of trainings can be compared."""
    by_seed = Counter()
    for trial in sweep_of(name, "cpu").trials:
        e = trial.experiment
        rows = (e.data.path, e.data.sequence_length, e.train.batch_size, e.train.steps)
        by_seed[trial.seed, rows, e.data.text_length or text_length_of(e)] += 1
    assert len(by_seed) == SEEDS["cpu"]


def text_length_of(experiment: Experiment) -> int:
    return text_length(experiment.objective, experiment.data.sequence_length)


@pytest.mark.parametrize("positions", ["2d", "1d"])
def test_both_layouts_score_the_same_tokens(positions):
    """Prefix 10..13, rest 14..18: the same targets at the same places."""
    objective = replace(base("tiny").objective, positions=positions)
    texts = [np.arange(10, 19), np.arange(30, 39)]
    both, left = (
        continuations(texts, objective, TOKENS, layout)
        for layout in ("bidirectional", "unidirectional")
    )
    assert both.tokens_BT[0].tolist() == [10, 11, 12, 13, 6, 3, 14, 15, 16, 17]
    assert left.tokens_BT[0].tolist() == [6, 3, 10, 11, 12, 13, 14, 15, 16, 17]
    for batch in (both, left):
        for row, text in enumerate(texts):
            scored = batch.weights_BT[row] > 0
            assert batch.targets_BT[row][scored].tolist() == text[4:].tolist()
    np.testing.assert_array_equal(both.weights_BT, left.weights_BT)
    if positions == "1d":
        assert both.positions_B2T[0, 0].tolist() == list(range(10))
        assert left.positions_B2T[0, 0].tolist() == list(range(10))
    else:
        assert both.positions_B2T[0].tolist() == [
            [0, 1, 2, 3, 4, 4, 4, 4, 4, 4],
            [0] * 5 + [*range(1, 6)],
        ]
        assert left.positions_B2T[0].tolist() == [[0] * 10, [0, *range(1, 10)]]


def test_what_the_prefix_sees():
    """Both ways: each of its tokens sees all of it and nothing of the rest. From left to right: each
    sees what came before. A scored token sees the whole prefix, and no token to its right."""
    texts = [np.arange(10, 19)]
    seen = {}
    for layout in ("bidirectional", "unidirectional"):
        batch = continuations(texts, base("tiny").objective, TOKENS, layout)
        k = np.arange(10)
        sees_QK = (batch.k_start_BT[0, :, None] <= k) & (k < batch.k_end_BT[0, :, None])
        place = {token: i for i, token in enumerate(batch.tokens_BT[0].tolist())}
        seen[layout] = {
            q: {t for t in range(10, 19) if t in place and sees_QK[place[q], place[t]]}
            for q in range(10, 18)
        }
    prefix = set(range(10, 14))
    for q in range(10, 14):
        assert seen["bidirectional"][q] == prefix
        assert seen["unidirectional"][q] == set(range(10, q + 1))
    for q in range(14, 18):
        assert seen["bidirectional"][q] == seen["unidirectional"][q] == set(range(10, q + 1))


def test_short_documents_are_the_paragraphs_of_books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    paragraph, poem = "A sentence of thirty letters. " * 5, "山" * 50
    books = [{"text": f"# Title\r\n\r\n{paragraph}\r\n"}, {"text": f"{poem}\n{'x' * 700}"}]
    lines = [json.dumps(book, ensure_ascii=False) + "\n" for book in books]
    (folder / "books.jsonl").write_text("".join(lines))
    assert write_short((str(folder),), tmp_path / "short.jsonl") == 2
    documents = read_documents(tmp_path / "short.jsonl", "text")
    assert set(documents) == {paragraph.strip(), poem}


@pytest.mark.slow
def test_an_ablation_from_its_file_to_its_report(tmp_path, capfd, monkeypatch):
    """Trains six small models in processes, evaluates each on both kinds of blanks, and says what
    became of the trends; again, it trains nothing and says the same."""
    monkeypatch.chdir(tiny_run.REPOSITORY)
    runs, out = tmp_path / "runs", tmp_path / "out"
    command = ["sweep", "experiments/objectives.py", "--scale", "tiny"]
    command += ["--runs", str(runs), "--out", str(out)]
    assert main(command) == 0
    results = read_results(out / "objectives_tiny.parquet")
    assert [(variant(result), result.seed) for result in results] == [
        (name, seed) for seed in (0, 1) for name in ("mixture", "[MASK] only", "[gMASK] only")
    ]
    for result in results:
        assert result.status == "finished" and result.steps == 20
        # 20 steps from 1024 equally likely tokens
        assert 3 < result.numbers["loss/mask"] < np.log(1024) + 0.1
        assert 3 < result.numbers["loss/gmask"] < np.log(1024) + 0.1
    only = [result.numbers["loss/mask"] for result in results if "[MASK]" in variant(result)]
    text = (out / "objectives_tiny.md").read_text()
    assert f"| [MASK] only | {np.mean(only):.4f} | {np.std(only, ddof=1):.4f} |" in text
    assert text.count("Expected: ") == 3
    assert (out / "objectives_tiny.png").exists()
    assert "`objectives.py`" in summary_table(out, "tiny")

    times = {file: file.stat().st_mtime_ns for file in files_of(runs)}
    capfd.readouterr()
    assert main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in files_of(runs)} == times
    assert (out / "objectives_tiny.md").read_text() == text


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
