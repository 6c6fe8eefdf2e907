"""Learning rates, the growing batch, steps and tokens."""

from experiments import glm_10b, glm_130b, glm_base, glm_large
from experiments.reproduce.number import Number
from glmjax.config import Experiment
from glmjax.data.ramp import batch_sizes, rows_before
from glmjax.training.schedule import embedding_gradient_scale, learning_rate, warm_up_and_decay

TOPIC = "Schedule"
TABLE_11 = "GLM-130B table 11"
SCRIPT = "THUDM/LargeScale configs/glm-130b/glm-130b.sh"
LOG = "THUDM/GLM-130B logs/main-log-en.md"
GLM = "THUDM/GLM learning_rates.py"
APPENDIX = "GLM paper appendix, table of pretraining settings (recalled, not checked)"

LEARNING_RATES_130B = {
    # rows: learning rate
    0: "0", 549_316: "4.0e-5", 1_098_632: "8.0e-5", 50_000_000: "6.956234817e-5",
    99_426_268: "4.4e-5", 197_753_905: "8e-6", 219_726_562: "8e-6",
}  # fmt: skip
LEARNING_RATES = (
    # model, experiment, step: learning rate
    ("GLM-Base", glm_base.experiment, {6000: "4e-4", 120_000: "2e-5"}),
    (
        "GLM-Large", glm_large.experiment,
        {4000: "1e-4", 8000: "2e-4", 84_000: "1.05e-4", 160_000: "1e-5", 200_000: "1e-5"},
    ),
    ("GLM-10B", glm_10b.experiment, {7000: "1e-4", 175_000: "1e-5"}),
    ("GLM-10B, second stage", glm_10b.longer, {250: "3e-5", 50_000: "3e-6"}),
)  # fmt: skip
EMBEDDING_GRADIENT = {
    # step: alpha as it happened
    5_999: "0.1", 6_500: "1", 22_800: "0.2", 28_800: "1", 33_600: "0.5", 35_200: "0.1", 49_299: "0.1",
}  # fmt: skip
TRAIN_ROWS = 450 * 10**9 // 2048
"""Rows of 2048 in the 450 billion tokens that were planned (SCRIPT)."""


def numbers() -> list[Number]:
    return [
        *_derived(), *_learning_rates(), *_ramp(), *_tokens(), *_happened(), *_glm_settings()
    ]  # fmt: skip


def _derived() -> list[Number]:
    return [
        Number(
            TOPIC, "GLM-130B, rows planned", "219726562", TRAIN_ROWS, "rows",
            "450e9 tokens // 2048", SCRIPT,
        ),
        Number(
            TOPIC, "GLM-130B, warm-up", "1098632", TRAIN_ROWS * 5 // 1000, "rows",
            "0.5% of the rows planned", TABLE_11,
        ),
        Number(
            TOPIC, "GLM-130B, batch ramp", "5493164", TRAIN_ROWS * 25 // 1000, "rows",
            "2.5% of the rows planned", TABLE_11,
        ),
        Number(
            TOPIC, "GLM-130B, end of the decay", "197753905", TRAIN_ROWS * 90 // 100, "rows",
            "90% of the rows planned", TABLE_11,
        ),
    ]  # fmt: skip


def _learning_rates() -> list[Number]:
    config = glm_130b.experiment().optimizer
    found = [
        Number(
            TOPIC, f"GLM-130B, learning rate at {rows:,} rows", printed,
            warm_up_and_decay(config, rows), "", "schedule.warm_up_and_decay",
            f"{TABLE_11}, THUDM/LargeScale megatron/learning_rates.py",
        )
        for rows, printed in LEARNING_RATES_130B.items()
    ]  # fmt: skip
    for model, make, rates in LEARNING_RATES:
        experiment = make()
        found += [
            Number(
                TOPIC, f"{model}, learning rate of step {step:,}", printed,
                learning_rate(experiment, step - 1), "", "schedule.learning_rate", GLM,
            )
            for step, printed in rates.items()
        ]  # fmt: skip
    return found


def _ramp() -> list[Number]:
    train = glm_130b.experiment().train
    sizes = batch_sizes(train)
    assert train.ramp is not None
    _, increment, rows = train.ramp
    return [
        Number(
            TOPIC, "GLM-130B, increments of the batch", "168", len(sizes) - 1, "",
            "ramp.batch_sizes", "(4224 - 192) / 24, GLM-130B table 11 rampup_batch_size",
        ),
        Number(
            TOPIC, "GLM-130B, first and last batch", "192 4224", (sizes[0], sizes[-1]), "rows",
            "ramp.batch_sizes", TABLE_11,
        ),
        Number(
            TOPIC, "GLM-130B, growth of the batch", "24", increment, "rows",
            "train.ramp of experiments/glm_130b.py", TABLE_11,
        ),
        Number(
            TOPIC, "GLM-130B, rows between increments", "32697", rows // (len(sizes) - 1), "rows",
            "rows of the ramp // increments of ramp.batch_sizes",
            "THUDM/LargeScale megatron/microbatches.py",
        ),
    ]  # fmt: skip


