"""Which of the published numbers come out of glmjax?

    python -m experiments.reproduce

regenerates every number of the GLM papers and repositories that needs no training run and no weights,
and prints published, ours, difference, how ours was obtained and the source. It writes
`experiments/results/reproduction.md`, `reproduction.json` and figures. A module here holds the facts
of one topic, each with its source, and how to compute them with glmjax.
"""
