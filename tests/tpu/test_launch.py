"""Every launch file, checked by the tool that it is for wherever that tool runs without a cloud."""

import argparse
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from jobs import DESCRIPTION, FOLDER, make_job

from glmjax.training import distributed
from tpu import launch
from tpu.job import load
from tpu.launch import (
    FORMS,
    jobset,
    main,
    node_pools,
    queued_resources,
    skypilot,
    startup_script,
    xpk,
)

JOBS = {
    "one slice": make_job("v5p:8x8x16", environment={"LIBTPU_INIT_ARGS": "--a=1 --b=2"}),
    "two slices": make_job("v6e:16x16", num_slices=2, spot=True),
    "one host": make_job("v6e:2x2", reservation="mine"),
    "tpu7x": make_job("tpu7x:4x4x4"),
}


@pytest.fixture(params=JOBS)
def job(request):
    return JOBS[request.param]


def commands(script: str) -> list[str]:
    """The commands of a script, each as one line."""
    return [line for line in script.replace("\\\n", "").splitlines() if line.strip()]


def pod_of(manifest: dict) -> dict:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]["spec"]


def test_jobset_has_a_pod_for_every_host(job):
    (replicated,) = yaml.safe_load(jobset(job))["spec"]["replicatedJobs"]
    slice, pod = replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert replicated["replicas"] == job.num_slices
    assert slice["parallelism"] == slice["completions"] == job.hosts
    assert container["resources"]["limits"]["google.com/tpu"] * job.hosts == job.chips
    assert container["args"] == list(job.command)
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        v["name"] for v in pod["volumes"]
    }


