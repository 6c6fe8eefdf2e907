"""Prints the launch files of a training job on Cloud TPUs, all made from one description.

`python -m tpu.launch FORM tpu/glm_130b.toml` prints one of the FORMS for the `Job` in that file;
flags override its fields, as in `glmjax train`. It starts nothing: read what it prints, then pipe it
to `bash`, to `kubectl apply -f -` or into a file. `tpu/README.md` is the walk-through.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from tpu.job import Job, load

BUCKET_MOUNT, LOCAL_MOUNT = "/bucket", "/local"
# A folder that Container-Optimized OS keeps while the node lives; an emptyDir goes with its pod.
NODE_FOLDER = "/mnt/stateful_partition/glmjax"
# All hosts write into the run folder, so none may trust what it knew of a file before.
FRESH_METADATA = {"metadata-cache:ttl-secs": 0, "metadata-cache:negative-ttl-secs": 0}
# Exit statuses of `glmjax train`, besides 0.
MISTAKE = 2  # in the command line, which stays wrong
RESTART = 75  # another process was lost, or the step that SIGTERM interrupted is saved
FAILURE = 1  # anything else, which may pass


def node_pools(job: Job) -> str:
    """Commands for gcloud that make a GKE cluster and one node pool for each slice."""
    location = [f"--project={job.project}", f"--region={job.region}"]
    commands = [
        _shell(
            f"gcloud container clusters create {job.cluster}", *location,
            f"--node-locations={job.zone}",
            "--release-channel=rapid",
            "--machine-type=e2-standard-8",
            "--num-nodes=2",
            f"--workload-pool={job.project}.svc.id.goog",
            "--addons=GcsFuseCsiDriver",
        )
    ]  # fmt: skip
    placement = [f"--tpu-topology={job.shape}"]
    if job.hosts > 1:
        placement.append("--placement-type=COMPACT")
    if job.hosts > 1 and job.topology.startswith("tpu7x"):
        placement = [f"--placement-policy={job.name}"]
        commands.append(
            _shell(
                f"gcloud compute resource-policies create workload-policy {job.name}", *location,
                "--type=HIGH_THROUGHPUT",
                f"--accelerator-topology={job.shape}",
            )
        )  # fmt: skip
    capacity = ["--spot"] if job.spot else []
    if job.reservation:
        capacity = ["--reservation-affinity=specific", f"--reservation={job.reservation}"]
    for index in range(job.num_slices):
        commands.append(
            _shell(
                f"gcloud container node-pools create {job.name}-{index}", *location,
                f"--cluster={job.cluster}",
                f"--node-locations={job.zone}",
                f"--machine-type={job.generation.machine}-{job.chips_per_host}t",
                f"--num-nodes={job.hosts}",
                *placement, *capacity,
                "--workload-metadata=GKE_METADATA",
                "--scopes=cloud-platform",
                "--enable-gvnic",
                # Each node takes addresses for so many pods from the cluster's range.
                "--max-pods-per-node=15",
            )
        )  # fmt: skip
    return "\n".join(commands)


def jobset(job: Job) -> str:
    """A JobSet for GKE: one child job per slice, one pod per host."""
    template = {
        "parallelism": job.hosts,
        "completions": job.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "glmjax",
                        "operator": "In",
                        "values": [MISTAKE],
                    },
                }
            ]
        },
        "template": _pod(job),
    }
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            # A child job has a node pool, that is a slice, to itself.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            # One pod that fails fails its job at once; then all jobs start again, unless it was a
            # mistake, which podFailurePolicy tells.
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [
                    {
                        "name": "mistake",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": job.num_slices, "template": {"spec": template}}
            ],
        },
    }
    return _yaml(manifest)


def _pod(job: Job) -> dict[str, Any]:
    """The pod of one host: the command, the bucket, a folder on the host."""
    # 0 lifts the limits on the process that mounts the bucket: whole checkpoints pass through it.
    limits = {f"gke-gcsfuse/{what}-limit": "0" for what in ("cpu", "memory", "ephemeral-storage")}
    container = {
        "name": "glmjax",
        "image": job.image,
        # args, not command: the image's init process stays first and passes SIGTERM on.
        "args": list(job.command),
        "env": [{"name": name, "value": value} for name, value in job.environment.items()],
        "securityContext": {"privileged": True},
        "resources": {"limits": {"google.com/tpu": job.chips_per_host}},
        "volumeMounts": [
            {"name": "bucket", "mountPath": BUCKET_MOUNT},
            {"name": "local", "mountPath": LOCAL_MOUNT},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    bucket = {
        "driver": "gcsfuse.csi.storage.gke.io",
        "volumeAttributes": {
            "bucketName": job.bucket,
            "mountOptions": ",".join(f"{name}:{value}" for name, value in FRESH_METADATA.items()),
            # On the host's network a pod has the node's identity unless it asks for its own.
            "hostNetworkPodKSA": "true",
        },
    }
    spec = {
        "serviceAccountName": job.service_account,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        # Between slices the pod network would be a detour.
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": job.generation.accelerator,
            "cloud.google.com/gke-tpu-topology": job.shape,
        },
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists"}],
        "containers": [container],
        "volumes": [
            {"name": "bucket", "csi": bucket},
            {"name": "local", "hostPath": {"path": NODE_FOLDER, "type": "DirectoryOrCreate"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    return {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true", **limits}}, "spec": spec}


def xpk(job: Job) -> str:
    """Commands for XPK that make a GKE cluster, attach the bucket and start the job."""
    where = [f"--cluster={job.cluster}", f"--project={job.project}", f"--zone={job.zone}"]
    slices = [
        f"--tpu-type={job.generation.prefix}-{job.shape}",
        f"--num-slices={job.num_slices}",
    ]
    capacity = "--spot" if job.spot else "--on-demand"
    if job.reservation:
        capacity = f"--reservation={job.reservation}"
    storage = f"{job.name}-bucket"
    return "\n".join([
        _shell(
            "xpk cluster create", *where, *slices, capacity,
            "--enable-workload-identity",
            "--enable-gcsfuse-csi-driver",
        ),
        _shell(
            f"xpk storage attach {storage}", *where,
            "--type=gcsfuse",
            f"--bucket={job.bucket}",
            f"--mount-point={BUCKET_MOUNT}",
            "--mount-options=" + ",".join(f"{key}:{value}" for key, value in FRESH_METADATA.items()),
            "--readonly=false",
            "--auto-mount=false",
            "--size=1",
        ),
        _shell(
            "xpk workload create", *where, *slices,
            f"--workload={job.name}",
            f"--docker-image={job.image}",
            f"--storage={storage}",
            *(f"--env={name}={value}" for name, value in job.environment.items()),
            f"--max-restarts={job.max_restarts}",
            f"--restart-on-exit-codes={FAILURE},{RESTART}",
            f"--termination-grace-period-seconds={job.grace_seconds}",
            f"--command={shlex.join(job.command)}",
        ),
    ])  # fmt: skip


def queued_resources(job: Job) -> str:
    """The gcloud command that queues for TPU VMs, which run startup.sh at every boot."""
    nodes = [f"--node-id={job.name}"]
    if job.num_slices > 1:
        nodes = [f"--node-count={job.num_slices}", f"--node-prefix={job.name}"]
    return _shell(
        f"gcloud compute tpus queued-resources create {job.name}",
        f"--project={job.project}",
        f"--zone={job.zone}",
        f"--accelerator-type={job.slice_type()}",
        f"--runtime-version={job.runtime()}",
        *nodes,
        *(["--spot"] if job.spot else []),
        *(["--reserved"] if job.reservation else []),
        f"--service-account={job.service_account}@{job.project}.iam.gserviceaccount.com",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        "--metadata-from-file=startup-script=startup.sh",
    )  # fmt: skip


def startup_script(job: Job) -> str:
    """The script startup.sh, with which a TPU VM mounts the bucket and keeps the job running."""
    docker = _shell(
        "docker run --rm --name=glmjax --privileged --network=host --ipc=host",
        f"--stop-timeout={job.grace_seconds}",
        f"--volume={BUCKET_MOUNT}:{BUCKET_MOUNT}",
        f"--volume=/var/glmjax:{LOCAL_MOUNT}",
        *(f"--env={name}={value}" for name, value in job.environment.items()),
        job.image,
    ).rstrip()  # fmt: skip
    fresh = [f"--{name.replace(':', '-')}={value}" for name, value in FRESH_METADATA.items()]
    return f"""\
