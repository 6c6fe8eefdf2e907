# %% [markdown]
# # Blank infilling in ten minutes
#
# A GLM reads a text with holes and writes what belongs in them. This notebook draws what it reads, trains
# a small one on text that is on this machine already, and fills holes in sentences it has never seen.
#
# It needs `pip install "glmjax[train]"`, two CPU cores and three minutes.

# %%
import os
import textwrap
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import glmjax
from glmjax.config import DataConfig, Experiment, ObjectiveConfig, OptimizerConfig, TrainConfig
from glmjax.data.blanks import make_batch
from glmjax.data.pieces import fill_piece
from glmjax.data.prepare import prepare
from glmjax.data.spans import span_length_probabilities
from glmjax.inference.examples import fill_heldout
from glmjax.training.loop import fit
from glmjax.training.metrics import read_metrics

STEPS = int(os.environ.get("GLMJAX_NOTEBOOK_STEPS", "600"))  # of training; more fill better
FILLED = int(os.environ.get("GLMJAX_NOTEBOOK_FILLED", "200"))  # held-out blanks at the end

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": False})

# %% [markdown]
# ## The text
#
# Without a path, `DataConfig` stands for the documentation of the installed Python, numpy and jax. A
# vocabulary is trained on it, and one document in ten is held out.

# %%
data = DataConfig(vocab_size=2048, sequence_length=128, cache="runs/cache")
objective = ObjectiveConfig(mask_ratio=0.3)
corpora = prepare(data, objective)
tokenizer, (corpus,) = corpora.tokenizer, corpora.texts
print(corpus.name)
print(f"{len(corpus.train):,} training rows of {corpora.text_length} tokens")
print(f"{len(corpus.heldout):,} held-out rows")

# %% [markdown]
# ## One sentence with three blanks
#
# Part A is the sentence with `[MASK]` for each blank. Part B holds what was there: `sop`, then the tokens
# of one blank after the other, **in random order**, so that the model learns to use every blank for every
# other. Here the order is chosen by hand: the middle blank, the last, the first.

# %%
SENTENCE = (
    "The length of the sequence is cached by the interpreter, and it fails if the value changes."
)
tokens = tokenizer.special_tokens
text = np.array([tokens.cls, *tokenizer.encode(SENTENCE), tokens.eos])
n = len(text) // 6
spans = [(3 * n, 3 * n + 2), (5 * n, 5 * n + 3), (n, n + 2)]
piece = fill_piece(text, spans, tokens, mask=tokens.mask)

NAMES = {tokens.mask: "[MASK]", tokens.sop: "sop", tokens.eop: "eop", tokens.cls: "[CLS]"}
NAMES[tokens.eos] = "eos"


def spell(id):
    return NAMES.get(int(id)) or tokenizer.decode([int(id)]).strip() or "␣"


inputs = [spell(id) for id in piece.tokens]
outputs = [spell(id) if w else "" for id, w in zip(piece.targets, piece.weights, strict=True)]
part_a, part_b = inputs[: piece.context], inputs[piece.context :]
print(textwrap.fill("part A  " + " ".join(part_a), 95, subsequent_indent=" " * 8))
print(textwrap.fill("part B  " + " ".join(part_b), 95, subsequent_indent=" " * 8))
print(textwrap.fill("learns  " + " ".join(outputs[piece.context :]), 95, subsequent_indent=" " * 8))

# %% [markdown]
# Each input of part B is trained to give the token behind it; the last one of a blank gives `eop`, the
# end of the piece. `fill_piece` also makes **two positions** for every token: where it stands in the
# sentence (all of a blank stands at its `[MASK]`), and how far inside the blank it is (0 in part A). So
# the model is not told how long a blank is.

# %%
T = len(inputs)
color_T = np.where(np.arange(T) < piece.context, 1, 1 + np.cumsum(piece.tokens == tokens.sop))
palette = ListedColormap(["white", "#c9daf0", "#f3b184", "#9fd19b", "#d7a6d8"])

fig, ax = plt.subplots(figsize=(12, 2.6))
strip = np.stack([np.zeros(T), np.zeros(T), color_T, color_T])
ax.imshow(strip, cmap=palette, vmin=0, vmax=4, aspect="auto")
for x in range(T):
    ax.text(x, 0.5, inputs[x], rotation=90, ha="center", va="center", fontsize=9)
    for y in (0, 1):
        ax.text(x, y + 2, piece.positions_2T[y, x], ha="center", va="center", fontsize=9)
