"""The commands of the walk-through: ours run, and gcloud knows its own."""

import re
import runpy
import shlex
import sys
from string import Template
from types import SimpleNamespace

import pytest
from jobs import DESCRIPTION, FOLDER, described_experiment

from tpu.job import load
from tpu.launch import main

NAMES = {
    "PROJECT": "my-project",
    "REGION": "us-east5",
    "ZONE": "us-east5-a",
    "BUCKET": "b",
    "NUMBER": "1",
}
README = (FOLDER / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
LINES = "".join(BLOCKS).splitlines()
LAUNCHES = [line for line in LINES if line.startswith("python -m tpu.launch")]
# A command may be a whole line, stand in $(...), or be followed by a pipe.
GCLOUD = [
    Template(found[1]).substitute(NAMES)
    for line in LINES
    if (found := re.search(r"(?:^|\$\()(gcloud .*?)(?:\)$| \||$)", line))
]


@pytest.mark.parametrize("line", LAUNCHES)
def test_launches(line, monkeypatch, capsys, tmp_path):
    (tmp_path / "tpu").symlink_to(FOLDER)
    (tmp_path / "smaller.toml").symlink_to(DESCRIPTION)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(re.split(r"[|>]", line)[0])
    assert main(words[3:]) == 0
    assert capsys.readouterr().out


def test_gcloud_knows_its_commands(check_gcloud):
    assert len(GCLOUD) > 20
    check_gcloud(GCLOUD)


def test_prepares_what_the_job_reads(monkeypatch, tmp_path):
    prepared = []
    stand_in = SimpleNamespace(prepare=lambda *settings: prepared.append(settings))
    monkeypatch.setitem(sys.modules, "glmjax.data.prepare", stand_in)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "prepare.py").write_text(code)
    runpy.run_path(str(tmp_path / "prepare.py"))
    experiment = described_experiment(load(DESCRIPTION))
    assert prepared == [(experiment.data, experiment.objective)]
