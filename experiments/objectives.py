"""Does a model trained on two kinds of blanks lose against one trained on either alone?

    glmjax sweep experiments/objectives.py

Changed: the share of rows with [MASK] blanks, a few tokens each; the others have one [gMASK] blank, the
end of the text. mixture is GLM-130B's, 30% [MASK]. All read the same rows of text, and each is
evaluated on held-out rows of both kinds.

Published: GLM paper section 3.2: models that also learn long blanks are slightly below the one with
[MASK] alone on language understanding, and generate far better. GLM-130B section 2.2 trains on both.
"""

from functools import partial

from experiments.classics import SEEDS, base
from glmjax.data.blanks import text_length
from glmjax.sweep.ablation import OBJECTIVE_METRICS, Trend, by_objective, report
from glmjax.sweep.trials import Scale, Sweep, vary

SOURCE = "GLM paper section 3.2: what is trained on alone is learnt slightly better"
METRICS = {name: heading for name, heading in OBJECTIVE_METRICS.items() if name != "heldout_loss"}
TRENDS = (
    Trend("[MASK] only", "mixture", SOURCE, "loss/mask"),
    Trend("mixture", "[MASK] only", "GLM paper section 3.2: long blanks are learnt", "loss/gmask"),
    Trend("mixture", "[gMASK] only", "GLM-130B section 2.2: short blanks are learnt", "loss/mask"),
)


def sweep(scale: Scale) -> Sweep:
    mixture = base(scale)
    variants = {
        "mixture": {},
        "[MASK] only": {"objective.token": 1.0},
        "[gMASK] only": {
            "objective.token": 0.0,
            # Alone these rows would hold more text than rows that leave room for blanks.
            "data.text_length": text_length(mixture.objective, mixture.data.sequence_length),
        },
    }
    trials = vary(mixture, variants, "objective", SEEDS[scale])
    say = partial(report, metrics=METRICS, trends=TRENDS)
    return Sweep("objectives", trials, say, by_objective)