def ramp_steps(experiment: Experiment) -> int:
    """Steps until the batch has its final size."""
    train, step = experiment.train, 0
    while rows_before(train, step + 1) - rows_before(train, step) < train.batch_size:
        step += 1
    return step


def _tokens() -> list[Number]:
    experiment = glm_130b.experiment()
    train, length = experiment.train, experiment.data.sequence_length
    rows = rows_before(train, train.steps)
    left = (TRAIN_ROWS - rows) // train.batch_size
    return [
        Number(
            TOPIC, "GLM-130B, tokens of the released step 49,300", "4.0e11", float(rows * length),
            "tokens", "ramp.rows_before x 2048", "GLM-130B abstract, about 400 billion",
        ),
        Number(
            TOPIC, "GLM-130B, rows of the released step 49,300", "", rows, "rows",
            "ramp.rows_before", "",
        ),
        Number(
            TOPIC, "GLM-130B, steps until the batch is 4224", "", ramp_steps(experiment), "steps",
            "ramp.rows_before", "",
        ),
        Number(
            TOPIC, "GLM-130B, steps left to the 450 billion planned", "", left, "steps",
            "rows planned less rows of the released step, // 4224", "",
        ),
    ]  # fmt: skip


def _happened() -> list[Number]:
    experiment = glm_130b.as_it_happened()
    found = [
        Number(
            TOPIC, f"GLM-130B as it happened, embedding gradient alpha at step {step:,}", printed,
            embedding_gradient_scale(experiment, step), "", "schedule.embedding_gradient_scale", LOG,
        )
        for step, printed in EMBEDDING_GRADIENT.items()
    ]  # fmt: skip
    config = experiment.optimizer
    floors = [rate * ratio for _, rate, ratio in config.learning_rate_changes]
    found.append(
        Number(
            TOPIC, "GLM-130B as it happened, minimum learning rates from 26,000 and 42,700",
            "8e-6 4e-6", tuple(floors), "", "learning_rate_changes of as_it_happened", LOG,
        )
    )  # fmt: skip
    return found


def _glm_settings() -> list[Number]:
    base, large = glm_base.experiment(), glm_large.experiment()
    return [
        Number(
            TOPIC, "GLM-Base and GLM-Large, rows of a step", "1024 1024",
            (base.train.batch_size, large.train.batch_size), "rows",
            "experiments: 16 rows a GPU x 64 GPUs", APPENDIX,
        ),
        Number(
            TOPIC, "GLM-RoBERTa, rows of a step", "8192", 16 * 8 * 64, "rows",
            "16 rows x 8 accumulated x 64 GPUs", APPENDIX,
        ),
        Number(
            TOPIC, "GLM-Base and GLM-Large, warm-up", "6e3 8e3",
            (base.optimizer.warmup, large.optimizer.warmup), "steps",
            "experiments: 0.05 of the steps of the decay", APPENDIX,
        ),
        Number(
            TOPIC, "GLM-RoBERTa, warm-up", "30e3", round(0.06 * 500_000), "steps",
            "0.06 of the 500,000 steps of THUDM/GLM config/ds_blockta_large.sh", APPENDIX,
        ),
        Number(
            TOPIC, "GLM-RoBERTa, steps", "250e3", 500_000, "steps",
            "--train-iters of THUDM/GLM config/ds_blockta_large.sh", APPENDIX, known="500e3",
            question="the table's warm-up of 30,000 steps is 6% of the script's 500,000, and would be "
            "12% of its own 250,000; which of them was trained is not known",
        ),
        Number(
            TOPIC, "GLM-Base, steps", "120e3", base.train.steps, "steps",
            "--train-iters of THUDM/GLM config/ds_block_base.sh", APPENDIX, known="150e3",
            question="the table has the end of the decay for GLM-Base (120,000) but --train-iters for "
            "GLM-Large (200,000, its decay ends at 160,000)",
        ),
        Number(
            TOPIC, "GLM-Large, steps", "200e3", large.train.steps, "steps",
            "--train-iters of THUDM/GLM config/ds_block_large.sh", APPENDIX,
        ),
    ]  # fmt: skip
