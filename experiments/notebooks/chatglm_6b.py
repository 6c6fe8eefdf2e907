# %% [markdown]
# # From ChatGLM-6B weights to answers
#
# What is in a folder of weights, opening it, making it smaller, and talking to it. Put the path of your
# copy of `THUDM/chatglm-6b` (or its int8 or int4 release) into `CHECKPOINT`. Without one, a **stand-in** is
# made: the same architecture, the same names of tensors, the same file format, half a million
# parameters instead of 6.2 billion, trained for a minute on the documentation of this machine.
#
# The stand-in is here to show the steps. **Its answers are noise**: it has never seen a conversation. It
# also has a small vocabulary of its own, because ChatGLM's file cannot be made here. With the real folder
# every cell below stays as it is; its README asks for 13 GB of memory in float16 and 6 GB in int4.
#
# It needs `pip install "glmjax[train,chat]"` and two minutes; for .bin files also the extra `torch`.

# %%
import os
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.console import Console

import glmjax
from glmjax.config import (
    DataConfig,
    Experiment,
    ObjectiveConfig,
    OptimizerConfig,
    Quantization,
    TrainConfig,
    replace,
)
from glmjax.data.documentation import documentation
from glmjax.data.pieces import suffix_piece
from glmjax.data.prepare import is_heldout
from glmjax.data.tokenizers import load_tokenizer
from glmjax.inference.chat import Round, Speaker, answer, make_prompt
from glmjax.interop.convert import convert
from glmjax.interop.inspection import inspect, show
from glmjax.training.loop import fit

CHECKPOINT = None  # such as "~/models/chatglm-6b"
STEPS = int(os.environ.get("GLMJAX_NOTEBOOK_STEPS", "300"))  # of training the stand-in
TEXTS = int(os.environ.get("GLMJAX_NOTEBOOK_TEXTS", "64"))  # held-out texts to compare weights on

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})


# %% [markdown]
# ## A folder of weights
#
# `chatglm-tiny` is ChatGLM-6B made narrow: rotary positions in two dimensions, DeepNorm, heads mixed in one
# matrix. It learns to continue texts behind [gMASK]; then `convert` writes it as Hugging Face has it, in
# float16 as the official release.


# %%
def make_stand_in(folder):
    experiment = Experiment(
        model=glmjax.get_config(
            "chatglm-tiny",
            hidden_size=128,
            ffn_size=512,
            vocab_size=1024,
            max_positions=512,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        ),
        objective=ObjectiveConfig(token=0.0, document_suffix=1.0),
        data=DataConfig(vocab_size=1024, sequence_length=128, cache="runs/cache"),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup=STEPS // 10, decay=STEPS, floor_ratio=0.1, beta2=0.95
        ),
        train=TrainConfig(
            run="runs/stand-in",
            steps=STEPS,
            batch_size=16,
            log_every=max(1, STEPS // 4),
            evaluate_every=STEPS,
            evaluate_batches=4,
            checkpoint_every=STEPS,
        ),
    )
    fit(experiment)
    convert("runs/stand-in", folder, to="hf", dtype="float16")


folder = Path(CHECKPOINT or "runs/chatglm-stand-in").expanduser()
if CHECKPOINT is None and not folder.exists():
    make_stand_in(folder)
for file in sorted(folder.iterdir()):
    print(f"{file.stat().st_size:>14,} bytes   {file.name}")

# %% [markdown]
# ## A look
#
# `inspect` reads headers, never weights: what the folder is, and every tensor that is missing, unexpected
# or of the wrong shape. On the command line it is `glmjax inspect FOLDER`.

# %%
report = inspect(folder)
show(report, Console(force_jupyter=False, color_system=None, width=90))
print(f"problems: {report.problems or 'none'}")

# %% [markdown]
# ## Opening and quantising
#
# `load` takes the weights layer by layer, in the type of the file; `quantize` turns the four matrices of
# each block into integers on the way, by the rule of the official release. Word embedding, norms and biases
# stay floats. `for_decoding=True` would lay the same numbers out as decoding is fastest.

# %%
tokenizer = load_tokenizer(folder)
tokens = tokenizer.special_tokens


def open_as(quantize=None):
    config, params = glmjax.load(folder, quantize=quantize)
    # The official config.json names only those special tokens that ChatGLM-6B has.
    return replace(config, special_tokens=tokens), params


kinds = {
    "float16": None,
    "int8": "int8",
    "int4": "int4",
    "int4, zero-points": Quantization(4, scheme="zeropoint"),
}
models = {name: open_as(quantize) for name, quantize in kinds.items()}
bytes_of = {n: sum(x.nbytes for x in jax.tree.leaves(params)) for n, (_, params) in models.items()}
for name, size in bytes_of.items():
    print(f"{name:18} {size:>14,} bytes   {size / bytes_of['float16']:.0%}")
embedding = models["float16"][1].word_embedding.nbytes
print(f"{'word embedding':18} {embedding:>14,} bytes in each of them")

# %% [markdown]
# What it costs is measured on texts that the stand-in never saw: the second half of each is predicted from
# the first, token by token.

# %%
heldout = [text for text in documentation() if is_heldout((text,), 0.1)]
pieces = []
for text in sorted(heldout, key=len, reverse=True)[:TEXTS]:
    ids = np.array(tokenizer.encode(text)[:64])
    pieces.append(suffix_piece(ids, 32, tokens, mask=tokens.gmask))
