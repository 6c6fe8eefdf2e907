"""FLOPs as GLM-130B reports them, and files of metrics that survive a crash."""

import json
import sys

import pytest

from glmjax.config import Experiment, TrainConfig
from glmjax.presets import get_config
from glmjax.training.metrics import (
    flops,
    model_flops_utilisation,
    open_writers,
    read_metrics,
    truncate_metrics,
)

GLM_130B = get_config("glm-130b")
A100 = "NVIDIA A100-SXM4-40GB"


@pytest.mark.parametrize(
    ("rows", "seconds", "tera_flops"), [(4224, 88.5, 134.15), (6144, 122.5, 140.97)]
)
def test_flops_that_the_glm_130b_log_shows(rows, seconds, tera_flops):
    total = flops(GLM_130B, rows, 2048, recompute=True)
    assert total / seconds / 768 / 1e12 == pytest.approx(tera_flops, abs=0.005)


def test_flops_of_a_glm_130b_step():
    assert flops(GLM_130B, 4224, 2048, recompute=True) == pytest.approx(9.1176e18, rel=1e-5)


def test_utilisation_counts_recomputed_work_only_as_hardware():
    """GLM-130B section 2.3: 135 TFLOP/s are 43.3% of the hardware and 32.5% of the model."""
    assert model_flops_utilisation(768 * 135e12, A100, 768) == pytest.approx(0.433, abs=5e-4)
    useful = flops(GLM_130B, 4224, 2048) / flops(GLM_130B, 4224, 2048, recompute=True)
    assert model_flops_utilisation(768 * 135e12 * useful, A100, 768) == pytest.approx(
        0.325, abs=5e-4
    )


def test_flops_of_a_narrow_feed_forward_layer_are_its_own():
    """Twice the products of the matrices, three times for both passes."""
    half = get_config("glm-tiny", ffn_size=128)
    whole = get_config("glm-tiny", ffn_size=256)
    layers_and_matrices = 2 * 2
    assert flops(whole, 4, 64) - flops(half, 4, 64) == (
        3 * 4 * 64 * 2 * layers_and_matrices * 64 * 128
    )


def test_unknown_devices_have_no_utilisation():
    assert model_flops_utilisation(1e12, "cpu", 8) is None


@pytest.fixture
def metrics(tmp_path):
    """metrics.jsonl with steps 10, 20 and 30, and two rows of step 20."""
    path = tmp_path / "metrics.jsonl"
    (write,) = open_writers(Experiment(train=TrainConfig(run=str(tmp_path))))
    write(10, {"loss": 5.25, "rows": 80})
    write(20, {"loss": 4.5})
    write(20, {"heldout_loss": 4.75})
    write(30, {"loss": 4.0})
    return path


def test_rows_are_one_json_object_each(metrics):
    lines = metrics.read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics(metrics)
    assert read_metrics(metrics)[0] == {"step": 10, "loss": 5.25, "rows": 80}
    assert len(lines) == 4


def test_truncation_keeps_everything_up_to_the_step(metrics):
    truncate_metrics(metrics, 20)
    assert [row["step"] for row in read_metrics(metrics)] == [10, 20, 20]
    assert [file.name for file in metrics.parent.iterdir()] == ["metrics.jsonl"]


def test_truncation_of_a_run_without_metrics(tmp_path):
    truncate_metrics(tmp_path / "metrics.jsonl", 0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_cut_last_line_is_left_out(metrics):
    whole = metrics.read_bytes()
    rows = read_metrics(metrics)
    last = whole.rindex(b"{")
    for size in range(last, len(whole) - 2):
        metrics.write_bytes(whole[:size])
        assert read_metrics(metrics) == rows[:-1], whole[last:size]
    truncate_metrics(metrics, 30)
    assert metrics.read_bytes() == whole[:last]


@pytest.mark.parametrize(
    ("module", "extra", "settings"),
    [
        ("tensorboardX", "tensorboard", {"tensorboard": True}),
        ("wandb", "wandb", {"wandb": "project"}),
    ],
)
def test_missing_tracker_names_its_extra(monkeypatch, tmp_path, module, extra, settings):
    monkeypatch.setitem(sys.modules, module, None)
    experiment = Experiment(train=TrainConfig(run=str(tmp_path), **settings))
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "glmjax\[{extra}\]"'):
        open_writers(experiment)


def test_tensorboard_gets_numbers_only(monkeypatch, tmp_path):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((self.folder, name, value, step))

    tracker = type(sys)("tensorboardX")
    tracker.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", tracker)
    train = TrainConfig(run=str(tmp_path), tensorboard=True)
    for write in open_writers(Experiment(train=train)):
        write(3, {"loss": 2.5, "note": "text"})
    assert written == [(str(tmp_path / "tensorboard"), "loss", 2.5, 3)]
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 2.5, "note": "text"}]
