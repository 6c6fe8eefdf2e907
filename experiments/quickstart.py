"""Does a GLM learn to fill blanks in three minutes on two CPU cores?

    make train
    glmjax train experiments/quickstart.py
    glmjax train experiments/quickstart.py --train.steps 2000 --train.run runs/longer
    glmjax train experiments/quickstart.py --data.path my_texts/ --train.run runs/mine

Trains on the documentation of the running Python, numpy and jax. Three tokens in ten are blanked,
twice as many as in the papers, so that so short a run sees more targets. Expected: held-out loss about
0.9 nats per target below the unigram baseline (experiments/README.md).
"""

from glmjax.config import DataConfig, Experiment, ObjectiveConfig, OptimizerConfig, TrainConfig
from glmjax.presets import get_config


def experiment() -> Experiment:
    return Experiment(
        model=get_config(
            "glm-tiny",
            name="quickstart",
            num_layers=4,
            hidden_size=192,
            num_heads=3,
            ffn_size=768,
            vocab_size=4096,
            max_positions=256,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        ),
        objective=ObjectiveConfig(token=1.0, mask_ratio=0.3),
        data=DataConfig(vocab_size=4096, sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=100, decay=900, beta2=0.95),
        train=TrainConfig(
            run="runs/quickstart",
            steps=900,
            batch_size=8,
            evaluate_every=300,
            checkpoint_every=300,
        ),
    )
