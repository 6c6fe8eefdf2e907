"""GLM-Large (335M): does blank infilling still beat masked tokens at BERT-Large's size?

    glmjax plan experiments/glm_large.py --topology v5e:4x4
    glmjax train experiments/glm_large.py --data.path wiki/ books/ --data.tokenizer vocab.txt

What to expect: SuperGLUE after fine-tuning beside BERT-Large, in the GLM paper (arXiv 2103.10360).
Values are those of THUDM/GLM: config/ds_block_large.sh, config/config_block_large.json, and the
defaults of its arguments.py.
"""

from glmjax.config import (
    DataConfig,
    Experiment,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from glmjax.presets import get_config


def experiment() -> Experiment:
    return Experiment(
        # Dropout 0.1 everywhere: defaults of arguments.py. The original computed in float16.
        model=get_config("glm-large", dtype="bfloat16"),
        objective=ObjectiveConfig(
            token=1.0,  # ds_block_large.sh --bert-prob
            mask_ratio=0.15,  # blocklm_utils.py bert_ratio
            mean_span=3.0,  # arguments.py --avg-block-length
            task_masks=False,  # no --task-mask: every blank is [MASK]
            cross_document_attention=True,  # data_utils/datasets.py: no mask between them
        ),
        data=DataConfig(
            path=("data/wikipedia", "data/bookscorpus"),  # --train-data bert-large
            tokenizer="data/bert-large-uncased-vocab.txt",  # --tokenizer-model-type
            text_length=512,  # --seq-length
            sequence_length=576,  # room for blanks; the original pads to the longest row
            heldout=0.05,  # --split 949,50,1
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4,  # config_block_large.json
            floor_ratio=0.05,  # --lr-decay-ratio
            schedule="cosine",  # --lr-decay-style
            warmup=8000,  # --warmup .05 of --lr-decay-iters
            decay=160_000,  # --lr-decay-iters
            beta1=0.9, beta2=0.98, epsilon=1e-6, weight_decay=0.1,  # config_block_large.json
            clip=1.0,  # config_block_large.json gradient_clipping
        ),
        mesh=MeshConfig(data=-1),  # v5e:4x4, 16 chips, each with the whole model
        train=TrainConfig(
            run="runs/glm-large",
            steps=200_000,  # --train-iters
            batch_size=1024,  # 16 rows a GPU (config_block_large.json) on 64 GPUs (GLM paper, 3.1)
            microbatch_size=256,  # 16 rows a chip
            seed=1234,  # arguments.py --seed
            log_every=100,  # arguments.py --log-interval
            evaluate_every=1000,  # arguments.py --eval-interval
            evaluate_batches=100,  # arguments.py --eval-iters
            checkpoint_every=1000,
        ),
    )  # fmt: skip
