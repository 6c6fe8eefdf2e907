"""The search, with plans made up instead of compiled."""

from itertools import pairwise
from typing import get_args

import pytest
from plans import make_experiment, make_plan

from glmjax.config import Remat, replace
from glmjax.planning.arrange import batch_shards
from glmjax.planning.search import ROWS, candidates, search
from glmjax.planning.topologies import Topology
from glmjax.sharding import mesh_sizes

TOPOLOGY = Topology("v5p:2x2x1")


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(batch_size=64)


@pytest.fixture(scope="module")
def ordered(experiment):
    return candidates(experiment, TOPOLOGY)


def test_candidates_are_all_that_can_be_split(experiment, ordered):
    assert {c.remat for c in ordered} == set(get_args(Remat))
    assert {c.mesh["tensor"] for c in ordered} == {1, 2, 4}
    assert {c.mesh["data"] for c in ordered} == {1, 2, 4}
    for candidate in ordered:
        changed = candidate.experiment
        assert mesh_sizes(changed.mesh, 4) == candidate.mesh
        assert changed.train.microbatch_size == candidate.rows * batch_shards(candidate.mesh)
        assert changed.train.batch_size == 64
        assert candidate.rows in ROWS
    assert all(a.seconds <= b.seconds for a, b in pairwise(ordered))


def test_rough_models_know_the_direction(ordered):
    """Recomputing takes time and saves memory; larger microbatches the other way round."""
    by = {(tuple(c.mesh.values()), c.rows, c.remat): c for c in ordered}
    mesh = (1, 4, 1, 1)
    none, block = by[mesh, 2, "none"], by[mesh, 2, "block"]
    assert none.seconds < block.seconds and none.bytes > block.bytes
    assert by[mesh, 4, "block"].seconds < block.seconds
    assert by[mesh, 4, "block"].bytes > block.bytes


def test_every_slice_has_replicas(experiment):
    for candidate in candidates(experiment, Topology("v5e:2x2", 2)):
        assert candidate.mesh["data"] % 2 == 0


class Compiler:
    """Makes plans by a rule for memory and for time, and writes down what it was asked."""

    def __init__(self, needed, seconds):
        self.needed, self.seconds, self.quick, self.whole = needed, seconds, [], []

    def __call__(self, experiment, topology, memory_only=False):
        (self.quick if memory_only else self.whole).append(experiment)
        seconds = None if memory_only else self.seconds(experiment)
        needed = self.needed(experiment)
        return make_plan(needed, seconds if needed <= 95 else None)


def rows(experiment):
    return experiment.train.microbatch_size


def test_the_fastest_that_fits_wins(experiment):
    """Not the one that the rough model puts first."""
    order = {"none": 3.0, "block": 1.0}
    compiler = Compiler(lambda e: 10.0, lambda e: order.get(e.model.remat, 2.0))
    found = search(experiment, TOPOLOGY, most=9, make_plan=compiler)
    times = [f.plan.estimate.seconds for f in found]
    assert times == sorted(times) and times[0] == 1.0
    assert found[0].experiment.model.remat == "block"
    assert len(compiler.whole) == 9


def test_what_does_not_fit_is_not_compiled_to_the_end(experiment):
    compiler = Compiler(lambda e: 200.0 if e.model.remat == "none" else 50.0, lambda e: 1.0)
    lines = []
    found = search(experiment, TOPOLOGY, most=2, make_plan=compiler, report=lines.append)
    assert [e.model.remat == "none" for e in compiler.whole] == [False, False]
    assert all(f.plan.fits for f in found)
    assert sum("too much" in line for line in lines) == len(compiler.quick) - 2


def test_what_did_not_fit_rules_out_more_rows(experiment):
    """With temporaries far beyond the memory nothing of that mesh and policy is asked twice."""
    compiler = Compiler(lambda e: 95.0 * rows(e), lambda e: 1.0)
    with pytest.raises(RuntimeError, match=r"of \d+ candidates none fits v5p:2x2x1"):
        search(experiment, TOPOLOGY, make_plan=compiler)
    asked = [(e.mesh, e.model.remat) for e in compiler.quick]
    assert len(asked) < len(candidates(experiment, TOPOLOGY))
    for mesh, remat in set(asked):
        sizes = [rows(e) for e in compiler.quick if (e.mesh, e.model.remat) == (mesh, remat)]
        assert sizes == sorted(sizes, reverse=True)


def test_what_the_compiler_cannot_do_is_passed_over(experiment):
    lines = []

    def compiler(experiment, topology, memory_only=False):
        if experiment.mesh.tensor > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: vmem")
        return make_plan(seconds=None if memory_only else 1.0)

    found = search(experiment, TOPOLOGY, most=1, make_plan=compiler, report=lines.append)
    assert found[0].experiment.mesh.tensor == 1
    assert any("vmem" in line for line in lines) or len(lines) == 3


def test_plans_of_a_published_size_take_no_compiling():
    experiment = replace(make_experiment(batch_size=4224), **{"model.num_layers": 70})
    assert len(candidates(experiment, Topology("v5p:8x8x16"))) > 50
