"""GLM-2B: how much of GLM-10B does a fifth of its parameters keep?

    glmjax plan experiments/glm_2b.py --topology v5e:8x8
    glmjax train experiments/glm_2b.py --data.path pile/ cc-news/ --data.tokenizer gpt2-vocab.json

No result of this model was published. Values are those of THUDM/GLM at its commit f83be82, whose
main branch no longer has them: config/ds_block_2B.sh, config/config_block_2B.json, and the defaults
of arguments.py.

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
)
from glmjax.presets import get_config


def experiment() -> Experiment:
    return Experiment(
        # Dropout 0.1 everywhere: defaults of arguments.py. The original computed in float16.
        model=get_config("glm-2b", dtype="bfloat16", remat="block"),  # --checkpoint-activations
        objective=ObjectiveConfig(
            token=0.4,  # ds_block_2B.sh --bert-prob
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
            learning_rate=1e-4,  # config_block_2B.json
            floor_ratio=0.1,  # --lr-decay-ratio
            schedule="cosine",  # --lr-decay-style
            warmup=7000,  # --warmup 0.04 of --lr-decay-iters
            decay=175_000,  # --lr-decay-iters
            beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1,  # config_block_2B.json
            clip=1.0,  # config_block_2B.json gradient_clipping
        ),
        mesh=MeshConfig(data=1, fsdp=-1),  # v5e:8x8, 64 chips that share the parameters
        train=TrainConfig(
            run="runs/glm-2b",
            steps=250_000,  # --train-iters
            batch_size=8192,  # 32 rows a GPU (config_block_2B.json) on 256 GPUs, see above
            microbatch_size=2048,  # 32 rows a chip
            seed=1234,  # arguments.py --seed
            log_every=50,  # --log-interval
            evaluate_every=1000,  # --eval-interval
            evaluate_batches=100,  # arguments.py --eval-iters
            checkpoint_every=2000,  # --save-interval
        ),
    )  # fmt: skip
