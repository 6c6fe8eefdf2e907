"""GLM-10B: does one model of blanks, sentences and documents both understand and generate?

    glmjax plan experiments/glm_10b.py --topology v5p:4x4x4
    glmjax train experiments/glm_10b.py --data.path pile/ cc-news/ --data.tokenizer gpt2-vocab.json
    glmjax plan experiments/glm_10b.py:longer --topology v5p:4x4x4

Published, after both stages: LAMBADA 72.35, WikiText-103 perplexity 11.33, both zero-shot and
bidirectional; SuperGLUE (dev) BoolQ 88.7, RTE 93.1, COPA 98.0 after fine-tuning (THUDM/GLM README).
Values are those of THUDM/GLM: config/ds_block_10B.sh, config/config_block_10B.json, and defaults of its
arguments.py; `longer` is the second stage, config/ds_block_10B_longer.sh and
config/config_block_10B_longer.json.

The batch size is inferred, since it was not published: rows per GPU of the JSON file times the 256
GPUs of scripts/ds_pretrain_nvidia.sh. The original drew the objective anew for the rows of each GPU.
"""

from glmjax.config import (
    DataConfig,
    Experiment,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    replace,
)
from glmjax.presets import get_config


def experiment() -> Experiment:
    return Experiment(
        # Dropout 0.1 everywhere: defaults of arguments.py. The original computed in float16.
        model=get_config("glm-10b", dtype="bfloat16", remat="block"),  # --checkpoint-activations
        objective=ObjectiveConfig(
            token=0.5,  # ds_block_10B.sh --bert-prob
            sentence=0.3,  # --gap-sentence-prob; the rest is document-level
            mask_ratio=0.15,  # blocklm_utils.py bert_ratio
            mean_span=3.0,  # --avg-block-length
            document_min_ratio=0.25,  # --gpt-min-ratio
            document_suffix=0.5,  # arguments.py --gpt-infill-prob
            decoder_noise=0.1,  # --block-mask-prob
            short_sequence=0.02,  # --short-seq-prob
            task_masks=True,  # --task-mask
            cross_document_attention=True,  # data_utils/datasets.py: no mask between them
        ),
        data=DataConfig(
            path=("data/pile", "data/cc-news"),  # --train-data, English only (--filter-english)
            tokenizer="data/gpt2-vocab.json",  # --tokenizer-type GPT2BPETokenizer
            text_length=512,  # --seq-length
            sequence_length=576,  # room for blanks; the original pads to the longest row
            heldout=0.05,  # --split 949,50,1
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,  # config_block_10B.json
            floor_ratio=0.1,  # --lr-decay-ratio
            schedule="cosine",  # --lr-decay-style
            warmup=7000,  # --warmup 0.04 of --lr-decay-iters
            decay=175_000,  # --lr-decay-iters
            beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1,  # config_block_10B.json
            clip=1.0,  # config_block_10B.json gradient_clipping
        ),
        mesh=MeshConfig(data=1, fsdp=-1),  # v5p:4x4x4, 64 chips that share the parameters
        train=TrainConfig(
            run="runs/glm-10b",
            steps=250_000,  # --train-iters
            batch_size=5376,  # 21 rows a GPU (config_block_10B.json) on 256 GPUs, see above
            microbatch_size=1344,  # 21 rows a chip
            seed=1234,  # arguments.py --seed
            log_every=50,  # --log-interval
            evaluate_every=1000,  # --eval-interval
            evaluate_batches=100,  # arguments.py --eval-iters
            checkpoint_every=2000,  # --save-interval
        ),
    )  # fmt: skip


def longer() -> Experiment:
    """The second stage, on twice as much text a row, with a schedule of its own.

    The original began it with the weights of the first (--load, --no-load-lr-scheduler).
    """
    return replace(
        experiment(),
        **{
            "objective.token": 0.4,  # ds_block_10B_longer.sh --bert-prob
            "objective.sentence": 0.3,  # --gap-sentence-prob
            "objective.single_span": 0.05,  # --single-span-prob
            "objective.short_sequence": 0.5,  # --short-seq-prob
            "data.text_length": 1024,  # --seq-length
            "data.sequence_length": 1152,
            "optimizer.learning_rate": 3e-5,  # config_block_10B_longer.json
            "optimizer.schedule": "linear",  # --lr-decay-style
            "optimizer.warmup": 250,  # --warmup 0.005 of --lr-decay-iters
            "optimizer.decay": 50_000,  # --lr-decay-iters
            "train.run": "runs/glm-10b-longer",
            "train.steps": 50_000,  # to the end of the decay; --train-iters 250000 is not reached
            "train.batch_size": 2048,  # 8 rows a GPU (config_block_10B_longer.json) on 256 GPUs
            "train.microbatch_size": 512,  # 8 rows a chip
            "train.log_every": 25,  # --log-interval
        },
    )