#!/usr/bin/env bash
# Runs as root on every host of {job.name} at every boot: a host that comes back joins again.
set -uo pipefail
export HOME=/root

if ! command -v gcsfuse > /dev/null; then
    packages=https://packages.cloud.google.com/apt
    key=/usr/share/keyrings/cloud.google.asc
    curl --silent --show-error --fail "$packages/doc/apt-key.gpg" > "$key"
    echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release --codename --short) main" \\
        > /etc/apt/sources.list.d/gcsfuse.list
    apt-get update && apt-get install --yes gcsfuse
fi
mkdir -p {BUCKET_MOUNT} /var/glmjax
mountpoint --quiet {BUCKET_MOUNT} || gcsfuse {shlex.join([*fresh, job.bucket, BUCKET_MOUNT])} || exit 1
gcloud auth configure-docker --quiet {shlex.quote(job.image.partition("/")[0])}

# When one host ends, all do; all start again from the newest checkpoint.
for _ in $(seq 0 {job.max_restarts}); do
    {docker.replace(chr(10), chr(10) + "    ")} \\
        {shlex.join(job.command)}
    status=$?
    echo "{job.name} ended with status $status"
    case "$status" in 0 | {MISTAKE}) exit "$status" ;; esac
    sleep 15
done
echo "{job.name} was restarted {job.max_restarts} times and is given up"
exit "$status"
"""


def skypilot(job: Job) -> str:
    """A SkyPilot task for `sky jobs launch`, which finds new capacity after a preemption."""
    if job.num_slices > 1:
        raise ValueError(f"SkyPilot takes one TPU slice, got num_slices = {job.num_slices}")
    if job.reservation:
        raise ValueError(
            f"SkyPilot reads reservations from its configuration (gcp.specific_reservations): "
            f"leave reservation = {job.reservation!r} out"
        )
    # Without a name and a password SkyPilot lets gcloud log in to the registry.
    registry = {
        "SKYPILOT_DOCKER_SERVER": job.image.partition("/")[0],
        "SKYPILOT_DOCKER_USERNAME": "",
        "SKYPILOT_DOCKER_PASSWORD": "",
    }
    task = {
        "name": job.name,
        "resources": {
            "infra": f"gcp/{job.region}/{job.zone}",
            "accelerators": f"tpu-{job.slice_type()}",
            "accelerator_args": {"runtime_version": job.runtime()},
            "image_id": f"docker:{job.image}",
            "use_spot": job.spot,
            "job_recovery": {
                "max_restarts_on_errors": job.max_restarts,
                "recover_on_exit_codes": [RESTART],
            },
        },
        "envs": {**registry, **job.environment},
        "file_mounts": {BUCKET_MOUNT: {"source": f"gs://{job.bucket}", "mode": "MOUNT"}},
        "run": f"cd /opt/glmjax && exec {shlex.join(job.command)}",
    }
    return _yaml(task)


FORMS: dict[str, Callable[[Job], str]] = {
    "node-pools": node_pools,
    "jobset": jobset,
    "xpk": xpk,
    "queued-resources": queued_resources,
    "startup-script": startup_script,
    "skypilot": skypilot,
}

HELP = f"""usage: python -m tpu.launch FORM [DESCRIPTION.toml] [--FIELD VALUE ...]

Prints, for the training job that a file describes, one FORM:

{chr(10).join(f"  {name:<18}{make.__doc__}" for name, make in FORMS.items())}

examples:
  python -m tpu.launch node-pools tpu/glm_130b.toml | bash
  python -m tpu.launch jobset tpu/glm_130b.toml | kubectl apply -f -
  python -m tpu.launch xpk tpu/glm_130b.toml --zone europe-west4-b --spot
  python -m tpu.launch jobset --help"""


def main(arguments: Sequence[str]) -> int:
    """Prints a form; a mistake of the user's is one sentence on stderr."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    form, *flags = arguments
    if form not in FORMS:
        print(f"launch: there is no form {form!r}; see --help", file=sys.stderr)
        return 2
    try:
        options: dict[str, Any] = {}
        if flags and not flags[0].startswith("-"):
            options["default"] = load(Path(flags.pop(0)))
        job = tyro.cli(Job, args=flags, prog=f"tpu.launch {form} [DESCRIPTION.toml]", **options)
        print(FORMS[form](job), end="")
    except (ValueError, OSError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 1
    return 0


def _shell(program: str, *words: str) -> str:
    """A command with one word per line."""
    return " \\\n    ".join([program, *map(shlex.quote, words)]) + "\n"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=1000)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