ax.set_yticks([0.5, 2, 3], ["token", "position", "block position"])
ax.set_xticks([])
ax.set_title("two positions for every token; part A blue, a colour for each blank")
plt.show()

# %% [markdown]
# **The mask** is one interval of keys for each query: query *q* sees the keys `k_start[q] <= k < k_end[q]`,
# where `k_end[q]` is the larger of *q* + 1 and the length of part A. Part A sees all of itself, part B
# sees part A and what stands before it in part B. Nothing else is ever stored, and no T x T mask is made
# except in this picture.

# %%
mask = glmjax.BlankMask.from_context(np.array([piece.context]), length=T)
k = np.arange(T)
visible_TT = (np.asarray(mask.k_start_BT[0])[:, None] <= k) & (
    k < np.asarray(mask.k_end_BT[0])[:, None]
)

fig, ax = plt.subplots(figsize=(8, 7.4))
ax.imshow(visible_TT * color_T[None, :], cmap=palette, vmin=0, vmax=4)
ax.set_xticks(k, inputs, rotation=90, fontsize=8)
ax.set_yticks(k, inputs, fontsize=8)
ax.set(title="who sees whom", xlabel="key", ylabel="query")
ax.set_xticks(k - 0.5, minor=True)
ax.set_yticks(k - 0.5, minor=True)
ax.grid(which="minor", color="#dddddd", linewidth=0.5)
ax.tick_params(which="minor", length=0)
plt.show()

# %% [markdown]
# ## Blanks at random
#
# In training `make_batch` draws the blanks: three tokens in ten here (the papers blank 15%), in spans of
# Poisson(3) length, and room is left at the end of a row. A batch is a function of seed and step. On the
# left 12 rows; where a document ends inside a row, both parts get blanks and a part B of their own and do
# not see each other. On the right the lengths of all spans in 512 rows.


# %%
def draw(rows):
    texts = [corpus.train[i]["tokens"] for i in range(rows)]
    return make_batch(
        texts,
        objective,
        tokens,
        sequence_length=data.sequence_length,
        seed=0,
        step=0,
        row_indices=range(rows),
        is_sentence_end_V=tokenizer.is_sentence_end,
    )


batch = draw(512)
is_end = (batch.targets_BT == tokens.eop) & (batch.weights_BT > 0)
lengths = batch.positions_B2T[:, 1][is_end] - 1  # the block position of eop counts the blank

fig, (left, right) = plt.subplots(1, 2, figsize=(12, 3.2), width_ratios=(2, 1))
kind = np.where(batch.tokens_BT == tokens.mask, 2, 1)
kind[batch.weights_BT > 0] = 3
kind[batch.k_end_BT == 0] = 0
left.imshow(kind[:12], cmap=palette, vmin=0, vmax=4, aspect="auto", interpolation="nearest")
left.set(title="part A blue, [MASK] orange, part B green", xlabel="token", ylabel="row")
shares = np.bincount(lengths, minlength=11)[1:11] / len(lengths)
right.bar(np.arange(1, 11), shares, color="#c9daf0", label="drawn")
right.plot(np.arange(1, 11), span_length_probabilities(3.0)[:10], "o", color="k", label="Poisson")
right.set(title="length of a span", xlabel="tokens", ylabel="share")
right.legend()
plt.show()
print(f"{len(lengths):,} spans in 512 rows, {lengths.mean():.2f} tokens long on average")

# %% [markdown]
# ## Training
#
# An experiment is one value. The model has the two positions as rotations, as ChatGLM-6B does (`rope_2d`;
# `experiments/positions.py` compares them with the learned tables of the first GLMs). `fit` trains it,
# shows the loss, and leaves a run folder with checkpoints and `metrics.jsonl`; called again it would
# continue from there.

