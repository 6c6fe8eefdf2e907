"""What GLM-130B's training took: FLOPs, utilisation, pipeline, time, energy."""

from experiments import glm_130b, glm_large
from experiments.reproduce.number import Number
from glmjax.config import replace
from glmjax.data.ramp import rows_before
from glmjax.presets import get_config
from glmjax.training.metrics import flops, model_flops_utilisation

TOPIC = "Compute, time and energy"
A100 = "NVIDIA A100-SXM4-40GB"
V100_PEAK = 125e12  # half precision, NVIDIA V100 data sheet
GPUS = 96 * 8  # GLM-130B section 2.4
DATA, TENSOR, PIPELINE = 24, 4, 8  # GLM-130B table 11
LOG = "THUDM/GLM-130B logs/main-log-en.md"
STEPS = (
    # rows, seconds (log), TFLOP/s per GPU by the formula, as logged, samples per second as logged
    (4224, 88.5, "134.15", "134", "48"),
    (6144, 122.5, "140.97", "141", ""),
)
ACCESS_DAYS = 60  # GLM-130B section 1
LOG_DAYS = 58  # from 6 May to 3 July 2022, LOG
A100_WATTS = 400  # NVIDIA A100 SXM data sheet
GRID = 0.5810  # t CO2 per MWh, GRID_SOURCE
GRID_SOURCE = "Chinese Ministry of Ecology and Environment, notice of March 2022, national grid"
ENERGY_SOURCE = "GLM-130B appendix H"


def numbers() -> list[Number]:
    return [*_steps(), *_utilisation(), *_parallelism(), *_run(), *_energy(), _large()]


def step_flops(rows: int, recompute: bool = True) -> float:
    """FLOPs of a step of GLM-130B."""
    experiment = glm_130b.experiment()
    return flops(experiment.model, rows, experiment.data.sequence_length, recompute=recompute)


def run_seconds() -> float:
    """The published run at the rate of its log."""
    train = glm_130b.experiment().train
    rows, seconds, *_ = STEPS[0]
    return rows_before(train, train.steps) / rows * seconds


def _steps() -> list[Number]:
    formula = "GLM-130B training.py: 24 k B s N D^2 (1 + s / 6D + V / 16 N D), k = 4"
    found = [
        Number(
            TOPIC, "FLOPs of a step, 4224 rows", "9.1176e18", step_flops(4224), "FLOPs",
            "metrics.flops, recompute", formula,
        )
    ]  # fmt: skip
    for rows, seconds, computed, logged, samples in STEPS:
        rate = step_flops(rows) / seconds / GPUS / 1e12
        how = f"metrics.flops / {seconds} s / {GPUS} GPUs"
        name, unit = f"rate at {rows} rows", "TFLOP/s per GPU"
        found.append(Number(TOPIC, f"{name}, from the formula", computed, rate, unit, how, formula))
        found.append(Number(TOPIC, f"{name}, as logged", logged, rate, unit, how, LOG))
        if samples:
            found.append(
                Number(
                    TOPIC, f"samples per second at {rows} rows", samples, rows / seconds,
                    "rows/s", f"{rows} / {seconds} s", LOG,
                )
            )  # fmt: skip
    model = get_config("glm-130b")
    width = model.hidden_size
    plain = replace(model, ffn="gelu", ffn_size=4 * width)
    found.append(
        Number(
            TOPIC, "FLOPs of GeGLU at 8/3 D over GELU at 4 D", "1",
            step_flops(4224) / flops(plain, 4224, 2048, recompute=True), "",
            "metrics.flops of both", "GLM-130B section 2.2",
        )
    )  # fmt: skip
    return found


def _utilisation() -> list[Number]:
    source = "GLM-130B section 2.3"
    useful = step_flops(4224, recompute=False) / step_flops(4224)

    def percent(rate: float) -> float:
        utilisation = model_flops_utilisation(rate, A100, 1)
        assert utilisation is not None
        return 100 * utilisation

    exact = step_flops(4224) / STEPS[0][1] / GPUS
    return [
        Number(
            TOPIC, "hardware FLOPs utilisation at 135 TFLOP/s", "43.3", percent(135e12), "%",
            "metrics.model_flops_utilisation", source,
        ),
        Number(
            TOPIC, "model FLOPs utilisation at 135 TFLOP/s", "32.5", percent(135e12 * useful), "%",
            "the same, times metrics.flops without and with recompute", source,
        ),
        Number(
            TOPIC, "hardware FLOPs utilisation at 88.5 s a step", "43.3", percent(exact), "%",
            "metrics.flops / 88.5 s / 768 GPUs, metrics.model_flops_utilisation", source,
            known="43.0", explanation="135 TFLOP/s is a rounded rate; the log's is 134.15",
        ),
    ]  # fmt: skip


