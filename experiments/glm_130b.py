"""GLM-130B: does blank infilling in two languages, at 130 billion parameters, match GPT-3?

    glmjax plan experiments/glm_130b.py --topology v5p:8x8x16
    glmjax train experiments/glm_130b.py
    glmjax train experiments/glm_130b.py:as_it_happened

The published training run, value by value. It ran on 96 nodes of 8 A100-40G, 6 May to 3 July 2022,
400 billion tokens; P is the GLM-130B paper (arXiv 2210.02414), S the training script (THUDM/LargeScale
configs/glm-130b/glm-130b.sh), L the training log (THUDM/GLM-130B logs/main-log-en.md). Published
results: 0.634 bits per byte on the Pile's test sets (weighted), LAMBADA 80.2, MMLU 44.8 with 5 shots.

The text is not part of glmjax: put it where `data` below says, or name yours with --data.path,
--data.multitask and --data.tokenizer. `as_it_happened` adds what was changed while the run went on
(docs/loss_spikes.md).
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
        # Shape, DeepNorm, GeGLU, rotary positions, initial values and alpha 0.1: P table 11. Dropout
        # 0.1 everywhere: P table 11. The original computed in float16 with a loss scale, and everything
        # again in the backward pass (S --checkpoint-activations); here there is room to do less.
        model=get_config("glm-130b", dtype="bfloat16", remat="ffn"),
        objective=ObjectiveConfig(
            token=0.3,  # S --gpt-prob 0.7, the rest is [MASK]
            sentence=0.0,  # P section 2.2: [MASK] and [gMASK] only
            multitask=0.05,  # S --multitask-ratio
            draw="row",  # LargeScale glm/collator.py
            mask_ratio=0.15,  # S --mask-prob
            mean_span=3.0,  # S --average-block-length
            single_span=0.02,  # S --single-span-prob
            short_sequence=0.02,  # S --short-seq-prob
            document_min_ratio=0.2,  # S --min-gmask-ratio
            document_suffix=1.0,  # collator.py: [gMASK] always continues a prefix
            pieces_per_row=4,  # S --aggregated-samples-per-sequence
            positions="1d",  # P appendix B.3
            cross_document_attention=True,  # collator.py: rows are cut from one stream of documents
            cut_targets=True,  # collator.py: pieces are truncated to 512
        ),
        data=DataConfig(
            path=("data/pile", "data/wudao", "data/chinese-web"),  # P section 2.2
            # Half the tokens English, half Chinese (P section 1), and those in proportion to the sizes
            # of the two corpora, 1.0T and 250G (P section 2.2).
            weights=(0.5, 0.4, 0.1),
            multitask=("data/multitask",),  # P appendix C: T0 and DeepStruct
            tokenizer="data/ice_text.model",  # P table 11 IceTokenizer
            text_length=2000,  # S --length-per-sample
            sequence_length=2048,  # S --seq-length
            heldout=0.05,  # S --split 949,50,1
        ),
        optimizer=OptimizerConfig(
            learning_rate=8e-5,  # P table 11
            floor_ratio=0.1,  # P table 11 min_lr 8e-6
            schedule="cosine",  # P table 11
            schedule_unit="samples",  # S --lr-decay-samples
            warmup=1_098_632,  # P table 11 lr_warmup_samples
            decay=197_753_905,  # P table 11 lr_decay_samples
            beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, clip=1.0,  # P table 11
        ),
        # v5p:8x8x16, 1024 chips, where fsdp is 128, a plane of the torus; for other slices see
        # docs/pods.md. The original had 24-way data, 4-way tensor and 8-way pipeline parallelism
        # (P section 2.4).
        mesh=MeshConfig(data=1, fsdp=-1, tensor=8),
        train=TrainConfig(
            run="runs/glm-130b",
            steps=49_300,  # the released checkpoint; 195,591,480 rows, 400.6 billion tokens
            batch_size=4224,  # P table 11 global_batch_size
            microbatch_size=1408,  # 3 of them, 11 rows for 8 chips (P table 11 micro_batch_size 1)
            ramp=(192, 24, 5_493_164),  # P table 11 rampup_batch_size
            seed=1234,  # P table 11
            log_every=1,  # S --log-interval
            evaluate_every=1000,  # P table 11 eval_interval
            evaluate_batches=3,  # P table 11 eval_iters
            checkpoint_every=250,  # P table 11 save_interval
        ),
    )  # fmt: skip


def as_it_happened() -> Experiment:
    """With the changes that were made on the way (L), each at its step.

    Not repeated: the multi-task data of before step 24500 and the 2000 steps of smaller learning
    rate when it was replaced at 22800; the other position ids tried around step 48100.
    """
    return replace(
        experiment(),
        **{
            "optimizer.embedding_gradient_scale_changes": (
                (6000, 500, 1.0),  # 10 May: 0.1 looked too small
                (22_800, 0, 0.2),  # 29 May: other multi-task data, warmed up again
                (22_800, 6000, 1.0),
                (33_600, 0, 0.5),  # 12 June: the loss exploded at 33700
                (35_200, 0, 0.1),  # 14 June: it exploded at 35250
            ),
            "optimizer.learning_rate_changes": (
                (26_000, 4e-5, 0.2),  # 3 June: half the peak, the minimum still 8e-6
                (42_700, 4e-5, 0.1),  # 22 June: gradient spikes; minimum 4e-6
            ),
            # 20 and 22 June: loss and gradient spikes. The log counts steps from 1.
            "data.skip": ("40700:40899", "42400:42599"),
        },
    )
