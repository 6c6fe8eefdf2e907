# %% [markdown]
# # An ablation from idea to plot
#
# One thing is changed, everything else stays; several seeds say how much of a difference is chance. This
# notebook goes all the way: the idea, what to measure, the runs, the plot, and a sentence that one may
# write down.
#
# It needs `pip install "glmjax[train]"`, two CPU cores and three minutes.

# %%
import os
import textwrap
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.utils.capture import capture_output

import glmjax
from glmjax.config import (
    DataConfig,
    Experiment,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    replace,
)
from glmjax.data.pipeline import make_heldout_dataset
from glmjax.data.prepare import prepare
from glmjax.sweep.ablation import Trend, difference, values_of, verdict
from glmjax.sweep.execute import train_trial
from glmjax.sweep.results import collect
from glmjax.sweep.trials import Sweep, vary
from glmjax.training.step import evaluate_step

STEPS = int(os.environ.get("GLMJAX_NOTEBOOK_STEPS", "250"))  # of each run
SEEDS = int(os.environ.get("GLMJAX_NOTEBOOK_SEEDS", "5"))  # runs of each variant

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

# %% [markdown]
# ## The idea
#
# GLM blanks 15% of the tokens, as BERT did. Only blanked tokens are learnt from, and a row costs the same
# whatever its blanks. So a short training might gain from blanking more: more targets for the same
# compute, from less context each. `experiments/quickstart.py` does so, with 30%. **Question: at equal
# steps, does a model that was trained with 30% blanks fill ordinary blanks (15%) better?**
#
# ## The base and its variants
#
# The base is a whole experiment: a GLM with ChatGLM's rotary positions, small enough for ten runs on a
# laptop, on the documentation that every machine has. `text_length` is fixed, because rows would
# otherwise leave more room for more blanks and the variants would read different texts. The runs compute
# the same program; `compilation_cache` keeps it for the next.

# %%
base = Experiment(
    model=glmjax.get_config(
        "glm-tiny",
        name="ablation",
        hidden_size=128,
        num_heads=2,
        ffn_size=512,
        vocab_size=1024,
        positions="rope_2d",
        embedding_dropout=0.0,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    ),
    data=DataConfig(vocab_size=1024, sequence_length=128, text_length=80, cache="runs/cache"),
    optimizer=OptimizerConfig(
        learning_rate=3e-3, warmup=STEPS // 10, decay=STEPS, floor_ratio=0.1, beta2=0.95
    ),
    train=TrainConfig(
        steps=STEPS,
        batch_size=8,
        log_every=max(1, STEPS // 10),
        evaluate_every=STEPS,
        evaluate_batches=32,
        checkpoint_every=STEPS,
        compilation_cache="runs/compiled",
    ),
)
variants = {f"{share:.0%}": {"objective.mask_ratio": share} for share in (0.15, 0.3)}
trials = vary(base, variants, "blanked", SEEDS)
print(f"{glmjax.count_params(base.model):,} parameters, {STEPS} steps of 8 rows")
for trial in trials:
    print(trial.name)

# %% [markdown]
# ## What to measure
#
# Every run reports a held-out loss of its own objective: with 30% of the tokens gone that is another
# question, so those numbers do not compare. Both variants have to answer the **same** question: the same
# held-out rows with the same 15% blanks, drawn with a fixed seed.

# %%
ordinary = replace(base, objective=ObjectiveConfig(mask_ratio=0.15))
corpora = prepare(ordinary.data, ordinary.objective)
heldout = [
    jax.tree.map(lambda x: x[None], batch) for batch in make_heldout_dataset(ordinary, corpora)
]
targets = int(sum(batch.weights_BT.sum() for batch in heldout))
print(f"{targets:,} blanked tokens in {len(heldout)} held-out batches")


def measure(run):
    """Nats per token on the ordinary blanks."""
    config, params = glmjax.load(run)
    sums = [evaluate_step(config, params, batch) for batch in heldout]
    losses, weights = np.sum(jax.device_get(sums), axis=0)
    return {"ordinary_loss": float(losses.sum() / weights.sum())}


# %% [markdown]
# ## The runs
#
# A `Sweep` is its trials and what is measured on each. A trial that is done is not trained again: run
# this cell twice, or add a seed. (`glmjax sweep FILE` runs one from a file, several runs at a time.)

# %%
sweep = Sweep("blanked", trials, report=lambda results, folder: "", evaluate=measure)
root = Path("runs/blanked")
for trial in trials:
    with capture_output():
        train_trial(sweep, trial, root, "ablation.ipynb")
results = collect(sweep, root)
for result in results:
    ordinary_loss = result.numbers["ordinary_loss"]
    print(f"{result.trial:20} own objective {result.heldout_loss:.4f}, ", end="")
    print(f"ordinary blanks {ordinary_loss:.4f}")

# %% [markdown]
# ## The plot
#
# A dot for each run, the runs of one seed joined. A seed fixes initial values and the order of the rows
# for both variants, so differences seed by seed, on the right, have less noise than two means.

# %%
loss = {name: values_of(results, name, "ordinary_loss") for name in variants}
found = difference(loss["30%"], loss["15%"])

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1))
for seed in range(SEEDS):
    left.plot(list(loss), [loss[name][seed] for name in loss], "o-", color="C0", alpha=0.4)
    right.plot(0, loss["30%"][seed] - loss["15%"][seed], "o", color="C0", alpha=0.6)
left.plot(list(loss), [np.mean(list(loss[name].values())) for name in loss], "k_-", label="mean")
left.set(xlabel="blanked in training", ylabel="nats per ordinary blanked token", xlim=(-0.5, 1.5))
left.set_title("held-out loss")
left.legend()
right.errorbar(0.1, found.mean, [[found.mean - found.low], [found.high - found.mean]], fmt="k_")
right.axhline(0, color="gray", ls="--")
right.set(xticks=[], xlim=(-0.3, 0.4), ylabel="nats", title="30% minus 15%, with 95% interval")
plt.show()

# %% [markdown]
# ## The sentence
#
# Mean and standard deviation over seeds; then what `glmjax.sweep.ablation` says of the expectation: it
# *shows* only if the 95% interval of the paired difference (Student's t) lies on its side of zero.

# %%
for name, of_seed in loss.items():
    values = list(of_seed.values())
    print(
        f"{name}: {np.mean(values):.4f}, spread {np.std(values, ddof=1):.4f}, {len(values)} seeds"
    )
expected = Trend("30%", "15%", "more targets for the same compute", "ordinary_loss")
judged = verdict(results, expected, {"ordinary_loss": "loss on ordinary blanks"})
print()
print(textwrap.fill(judged.sentence, 95))

# %% [markdown]
# That is a statement about **a model of this size after so few steps**, where targets are scarce. It says
# nothing about long trainings, in which every text is seen often enough and the context that blanks take
# away may matter more. More steps, more seeds or another idea are one line each above; the larger
# ablations of this project and what came out are in `experiments/`.