def _parallelism() -> list[Number]:
    experiment = glm_130b.experiment()
    microbatches = experiment.train.batch_size // DATA
    bubble = (PIPELINE - 1) / (microbatches + PIPELINE - 1)
    units = experiment.model.num_layers + 2
    source = "GLM-130B section 2.4 and table 11"
    return [
        Number(
            TOPIC, "GPUs", "768", DATA * TENSOR * PIPELINE, "",
            f"{DATA} data x {TENSOR} tensor x {PIPELINE} pipeline", source,
        ),
        Number(
            TOPIC, "micro-batches of a step", "176", microbatches, "",
            f"{experiment.train.batch_size} rows / {DATA} replicas, one row each", source,
        ),
        Number(
            TOPIC, "pipeline bubble", "3.8", 100 * bubble, "%",
            "(p - 1) / (m + p - 1), PipeDream-Flush", "GLM-130B section 2.3",
        ),
        Number(
            TOPIC, "units of a pipeline stage", "9", units / PIPELINE, "",
            f"{units} units (both embeddings, {experiment.model.num_layers} blocks) / {PIPELINE}",
            source,
        ),
    ]  # fmt: skip


def _run() -> list[Number]:
    train = glm_130b.experiment().train
    per_row = step_flops(4224) / 4224
    total = rows_before(train, train.steps) * per_row
    days = run_seconds() / 86_400
    how = f"ramp.rows_before({train.steps:,}) x FLOPs of a row"
    return [
        Number(TOPIC, "FLOPs of the released run", "", total, "FLOPs", how, ""),
        Number(
            TOPIC, "days of computing at 134.15 TFLOP/s", "", days, "days",
            "rows of the run at 4224 per 88.5 s", "",
        ),
        Number(
            TOPIC, "share of the 60 days spent computing", "", 100 * days / ACCESS_DAYS, "%",
            "the row above over 60 days; what is left is smaller batches, restarts, repeated steps",
            "",
        ),
    ]  # fmt: skip


def _energy() -> list[Number]:
    hours = ACCESS_DAYS * 24
    energy = GPUS * A100_WATTS * hours / 1e6
    return [
        Number(
            TOPIC, "energy", "442.4", energy, "MWh",
            f"inferred: {GPUS} GPUs x {A100_WATTS} W (their most) x {ACCESS_DAYS} days of access",
            ENERGY_SOURCE,
        ),
        Number(
            TOPIC, "carbon", "257.01", energy * GRID, "t CO2e",
            f"inferred: the energy above x {GRID} t/MWh", ENERGY_SOURCE, known="257.016",
            explanation="cut behind the second digit instead of rounded it is 257.01",
        ),
        Number(
            TOPIC, "carbon intensity implied by both", "0.5810", 257.01 / energy, "t CO2e/MWh",
            "257.01 t / the energy above", GRID_SOURCE,
        ),
        Number(
            TOPIC, "power of a GPU, implied by 442.4 MWh over the log's 58 days", "",
            442.4e6 / GPUS / (LOG_DAYS * 24), "W",
            "6 May to 3 July 2022; an A100 takes 400 W at most, and no host is in it", "",
        ),
        Number(
            TOPIC, "power of a GPU, implied by 442.4 MWh over the computing time", "",
            442.4e6 / GPUS / (run_seconds() / 3600), "W",
            "had only computing been counted, hosts and cooling included", "",
        ),
    ]  # fmt: skip


def _large() -> Number:
    experiment = glm_large.experiment()
    train, data = experiment.train, experiment.data
    total = flops(experiment.model, train.batch_size, data.text_length or 0) * train.steps
    rate = total / (64 * 2.5 * 86_400)
    return Number(
        TOPIC, "GLM-Large: rate of a V100, implied by 2.5 days on 64", "", rate / 1e12, "TFLOP/s",
        f"metrics.flops x {train.steps:,} steps without recomputation; "
        f"{100 * rate / V100_PEAK:.0f}% of the peak", "GLM paper appendix",
    )  # fmt: skip
