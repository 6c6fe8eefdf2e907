import pytest

from glmjax.benchmarks import pods


def record(rows, compute, synchronous, asynchronous, seconds, peak, **more):
    return {
        "mesh": {"data": 1, "fsdp": 16, "tensor": 8}, "devices": 128, "rows": rows, "length": 2048,
        "remat": "full", "memory": {"peak": peak * 2**30}, "hardware_flops": 5.0,
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