batch = [np.stack([getattr(piece, field) for piece in pieces]) for field in pieces[0]._fields[:4]]
tokens_BT, positions_B2T, targets_BT, weights_BT = batch
mask = glmjax.BlankMask.from_context(
    np.array([piece.context for piece in pieces]), length=tokens_BT.shape[1]
)
forward = jax.jit(glmjax.forward, static_argnums=0)


def losses(model):
    """Nats of every predicted token."""
    logits_BTV = forward(*model, tokens_BT, positions_B2T, mask)
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(
        logits_BTV.astype(jnp.float32), targets_BT
    )
    return np.asarray(loss_BT)[weights_BT > 0]


loss_of = {name: losses(model) for name, model in models.items()}
for name, loss in loss_of.items():
    change = loss - loss_of["float16"]
    error = change.std() / np.sqrt(len(change))
    print(f"{name:18} {loss.mean():.4f} nats   {change.mean():+.4f} +- {error:.4f}")

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3))
left.barh(list(bytes_of), [size / 1e6 for size in bytes_of.values()], color="#8fb3de")
left.set(xlabel="MB", title="memory of the weights")
right.barh(
    list(loss_of),
    [(loss - loss_of["float16"]).mean() for loss in loss_of.values()],
    color="#f3b184",
)
right.set(xlabel="nats per token more than float16", title="what it costs")
right.set_yticks([])
left.invert_yaxis()
right.invert_yaxis()
plt.show()

# %% [markdown]
# The staircase behind those numbers: `convert` writes the integers to a folder, `quantize="float"` turns
# them back. Below, the weights of one output of the first block's feed-forward layer, before and after: 15
# levels with 4 bits, 255 with 8.

# %%
fig, ax = plt.subplots(figsize=(7, 3.6))
before = np.asarray(models["float16"][1].blocks.ffn_in.kernel[0], np.float32)
before = before.reshape(before.shape[0], -1)[:, 0]
for kind, style in (("int4", "o"), ("int8", ".")):
    target = Path(f"runs/chatglm-{kind}")
    if not target.exists():
        convert(folder, target, to="hf", quantize=kind)
    _, params = glmjax.load(target, quantize="float")
    after = np.asarray(params.blocks.ffn_in.kernel[0], np.float32)
    after = after.reshape(after.shape[0], -1)[:, 0]
    ax.plot(before, after, style, label=f"{kind}: {len(np.unique(after))} values of {len(after)}")
ax.set(xlabel="weight in float16", ylabel="weight from integers")
ax.legend()
plt.show()

# %% [markdown]
# ## Talking
#
# A conversation is a tuple of rounds. The prompt has the official layout, ending in `[gMASK] sop`;
# `answer` gives the text in pieces while it is drawn (a `·` between them here). On the command line it is
# `glmjax chat --checkpoint FOLDER --quantize int4`.

# %%
config, params = models["int4"]
speaker = Speaker(replace(config, dtype="float32"), params, tokenizer, max_new_tokens=40)
sampling = glmjax.Sampling(temperature=0.95, top_p=0.7, seed=0)  # those of the official demo
rounds = ()
for question in ("What does this function return?", "And if the array is empty?"):
    prompt = make_prompt(speaker, rounds, question)
    said = [piece.text for piece in answer(speaker, prompt, sampling)]
    rounds = (*rounds, Round(question, "".join(said)))
    print(f"question  {question}   ({len(prompt.ids)} tokens with the rounds before)")
    print(textwrap.fill("answer    " + "·".join(said), 95, subsequent_indent=" " * 10), "\n")
print("the last prompt as the model reads it:\n")
print(textwrap.indent(tokenizer.decode(prompt.ids[:-2]), "    "))

# %% [markdown]
# Without the chat: `generate` takes prompts as ids, of any lengths, and draws for all of them at once.

# %%
beginnings = ["Return the", "This method is called when", "If the file does not exist,"]
prompts = [[*tokenizer.encode(text), tokens.gmask, tokens.sop] for text in beginnings]
new_ids = glmjax.generate(*models["int4"], prompts, max_new_tokens=20, sampling=sampling)
for text, ids in zip(beginnings, new_ids, strict=True):
    print(textwrap.fill(f"{text} | {tokenizer.decode(ids)}", 95, subsequent_indent="    "))

# %% [markdown]
# ## Your own training on top
#
# What others trained on ChatGLM-6B opens in the same call:
#
#     glmjax.load(folder, prefix="ptuning/output/checkpoint-3000")    # P-tuning v2 of THUDM/ChatGLM-6B
#     glmjax.load(folder, lora="my-lora", quantize="int4")            # LoRA in the format of PEFT
#
# A prefix is learnt keys and values in front of every layer; LoRA adds a product of two thin matrices to
# a kernel, here of rank 8 to queries, keys and values. So much is trained, of ChatGLM-6B:

# %%
full = glmjax.get_config("chatglm-6b")
base = glmjax.count_params(full)
rank, width = 8, full.hidden_size
trained = {
    "everything": base,
    "prefix of 128, projected": glmjax.count_params(
        replace(full, prefix_length=128, prefix_projection=True)
    )
    - base,
    "prefix of 128": glmjax.count_params(replace(full, prefix_length=128)) - base,
    "LoRA of rank 8": full.num_layers * (rank * width + rank * 3 * width),
}
fig, ax = plt.subplots(figsize=(8, 2.2))
bars = ax.barh(list(trained), list(trained.values()), color="#8fb3de", log=True)
ax.bar_label(bars, [f" {count:,} ({count / base:.2%})" for count in trained.values()])
ax.set(xlabel="parameters", xlim=(1e6, 3e12))
ax.invert_yaxis()
plt.show()
