"""The notebooks: what is committed is what the sources say, and each runs from top to bottom."""

import json
import os
import re

import nbformat
import pytest
import tiny_run

pytest.importorskip("nbclient")
pytest.importorskip("jupytext")

from experiments.notebooks.render import FOLDER, NAMES, execute, read_source
from glmjax import count_params, get_config
from glmjax.training.metrics import read_metrics

MOST_BYTES = 400_000


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def read_rendered(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in code for output in cell.outputs]


def texts(notebook: nbformat.NotebookNode) -> str:
    """All that a notebook printed."""
    streams = [output for output in outputs(notebook) if output.output_type == "stream"]
    return "".join(output.text for output in streams if output.name == "stdout")


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_every_source_is_a_notebook_and_in_the_list():
    sources = {path.stem for path in FOLDER.glob("*.py")} - {"render"}
    rendered = {path.stem for path in FOLDER.glob("*.ipynb")}
    readme = (FOLDER / "README.md").read_text()
    assert sources == rendered == set(NAMES)
    assert all(f"[{name}]({name}.ipynb)" in readme for name in NAMES)


def test_the_rendered_notebook_has_the_cells_of_its_source(name):
    source, rendered = read_source(name), read_rendered(name)
    assert [(c.cell_type, c.id, c.source) for c in rendered.cells] == [
        (c.cell_type, c.id, c.source) for c in source.cells
    ]


def test_the_rendered_notebook_was_run_in_order_without_errors(name):
    rendered = read_rendered(name)
    code = [cell for cell in rendered.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for output in outputs(rendered)}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert not [o for o in outputs(rendered) if o.get("name") == "stderr"]
    assert pictures(rendered)
    assert texts(rendered)


def test_the_rendered_notebook_is_small_and_says_nothing_about_its_machine(name):
    file = FOLDER / f"{name}.ipynb"
    assert file.stat().st_size < MOST_BYTES
    readable = [output.get("text", "") for output in outputs(read_rendered(name))]
    readable += [str(o.get("data", {}).get("text/plain", "")) for o in outputs(read_rendered(name))]
    paths = re.findall(r"(?<![\w.`])/(?:home|root|tmp|usr|work|Users|var)/\S*", "".join(readable))
    assert not paths
    assert not re.findall(r"\b\d\d:\d\d:\d\d\b", "".join(readable))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prepared corpora that the notebooks of this module share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tmp_path, cache, monkeypatch):
    """Runs a notebook at a small size in an empty folder, and what `probe` gives behind it."""

    def run(name: str, probe: str, **sizes: object) -> tuple[nbformat.NotebookNode, object]:
        folder = tmp_path / "empty"
        (folder / "runs").mkdir(parents=True)
        (folder / "runs" / "cache").symlink_to(cache)
        environment = {
            **tiny_run.environment(devices=1),
            "IPYTHONDIR": str(tmp_path / "ipython"),
            "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
            **{f"GLMJAX_NOTEBOOK_{size.upper()}": str(value) for size, value in sizes.items()},
        }
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
        notebook = read_source(name)
        cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
        cell = nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({probe}))")
        notebook.cells.append(cell)
        execute(notebook, folder, environment)
        assert [(cell.cell_type, cell.source) for cell in notebook.cells[:-1]] == cells
        assert os.listdir(folder) == ["runs"]
        return notebook, json.loads(notebook.cells[-1].outputs[0].text)

    return run


@pytest.mark.slow
def test_blank_infilling(run, tmp_path):
    notebook, (loss, unigram, uniform, order) = run(
        "blank_infilling",
        "[summary.heldout_loss, summary.unigram_loss, summary.uniform_loss, spans]",
        steps=30,
        filled=8,
    )
    assert loss < uniform - 1  # it learns how often words are, at least
    assert unigram < uniform
    rows = read_metrics(tmp_path / "empty/runs/notebook/metrics.jsonl")
    assert rows[-1]["heldout_loss"] == loss
    assert order != sorted(order)
    assert len(re.findall(r"was: .* model: ", texts(notebook))) == 8
    assert pictures(notebook) == 5


@pytest.mark.slow
def test_ablation(run):
    notebook, (loss, own, found, kind, sentence) = run(
        "ablation",
        "[{n: list(v.values()) for n, v in loss.items()}, [r.heldout_loss for r in results], "
        "found.mean, judged.kind, judged.sentence]",
        steps=12,
        seeds=2,
    )
    assert [len(losses) for losses in loss.values()] == [2, 2]
    # With 15% blanks a run's own question is the common one; with 30% it is another.
    assert own[::2] == pytest.approx(loss["15%"], rel=1e-4)
    assert own[1::2] != pytest.approx(loss["30%"], rel=1e-4)
    assert found == pytest.approx((sum(loss["30%"]) - sum(loss["15%"])) / 2)
    assert found != 0
    assert kind in ("shows", "does not show", "is reversed")
    assert f"{found:+.4f}" in sentence
    assert sentence in " ".join(texts(notebook).split())
    assert pictures(notebook) == 1


@pytest.mark.slow
def test_glm_130b_numbers(run):
    notebook, (total, memory, fits, sizes) = run(
        "glm_130b_numbers", "[total, memory, fits, sizes]", points=50
    )
    assert total == count_params(get_config("glm-130b"))
    # 126,835,752,960 weights in the matrices, half a byte each, and 16 bits for everything else.
    rest = total - 126_835_752_960
    scales = 70 * (4 * 12288 + 2 * 32768 + 12288)
    assert memory["INT4"] == pytest.approx((126_835_752_960 / 2 + 2 * (rest + scales)) / 1e9)
    assert memory["FP16"] == pytest.approx(2 * total / 1e9)
    assert fits["absmax"][0] == pytest.approx(-0.511, abs=1e-3)
    assert (sizes[0], sizes[-1], len(sizes)) == (192, 4224, 169)
    for published in ("9.1176e+18", "134.15", "140.97", "43.3%", "32.5%", "3.8%"):
        assert published in texts(notebook)
    assert pictures(notebook) == 4


@pytest.mark.slow
def test_chatglm_6b(run):
    notebook, (sizes, costs, rounds, made) = run(
        "chatglm_6b",
        "[bytes_of, {n: float(l.mean()) for n, l in loss_of.items()}, rounds, len(new_ids)]",
        steps=20,
        texts=8,
    )
    assert sizes["int4"] < sizes["int8"] < sizes["float16"]
    assert costs["int8"] == pytest.approx(costs["float16"], abs=0.02)
    assert abs(costs["int8"] - costs["float16"]) < abs(costs["int4"] - costs["float16"])
    assert [question for question, _ in rounds] == [
        "What does this function return?", "And if the array is empty?",
    ]  # fmt: skip
    assert all(answer for _, answer in rounds)
    assert made == 3
    assert "problems: none" in texts(notebook)
    assert pictures(notebook) == 3


@pytest.mark.slow
@pytest.mark.tpu
def test_plan_a_pod(run):
    notebook, (fits, needed, small, pods) = run(
        "plan_a_pod",
        "[fits.fits, fits.memory.needed, small.estimate.utilisation, len(pods)]",
        recipe="glm_large.py",
        slice="v5e:4x4",
    )
    assert fits
    assert 0 < needed < 16 * 2**30
    assert 0 < small < 1
    assert pods == 6
    assert "remat none" in texts(notebook)
    assert pictures(notebook) == 5
