"""How a process learns which job it belongs to. What it does there is in test_multiprocess.py."""

import os
import socket

import pytest
from jax._src.clusters import cloud_tpu_cluster, cluster

from glmjax.config import DistributedConfig
from glmjax.training.distributed import Job, find_job, joined

SLURM = {
    "SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "node[001-004]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "4",
}  # fmt: skip
ADDRESSES = {
    "JAX_COORDINATOR_ADDRESS": "first:1234", "JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "3",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in (*SLURM, *ADDRESSES, "KUBERNETES_SERVICE_HOST", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)


def test_process_on_its_own_has_no_job():
    assert find_job(DistributedConfig()) is None
    with joined(DistributedConfig()) as job:
        assert job is None


@pytest.mark.parametrize(
    ("flags", "environment", "job"),
    [
        ({"coordinator": "first:1234", "num_processes": 8, "process": 3}, {},
         Job("first:1234", 8, 3, None)),
        ({}, ADDRESSES, Job("first:1234", 8, 3, None)),
        ({"process": 5}, ADDRESSES, Job("first:1234", 8, 5, None)),
        ({}, SLURM, Job("node001:61440", 4, 2, [0])),
        ({"coordinator": "first:1234"}, SLURM, Job("first:1234", 4, 2, [0])),
        ({"num_processes": 1}, SLURM, None),
        ({}, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    ],
    ids=["flags", "environment", "flags-first", "slurm", "slurm-and-flags", "alone-in-slurm",
         "one-task"],
)  # fmt: skip
def test_job_is_found(monkeypatch, flags, environment, job):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_job(DistributedConfig(**flags)) == job


@pytest.mark.parametrize(
    ("slices", "job"),
    [({}, Job("host-0:8482", 2, 1, None)),
     ({"MEGASCALE_COORDINATOR_ADDRESS": "slice-0", "MEGASCALE_NUM_SLICES": "4",
       "MEGASCALE_SLICE_ID": "3"}, Job("slice-0:8482", 8, 7, None))],
    ids=["one-slice", "four-slices"],
)  # fmt: skip
def test_job_is_found_on_tpus_in_gke(monkeypatch, slices, job):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    variables = {
        "TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_HOSTNAMES": "host-0,host-1", "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0",
    }  # fmt: skip
    for name, value in (variables | slices).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value", os.environ.get)
    assert find_job(DistributedConfig()) == job


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 4}, r"needs all of distributed\.coordinator, here None, .* here 4, .*"),
        ({"coordinator": "a:1", "num_processes": 4, "process": 4},
         r"distributed\.process = 4 is not below 4 processes"),
    ],
    ids=["addresses-missing", "no-such-process"],
)  # fmt: skip
def test_half_a_job_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        find_job(DistributedConfig(**flags))


def test_waiting_times_are_positive():
    with pytest.raises(ValueError, match=r"distributed\.heartbeat_seconds must be positive, got 0"):
        DistributedConfig(heartbeat_seconds=0)
