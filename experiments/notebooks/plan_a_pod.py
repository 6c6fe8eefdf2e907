# %% [markdown]
# # Plan a pod
#
# Before a slice of TPUs is rented: does GLM-130B fit on it, how fast will it be, and what if? The compiler
# for TPUs runs on any CPU machine, so the real training step can be compiled for 1,024 chips that are not
# there. **Nothing here runs on a TPU**: memory and FLOPs are facts about the compiled program, times are
# estimates, and the last picture says how far off such estimates were.
#
# It needs `pip install "glmjax[plan]"` (the extra brings libtpu, the compiler) and three minutes.

# %%
import json
import os
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")  # libtpu belongs to the process that compiles

import matplotlib.pyplot as plt
import numpy as np

import glmjax
from glmjax.cli.experiments import load_experiment
from glmjax.config import replace
from glmjax.planning.arrange import arrange, batch_shards
from glmjax.planning.calibration import PAIRS, statement
from glmjax.planning.memory import Memory
from glmjax.planning.plan import plan
from glmjax.planning.search import candidates
from glmjax.planning.topologies import Topology

RECIPE = os.environ.get("GLMJAX_NOTEBOOK_RECIPE", "glm_130b.py")  # what is to be trained
SLICE = os.environ.get("GLMJAX_NOTEBOOK_SLICE", "v5p:8x8x16")  # on what
SMALL = os.environ.get("GLMJAX_NOTEBOOK_SMALL", "glm_large.py v5e:4x4")  # compiled to the end

GIB = 2**30
COLORS = ("C3", "C1", "C4", "C0", "C2")
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})
EXPERIMENTS = Path(glmjax.__file__).parents[1] / "experiments"


def read(recipe):
    return replace(load_experiment(EXPERIMENTS / recipe), **{"data.cache": "runs/cache"})


# %% [markdown]
# ## A rough idea of everything
#
# Before anything is compiled: all meshes, microbatches and remat policies that divide the model and its
# batch, with a rough model of their memory and time. A dot is one way to run the same step; what the
# rough model of memory excludes is left out already.

# %%
experiment, topology = read(RECIPE), Topology(SLICE)
chip = topology.generation
ways = candidates(experiment, topology)
print(f"{experiment.model.name}: {glmjax.count_params(experiment.model):,} parameters")
print(f"{topology}: {topology.num_devices:,} devices of {chip.hbm_bytes / GIB:.2f} GiB")
print(
    f"{len(ways)} ways to run a step of {experiment.train.batch_size:,} rows; by the rough model first:"
)
for way in ways[:3]:
    print(f"  {way}: {way.seconds:.1f} s, {way.bytes / GIB:.0f} GiB")

fig, ax = plt.subplots(figsize=(8, 4.2))
for remat, color in zip(("none", "matmuls", "attention", "ffn", "block"), COLORS, strict=True):
    dots = [way for way in ways if way.remat == remat]
    size = [10 + 6 * way.rows for way in dots]
    x, y = [way.bytes / GIB for way in dots], [way.seconds for way in dots]
    ax.scatter(x, y, size, color, alpha=0.5, label=f"remat {remat}")
ax.axvline(chip.hbm_bytes / GIB, color="k", ls="--")
ax.set(xlabel="GiB on a device, roughly", ylabel="seconds of a step, roughly")
ax.set_title("ways to run a step; larger dots: more rows at a time")
ax.legend()
plt.show()

# %% [markdown]
# ## Does it fit?
#
# Now the real step. `memory_only` stops when XLA has laid out every buffer; what a device *needs* is what
# libtpu compares with the memory that it has. The bars are what is alive at the busiest moment.

# %%
fits = plan(arrange(experiment, topology), topology, memory_only=True)


def verdict(made):
    needed, there = made.memory.needed / GIB, made.hbm_bytes / GIB
    return f"{'fits' if made.fits else 'DOES NOT FIT'}: needs {needed:.1f} of {there:.1f} GiB"


mesh = " x ".join(f"{axis} {size}" for axis, size in fits.mesh.items() if size > 1)
print(f"{fits.model} on {topology}, {mesh}, remat {fits.remat}: {verdict(fits)}")
shared = fits.microbatch_rows // batch_shards(fits.mesh)
print(f"{fits.rows:,} rows in {fits.rows // fits.microbatch_rows} passes, {shared} rows each")

top = fits.memory.contributors[:10]
fig, ax = plt.subplots(figsize=(9, 3.4))
names = [c.name.removeprefix("state.") for c in top]
bars = ax.barh(range(len(top)), [c.bytes / GIB for c in top], color="#8fb3de")
ax.bar_label(bars, [f" {c.count} x {c.shape}" for c in top], fontsize=8)
ax.set_yticks(range(len(top)), names, fontsize=8)
ax.set(xlabel="GiB on each device", title="the largest at the busiest moment")
ax.set_xlim(0, 1.5 * top[0].bytes / GIB)
ax.invert_yaxis()
plt.show()

