"""Tools that check the launch files; a test whose tool is not installed is left out."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Runs a program that is beside Python or on the machine; returns what it prints."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setenv("CLOUDSDK_CORE_DISABLE_USAGE_REPORTING", "true")

    def run(name: str, *arguments: str, **options) -> str:
        program = shutil.which(name, path=TOOLS)
        if program is None:
            pytest.skip(f"{name} is not installed")
        result = subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=False, **options
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


@pytest.fixture
def check_gcloud(tool, tmp_path):
    """Has gcloud check commands, without running them."""

    def check(lines: list[str]) -> None:
        file = tmp_path / "commands.json"
        asked = [{"command_string": shlex.join(shlex.split(line))} for line in set(lines)]
        file.write_text(json.dumps(asked))
        answers = json.loads(
            tool("gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}")
        )
        assert len(answers) == len(asked)
        for answer in answers:
            assert answer["success"], f"{answer['command_string']}: {answer['error_message']}"

    return check
