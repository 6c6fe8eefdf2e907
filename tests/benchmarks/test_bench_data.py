"""The data benchmark measures what it says."""

import random

from glmjax.benchmarks import data as bench
from glmjax.config import DataConfig


def test_every_rate_is_measured_and_printed(tmp_path, capsys):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(300)]
    text = "\n\n".join(" ".join(rng.choices(words, k=40)) for _ in range(400))
    (tmp_path / "text.txt").write_text(text)
    data = DataConfig(path=(str(tmp_path),), cache=str(tmp_path / "cache"), vocab_size=400)
    result = bench.run(data, sequence_length=128, batch_size=4, workers=(0,), seconds=0.02)
    assert (result["sequence_length"], result["batch_size"]) == (128, 4)
    measured = [
        rate
        for mixture in ("glm", "glm-130b")
        for rate in (
            result["mixtures"][mixture]["prepared"]["0"],
            result["mixtures"][mixture]["online"],
        )
    ]
    assert min(rate["tokens_per_second"] for rate in measured) > 0
    assert min(rate["first_batch_seconds"] for rate in measured) > 0

    bench.show(result)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [
        ["glm", "prepared", "0"],
        ["glm", "online", "0"],
        ["glm-130b", "prepared", "0"],
        ["glm-130b", "online", "0"],
    ]