# %%
experiment = Experiment(
    model=glmjax.get_config(
        "glm-tiny",
        name="notebook",
        num_layers=4,
        hidden_size=128,
        num_heads=2,
        ffn_size=512,
        vocab_size=2048,
        positions="rope_2d",
        embedding_dropout=0.0,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    ),
    objective=objective,
    data=data,
    optimizer=OptimizerConfig(
        learning_rate=3e-3, warmup=STEPS // 10, decay=STEPS, floor_ratio=0.1, beta2=0.95
    ),
    train=TrainConfig(
        run="runs/notebook",
        steps=STEPS,
        batch_size=16,
        log_every=max(1, STEPS // 12),
        evaluate_every=max(1, STEPS // 6),
        evaluate_batches=8,
        checkpoint_every=STEPS,
    ),
)
print(f"{glmjax.count_params(experiment.model):,} parameters")
summary = fit(experiment)

# %% [markdown]
# The loss is in nats per blanked token. The dashed lines are models that know nothing (*uniform*) and
# that know only how often each token is blanked (*unigram*): what is below the second line was learned
# from context.

# %%
rows = read_metrics(Path("runs/notebook/metrics.jsonl"))
fig, ax = plt.subplots(figsize=(8, 4))
for name, style, label in (("loss", "-", "training"), ("heldout_loss", "o-", "held out")):
    points = [(row["step"], row[name]) for row in rows if name in row]
    ax.plot(*zip(*points, strict=True), style, label=label)
for name, color in (("uniform_loss", "gray"), ("unigram_loss", "tab:red")):
    value = getattr(summary, name)
    ax.axhline(value, ls="--", color=color, label=f"{name.removesuffix('_loss')} {value:.2f}")
ax.set(xlabel="step", ylabel="nats per blanked token", title="watching it learn")
ax.legend()
plt.show()
print(f"held-out loss {summary.heldout_loss:.3f}", end=", ")
print(f"{summary.unigram_loss - summary.heldout_loss:.3f} nats below unigram")

# %% [markdown]
# ## Filling
#
# `glmjax.load` opens the run. Each of these sentences is from a held-out document; one blank of one to
# three tokens was cut out and the model fills it with the most probable tokens.

# %%
config, params = glmjax.load("runs/notebook")
examples = fill_heldout(config, params, corpora, count=FILLED)
for example in examples[:8]:
    print(textwrap.fill(" ".join(example.text.split()), 95))
    print(f"    was: {example.truth.strip()!r:<28} model: {example.filled.strip()!r}\n")
exact = sum(example.filled == example.truth for example in examples)
print(f"{exact} of {len(examples)} blanks are filled exactly")

# %% [markdown]
# Greedy text hides what the model knows. Below is its whole answer to one question: the probabilities of
# the first token behind `sop` for the first blank of our sentence (black where the true token is).

# %%
forward = jax.jit(glmjax.forward, static_argnums=0)
logits_BTV = forward(config, params, piece.tokens[None], piece.positions_2T[None], mask)
probabilities_V = np.asarray(jax.nn.softmax(logits_BTV[0, piece.context]))
truth = int(piece.targets[piece.context])
order = np.argsort(-probabilities_V)
rank = int(np.flatnonzero(order == truth)[0]) + 1
shown = [*order[:10], *([truth] if rank > 10 else [])]

fig, ax = plt.subplots(figsize=(8, 3))
colors = ["k" if id == truth else "#8fb3de" for id in shown]
ax.bar(range(len(shown)), probabilities_V[shown], color=colors)
ax.set_xticks(range(len(shown)), [spell(id) for id in shown], rotation=45, ha="right")
ax.set(ylabel="probability", title=" ".join(part_a))
plt.show()
print(f"the true token {spell(truth)!r} is number {rank} of {len(probabilities_V):,}")

# %% [markdown]
# Your own blank, `[MASK]` for a few tokens. (With `learned_2d`, the positions of GLM 110M to 10B, a text
# may have several, which are filled from left to right.)

# %%
texts = ["Return the [MASK] of the array.", "Raises an error if the argument is not a [MASK]."]
filled = glmjax.infill(config, params, tokenizer, texts, 6, glmjax.Sampling(temperature=0.0))
for text, result in zip(texts, filled, strict=True):
    print(f"{text}\n    {result}")

# %% [markdown]
# ## From here
#
# * More steps, a larger model, your own text: copy `experiments/quickstart.py`, or set
#   `data=DataConfig(path=("my_texts/",))` above.
# * The next notebook, *An ablation from idea to plot*, changes one thing and asks whether it matters.
