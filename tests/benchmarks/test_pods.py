import pytest

from glmjax.benchmarks import pods


def record(rows, compute, synchronous, asynchronous, seconds, peak, **more):
    return {
        "mesh": {"data": 1, "fsdp": 16, "tensor": 8}, "devices": 128, "rows": rows, "length": 2048,
        "remat": "full", "hardware_flops": 5.0,
        "memory": {"peak": peak * 2**30, "arguments": (peak - 9) * 2**30, "temporaries": 9 * 2**30},
        "model_flops": 4.0,
        "estimate": {
            "seconds": seconds, "compute_seconds": compute, "synchronous_seconds": synchronous,
            "asynchronous_seconds": asynchronous, "waiting_seconds": 0.25, "utilisation": 0.4,
            "tokens_per_second_per_chip": 300.0,
        },
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("asynchronous", "exposed"), [(1.0, 0.5), (8.0, 0.25)], ids=["hidden", "longer than the rest"]
)
def test_utilisations_with_more_and_more_of_the_communication(asynchronous, exposed):
    row = record(128, 3.0, 1.0, asynchronous, 5.0, 20)
    assert pods.utilisations(row) == pytest.approx((0.4 * 5 / 3, exposed, 0.4))


def test_our_time_is_compared_for_equal_tokens():
    peer = record(128, 4.0, 1.0, 0.0, 5.0, 20, name="a")
    ours = record(256, 6.0, 0.0, 0.0, 6.0, 15)
    header, rule, theirs, mine = pods.table([(peer, [ours])]).splitlines()
    assert header.count("|") == rule.count("|") == theirs.count("|") == mine.count("|")
    assert theirs.startswith("| MaxText a | fsdp16 x tensor8 | 1, full | 20.0 | 1.25 | 4.00 |")
    assert mine.startswith(
        "| glmjax | fsdp16 x tensor8 | 2, full | 15.0 (0.75x) | 1.25 | 6.00 (0.75x) | 0.00 |"
    )


def test_what_does_not_fit_says_so():
    peer = record(128, 4.0, 1.0, 0.0, 5.0, 20, name="a")
    ours = record(256, 0.0, 0.0, 0.0, 0.0, 97, estimate=None, hbm_bytes=95 * 2**30)
    header, _, _, mine = pods.table([(peer, [ours])]).splitlines()
    assert "| 2, full | does not fit: needs 97.0 of 95.0 GiB |" in mine
    assert mine.count("|") == header.count("|")


def test_document_and_plot_hold_every_run(tmp_path):
    peer = record(128, 4.0, 1.0, 0.0, 5.0, 20, name="theirs")
    plan = record(
        256, 6.0, 0.5, 1.0, 7.0, 15, topology="v5p:4x4x8", chips=128, microbatch_rows=64,
        hbm_bytes=95 * 2**30, days=9.5, versions={"jax": "1.2"}, peer="theirs",
        communication=[{"bytes": 3e9}, {"bytes": 4e9}],
    )  # fmt: skip
    plan["estimate"]["compute_utilisation"] = 0.5
    results = {"date": "2026-01-01", "pods": [plan], "compared": [plan], "scaling": [plan]}
    text = pods.document(results, {"runs": [peer]})
    assert "| v5p:4x4x8 | 128 | fsdp16 x tensor8 | 4 x 64, full | 15.0 of 95.0 | 1.25 |" in text
    assert "| MaxText theirs |" in text
    assert "| 128 | fsdp16 x tensor8 | 6.00 | 15.0 | 15.0 | 7 | 6.00 | 0.75 | 40.0% |" in text
    pods.plot_scaling([plan], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