# %% [markdown]
# ## What if?
#
# The same question with one thing changed. Only memory is asked for, which is the shorter half of a
# compilation; that something does not fit is an answer, not an error. (The
# dots of remat none above take fewer rows at a time.)

# %%
what_ifs = {
    "as it is": {},
    "nothing is computed again (remat none)": {"model.remat": "none"},
}
for name, changes in what_ifs.items():
    made = plan(arrange(replace(experiment, **changes), topology), topology, memory_only=True)
    print(f"{name:40} {verdict(made)}")

# %% [markdown]
# ## How fast?
#
# A complete compilation also gives the schedule: which operations run when, and which communication
# hides behind them. For a large model that takes a minute or two, so here a small one is compiled.

# %%
recipe, name = SMALL.split()
small = plan(arrange(read(recipe), Topology(name)), name)
print(f"{small.model} on {name}: {verdict(small)}")
estimate = small.estimate
print(f"step {estimate.seconds:.3f} s, model FLOPs utilisation {estimate.utilisation:.1%}")
print(f"{estimate.tokens_per_second_per_chip:,.0f} tokens per second and chip")
print(f"Estimated, not measured: {small.calibration}.")

fig, ax = plt.subplots(figsize=(8, 1.6))
left = 0.0
for label, seconds, color in (
    ("computation", estimate.compute_seconds, "#8fb3de"),
    ("communication beside nothing", estimate.synchronous_seconds, "#e07b7b"),
    ("waiting for communication", estimate.waiting_seconds, "#f3b184"),
):
    ax.barh(0, seconds, left=left, color=color, label=f"{label} {seconds:.3f} s")
    left += seconds
ax.set(xlabel="seconds of a step, estimated", yticks=[])
ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.5), ncols=3, fontsize=9)
plt.show()

# %% [markdown]
# ## Whole pods
#
# The same for GLM-130B on six slices was compiled once; `glmjax bench pods` wrote the results to
# `experiments/results/pods.json` (`glmjax plan experiments/glm_130b.py --topology v5p:8x8x16` makes one
# of them). Days are for 400 billion tokens without interruption. The original took 59 days on 768 A100s.

# %%
committed = json.loads((EXPERIMENTS / "results" / "pods.json").read_text())
pods = committed["pods"]
print(f"compiled on {committed['date']}")
print("slice         chips  needs GiB    of   step s    MFU   days  chip-hours")
for pod in pods:
    needed, estimate = Memory(**pod["memory"]).needed, pod["estimate"]
    print(
        f"{pod['topology']:12}  {pod['chips']:>5}  {needed / GIB:>9.1f}  {pod['hbm_bytes'] / GIB:>4.0f}"
        f"  {estimate['seconds']:>7.1f}  {estimate['utilisation']:>5.1%}  {pod['days']:>5.1f}"
        f"  {pod['chip_hours']:>10,.0f}"
    )

fig, ax = plt.subplots(figsize=(8, 4))
for pod in pods:
    spot = pod["chips"], pod["days"]
    ax.plot(*spot, "o", color="C0")
    label = f"{pod['topology']} ({pod['estimate']['utilisation']:.0%})"
    ax.annotate(label, spot, xytext=(6, 4), textcoords="offset points", fontsize=9)
ax.axhline(59, color="gray", ls="--", label="768 A100, as it happened")
ax.set(xscale="log", yscale="log", xlabel="chips", ylabel="days")
ax.set(xlim=(100, 2500), ylim=(9, 400))
ax.set_xticks([128, 256, 512, 1024], [128, 256, 512, "1,024"], minor=False)
ax.set_xticks([], minor=True)
ax.set_yticks([10, 20, 50, 100, 200], [10, 20, 50, 100, 200])
ax.set_title("GLM-130B, 400 billion tokens: estimated days (utilisation)")
ax.legend()
plt.show()

# %% [markdown]
# ## How far to trust it
#
# Runs whose authors published what they measured, next to our estimate of the same program. Below the
# line the run was slower than estimated.

# %%
fig, ax = plt.subplots(figsize=(5.2, 4.6))
families = list(dict.fromkeys(pair.topology.partition(":")[0] for pair in PAIRS))
for family in families:
    pairs = [pair for pair in PAIRS if pair.topology.startswith(family)]
    ax.plot(
        [pair.estimated for pair in pairs], [pair.measured for pair in pairs], "o", label=family
    )
both = np.array([pair.estimated for pair in PAIRS] + [pair.measured for pair in PAIRS])
ends = [both.min() * 0.9, both.max() * 1.1]
ax.loglog(ends, ends, "--", color="gray")
for set_ticks in (ax.set_xticks, ax.set_yticks):
    set_ticks([200, 500, 1000], [200, 500, 1000])
    set_ticks([], minor=True)
ax.set(xlabel="estimated", ylabel="measured", title="published runs, tokens/s of a device")
ax.legend()
plt.show()
for family in families:
    print(f"{family}: {statement(family)}.")

# %% [markdown]
# `glmjax plan --help` asks all of this on the command line, `--search` compiles the best of the dots
# above, and `docs/planning.md` says what each number means.
