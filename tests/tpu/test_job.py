"""The description of a job: what it says of a slice, and what it refuses."""

import math
import re

import pytest
from jobs import DESCRIPTION, described_experiment, make_job

from tpu.job import GENERATIONS, load


@pytest.mark.parametrize(
    ("topology", "hosts", "chips_per_host", "slice_type"),
    [
        ("v4:2x2x1", 1, 4, "v4-8"),
        ("v4:8x8x16", 256, 4, "v4-2048"),
        ("v5e:1x1", 1, 1, "v5litepod-1"),
        ("v5e:16x16", 64, 4, "v5litepod-256"),
        ("v5p:2x2x1", 1, 4, "v5p-8"),
        ("v5p:4x4x8", 32, 4, "v5p-256"),
        ("v5p:4x4x12", 48, 4, "v5p-384"),
        ("v5p:8x8x16", 256, 4, "v5p-2048"),
        ("v6e:2x4", 2, 4, "v6e-8"),
        ("v6e:16x16", 64, 4, "v6e-256"),
        ("tpu7x:4x4x4", 16, 4, "tpu7x-128"),
    ],
)
def test_slice(topology, hosts, chips_per_host, slice_type):
    job = make_job(topology)
    assert (job.hosts, job.chips_per_host, job.slice_type()) == (hosts, chips_per_host, slice_type)


def test_slices_agree_with_xpk():
    """XPK knows the labels, machines and hosts of every slice that GKE offers."""
    known = pytest.importorskip("xpk.core.system_characteristics")
    compared = 0
    for name, slice in known.UserFacingNameToSystemCharacteristics.items():
        for generation, names in GENERATIONS.items():
            shape = re.fullmatch(rf"{names.prefix}-(\d+x[\dx]+)", name)
            if shape is None or math.prod(map(int, shape[1].split("x"))) > 16_384:
                continue
            job = make_job(f"{generation}:{shape[1]}")
            assert job.hosts == slice.vms_per_slice
            assert job.chips_per_host == slice.chips_per_vm
            assert f"{names.machine}-{job.chips_per_host}t" == slice.gce_machine_type
            assert names.accelerator == slice.gke_accelerator
            compared += 1
    assert compared > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "GLM_130B"}, "name takes at most 38 lower-case"),
        ({"topology": "v9:4x4x4"}, "no TPU generation 'v9'; known are v4, v5e"),
        ({"topology": "v5p:16x16"}, "a v5p slice has 3 sides, got '16x16'"),
        ({"topology": "v5p:3x3x3"}, "27 chips of v5p:3x3x3 are not whole hosts"),
        ({"num_slices": 0}, "num_slices = 0"),
        ({"topology": "v5p:2x2x1", "num_slices": 2}, "slices that are joined need several"),
        ({"spot": True, "reservation": "mine"}, "spot does not go with reservation = 'mine'"),
        ({"command": ()}, "command is empty"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_job(**{"topology": "v5p:4x4x8", **changes})


def test_unusual_shape_has_no_slice_type():
    with pytest.raises(ValueError, match=r"gives 8x8x16 for 1024 chips, not 4x16x16"):
        make_job("v5p:4x16x16").slice_type()


def test_tpu7x_has_no_runtime():
    with pytest.raises(ValueError, match="the TPU API does not offer tpu7x:4x4x4"):
        make_job("tpu7x:4x4x4").runtime()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_slices", "slices"), "unknown fields: slices"),
        (("bucket =", "# bucket ="), "lacks bucket"),
        (('"glm-130b"', "glm-130b"), "Invalid value"),
    ],
    ids=["unknown", "missing", "not TOML"],
)
def test_bad_file(tmp_path, change, message):
    path = tmp_path / "job.toml"
    path.write_text(DESCRIPTION.read_text().replace(*change, 1))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_command_of_the_description_is_accepted():
    """`glmjax train` takes its flags, and the mesh has as many devices as the slices have chips."""
    job = load(DESCRIPTION)
    experiment = described_experiment(job)
    mesh = experiment.mesh
    assert mesh.data * mesh.fsdp * mesh.tensor == job.chips * job.num_slices
    assert experiment.train.run.startswith("/bucket/")
    assert experiment.train.local_checkpoints.startswith("/local/")