def test_jobset_restarts_all_but_mistakes(job):
    spec = yaml.safe_load(jobset(job))["spec"]
    slice = spec["replicatedJobs"][0]["template"]["spec"]
    (on_pod,), (on_job,) = slice["podFailurePolicy"]["rules"], spec["failurePolicy"]["rules"]
    assert slice["backoffLimit"] == 0 and spec["failurePolicy"]["maxRestarts"] == job.max_restarts
    assert on_pod["onExitCodes"]["values"] == [2]
    assert (on_job["action"], on_job["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_statuses_are_those_of_glmjax():
    assert launch.RESTART == distributed.RESTART


def test_jobset_fits_its_schema(job):
    """Parsing drops what the schema lacks, so that nothing may be missing afterwards."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = yaml.safe_load(jobset(job))
    parsed = models.JobsetV1alpha2JobSet.from_dict(manifest)
    assert parsed.to_dict() == manifest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "hostNet"), True),
    ],
    ids=["JobSet", "pod"],
)
def test_schema_notices_a_misspelt_field(path, value):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = yaml.safe_load(jobset(JOBS["one slice"]))
    *parents, name = path
    part = manifest
    for key in parents:
        part = part[key]
    part[name] = value
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() != manifest


def test_xpk_makes_the_same_job(job, tool, tmp_path):
    """XPK takes the command line, and its JobSet agrees with ours."""
    *_, workload = map(shlex.split, commands(xpk(job)))
    assert workload[:3] == ["xpk", "workload", "create"]
    made = tmp_path / "jobset.yaml"
    tool(*workload, "--dry-run", "--skip-validation", f"--output-manifest-file={made}")
    theirs, ours = yaml.safe_load(made.read_text()), yaml.safe_load(jobset(job))
    pod, our_pod = pod_of(theirs), pod_of(ours)
    assert theirs["metadata"]["annotations"] == ours["metadata"]["annotations"]
    assert theirs["spec"]["failurePolicy"]["maxRestarts"] == job.max_restarts
    slice, our_slice = (m["spec"]["replicatedJobs"][0] for m in (theirs, ours))
    assert slice["replicas"] == our_slice["replicas"]
    for name in ("parallelism", "completions", "backoffLimit"):
        assert slice["template"]["spec"][name] == our_slice["template"]["spec"][name]
    for name in ("terminationGracePeriodSeconds", "hostNetwork", "dnsPolicy", "restartPolicy"):
        assert pod[name] == our_pod[name]
    assert our_pod["nodeSelector"].items() <= pod["nodeSelector"].items()
    (container,), (ours_container,) = pod["containers"][:1], our_pod["containers"]
    assert (container["env"] or []) == ours_container["env"]
    assert shlex.join(job.command) in container["command"][-1]
    (rule,) = slice["template"]["spec"]["podFailurePolicy"]["rules"]
    restarted = set(rule["onExitCodes"]["values"])
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert {1, 75, 134, 137, 143} <= restarted and 2 not in restarted


def test_xpk_takes_the_other_commands(job, tool):
    cluster, storage, _ = map(shlex.split, commands(xpk(job)))
    tool(*cluster, "--dry-run", "--skip-validation", "--quiet", stdin=subprocess.DEVNULL)
    parser = argparse.ArgumentParser()
    pytest.importorskip("xpk.parser.core").set_parser(parser)
    assert parser.parse_args(storage[1:]).bucket == job.bucket


def test_gcloud_takes_node_pools(job, check_gcloud):
    script = node_pools(job)
    assert script.count("node-pools create") == job.num_slices
    assert script.count(f"--num-nodes={job.hosts} ") == job.num_slices
    check_gcloud(commands(script))


@pytest.mark.parametrize("name", ["one slice", "two slices", "one host"])
def test_gcloud_takes_queued_resources(name, check_gcloud):
    check_gcloud(commands(queued_resources(JOBS[name])))


def test_gcloud_notices_a_misspelt_flag(check_gcloud):
    script = queued_resources(JOBS["two slices"]).replace("--node-count", "--nodes-count")
    with pytest.raises(AssertionError, match="did you mean '--node-count'"):
        check_gcloud(commands(script))


@pytest.mark.parametrize("spot", [True, False], ids=["spot", "on demand"])
def test_skypilot_reads_its_task(spot, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky")
    job = make_job("v5p:8x8x16", spot=spot, environment={"A": "1"})
    task = sky.Task.from_yaml_config(yaml.safe_load(skypilot(job)))
    (resources,) = task.resources
    assert resources.accelerators == {"tpu-v5p-2048": 1}
    assert (resources.zone, resources.use_spot) == ("us-east5-a", spot)
    assert task.envs["A"] == "1" and list(task.storage_mounts) == ["/bucket"]
    assert shlex.join(job.command) in task.run


@pytest.mark.parametrize(
    ("make", "job", "message"),
    [
        (skypilot, JOBS["two slices"], "SkyPilot takes one TPU slice, got num_slices = 2"),
        (skypilot, JOBS["one host"], "leave reservation = 'mine' out"),
        (skypilot, JOBS["tpu7x"], "the TPU API does not offer tpu7x:4x4x4"),
        (queued_resources, JOBS["tpu7x"], "the TPU API does not offer tpu7x:4x4x4"),
    ],
    ids=["slices", "reservation", "skypilot tpu7x", "queued tpu7x"],
)
def test_refuses_what_a_launcher_cannot_do(make, job, message):
    with pytest.raises(ValueError, match=message):
        make(job)


def run_with_fakes(folder: Path, script: str, statuses: Sequence[int], *arguments: str):
    """Runs a script where every program is a fake: `trainer` ends with one status after another.

    Returns the exit status and the names and arguments of the programs that were run.
    """
    fakes, log = folder / "bin", folder / "log"
    fakes.mkdir()
    (folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    fake = f'#!{shutil.which("bash")}\necho "${{0##*/}} $*" >> {log}\n'
    for name in ("gcsfuse", "gcloud", "docker", "srun", "scontrol", "sleep", "mkdir", "mountpoint"):
        (fakes / name).write_text(fake)
    for name in ("docker", "srun"):
        status = (
            f"read -r status < {folder}/statuses; {shutil.which('sed')} -i 1d {folder}/statuses\n"
        )
        (fakes / name).write_text(fake + status + 'exit "$status"\n')
    (fakes / "mountpoint").write_text(fake + "exit 1\n")
    (fakes / "seq").symlink_to(shutil.which("seq"))
    for path in fakes.iterdir():
        if not path.is_symlink():
            path.chmod(0o755)
    path = folder / "script.sh"
    path.write_text(script)
    result = subprocess.run(
        [shutil.which("bash"), path, *arguments],
        env={"PATH": str(fakes), "SLURM_JOB_ID": "17"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not result.stderr
    return result.returncode, log.read_text().splitlines()


@pytest.mark.parametrize(
    ("statuses", "status", "runs"),
    [
        ((0,), 0, 1),
        ((75, 1, 137, 0), 0, 4),
        ((75, 2), 2, 2),
        ((75, 75, 75, 75), 75, 4),
    ],
    ids=["finished", "restarted", "mistake", "given up"],
)
def test_startup_script_keeps_the_job_running(tmp_path, statuses, status, runs):
    job = make_job("v5p:4x4x8", max_restarts=3)
    returned, ran = run_with_fakes(tmp_path, startup_script(job), statuses)
    assert returned == status
    docker = [line for line in ran if line.startswith("docker")]
    assert len(docker) == runs and all(line.endswith(shlex.join(job.command)) for line in docker)
    mounted = next(i for i, line in enumerate(ran) if line.startswith("gcsfuse"))
    assert ran[mounted].endswith("my-bucket /bucket") and mounted < ran.index(docker[0])


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, False), (2, False), (1, True), (75, True), (137, True)]
)
def test_slurm_requeues_all_but_mistakes(tmp_path, status, requeued):
    script = (FOLDER / "slurm.sh").read_text()
    returned, ran = run_with_fakes(tmp_path, script, [status], "glmjax", "train", "a b")
    assert ran[0] == "srun --kill-on-bad-exit=1 glmjax train a b"
    assert ran[1:] == (["scontrol requeue 17"] if requeued else [])
    assert returned == (0 if requeued else status)


@pytest.mark.parametrize("script", ["startup", "slurm"])
def test_shellcheck_finds_nothing(script, tool):
    text = startup_script(JOBS["one slice"])
    if script == "slurm":
        text = (FOLDER / "slurm.sh").read_text()
    assert not tool("shellcheck", "-", input=text)


def test_hadolint_finds_nothing(tool):
    assert not tool("hadolint", str(FOLDER / "Dockerfile"))


@pytest.mark.parametrize("form", FORMS)
def test_prints_every_form(form, capsys):
    assert main([form, str(DESCRIPTION)]) == 0
    assert capsys.readouterr().out == FORMS[form](load(DESCRIPTION))


def test_flags_override_the_description(capsys):
    assert main(["jobset", str(DESCRIPTION), "--num-slices", "4", "--topology", "v5p:4x4x8"]) == 0
    (replicated,) = yaml.safe_load(capsys.readouterr().out)["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 4
    assert replicated["template"]["spec"]["parallelism"] == 32


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["swarm", str(DESCRIPTION)], 2, "launch: there is no form 'swarm'; see --help"),
        (["jobset", "nowhere.toml"], 1, "No such file or directory: 'nowhere.toml'"),
        (["skypilot", str(DESCRIPTION), "--num-slices", "2"], 1, "launch: SkyPilot takes one TPU"),
    ],
    ids=["form", "file", "launcher"],
)
def test_mistakes_are_one_sentence(arguments, status, message, capsys):
    assert main(arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
