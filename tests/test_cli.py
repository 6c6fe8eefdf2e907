"""The program as a user types it: results, help, and one sentence for every mistake."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import jax
import pytest
import tiny_run
import tiny_vocabularies
from jax.experimental.compilation_cache import compilation_cache

from glmjax import get_config, init, save
from glmjax.cli import COMMANDS
from glmjax.cli.experiments import load_experiment
from glmjax.config import Experiment, replace
from glmjax.data.tokenizers import load_tokenizer
from glmjax.presets import GPT2_TOKENS


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """What the program sets for its whole process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def run(tiny_experiment, tiny_summary) -> str:
    """The folder of a trained run."""
    assert tiny_summary.steps == tiny_experiment.train.steps
    return tiny_experiment.train.run


@pytest.fixture(scope="module")
def experiment_file(tiny_experiment, tmp_path_factory) -> Path:
    return tiny_run.write_experiment(tmp_path_factory.mktemp("cli") / "tiny.py", tiny_experiment)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]], ids=["none", "-h", "--help"])
def test_overview_names_every_command(capsys, arguments):
    status, out, _ = tiny_run.run_main(capsys, *arguments)
    assert status == 0
    assert all(f"\n  {command} " in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("command", "examples"),
    [
        (["train"], ["glmjax train experiments/quickstart.py", "--mesh.fsdp 4 --json"]),
        (["infill"], ["glmjax infill --checkpoint runs/quickstart", "--json < texts.txt"]),
        (["bench"], ["glmjax bench data", "glmjax bench attention --static"]),
    ],
    ids=["train", "infill", "bench"],
)
def test_help_has_examples(capsys, command, examples):
    status, out, _ = tiny_run.run_main(capsys, *command, "--help")
    assert status == 0
    for example in examples:
        assert example in out


def test_help_of_an_experiment_explains_fields_and_shows_its_values(capsys, experiment_file):
    status, out, _ = tiny_run.run_main(capsys, "train", experiment_file, "--help")
    words = " ".join(out.replace("│", " ").split())
    assert status == 0
    assert "--optimizer.clip" in words and "Largest global norm of the gradient." in words
    assert "60" in words[words.rindex("--train.steps") :][:120]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tarin"], "there is no command 'tarin'"),
        (["train"], "name an experiment file"),
        (["train", "nowhere.py"], "there is no experiment file nowhere.py"),
        (["train", "FILE", "--train.stesp", "3"], "--train.stesp"),
        (["train", "FILE", "--train.steps", "many"], "many"),
        (["train", "FILE", "--train.steps", "0"], "train.steps must be positive, got 0"),
        (["train", "FILE", "--train.microbatch-size", "3"], "train.microbatch_size = 3"),
        (["train", "FILE", "--data.path", "nowhere"], "nowhere"),
        (["train", "FILE", "--mesh.fsdp", "3"], "does not fit 8 devices"),
        (["infill", "--checkpoint", "nowhere", "a [MASK]"], "nowhere"),
        (["infill", "--checkpoint", "RUN", "--top-p", "2", "a [MASK]"], "top_p must be in (0, 1]"),
        (["infill", "--checkpoint", "RUN", "--beams", "2", "a [MASK]"], "--beams"),
        (
            ["infill", "--num-beams", "2", "--top-k", "3", "--checkpoint", "RUN", "a [MASK]"],
            "--top-k has no meaning with --num-beams",
        ),
        (
            ["infill", "--length-penalty", "0", "--checkpoint", "RUN", "a [MASK]"],
            "--length-penalty has no meaning without --num-beams",
        ),
        (["bench", "speed"], "speed"),
        (["bench"], "What to measure"),
        (["bench", "attention"], "say what to do with attention: --gpu, --static or --tune"),
        (["bench", "attention", "--gpu"], "needs an NVIDIA GPU, and jax finds only cpu"),
        (["bench", "attention", "--static", "--chips", "v9"], "v9"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_mistakes_are_explained(capsys, run, experiment_file, tmp_path, arguments, sentence):
    paths = {"FILE": str(experiment_file), "RUN": run}
    new_run = ["--train.run", str(tmp_path / "run")] if "FILE" in arguments else []
    status, _, err = tiny_run.run_main(capsys, *(paths.get(a, a) for a in arguments), *new_run)
    assert status in (1, 2)
    assert sentence in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    if status == 1:
        assert len(err.splitlines()) == 1 and err.startswith("glmjax ")
    assert not (tmp_path / "run").exists()


def test_mistake_in_a_process_of_its_own_is_one_line_and_a_status(tmp_path):
    result = tiny_run.glmjax("train", tmp_path / "nowhere.py")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"glmjax train: there is no experiment file {tmp_path}/nowhere.py\n"


def test_infill_prints_each_text_filled(capsys, run):
    texts = ("ka lo [MASK] mir.", "ten [MASK] su [MASK].")
    status, out, err = tiny_run.run_main(
        capsys, "infill", "--checkpoint", run, "--max-new-tokens", 4, *texts
    )
    assert (status, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith("ka lo") and first.endswith(" mir.")
    assert second.startswith("ten") and " su" in second
    assert "MASK" not in out


def test_infill_as_json_from_standard_input(capsys, run, monkeypatch):
    texts = ["ka lo [MASK] mir.", "ten [gMASK]"]
    flags = ("infill", "--checkpoint", run, "--max-new-tokens", 4)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts) + "\n"))
    status, out, _ = tiny_run.run_main(capsys, *flags, "--json")
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == texts
    plain = tiny_run.run_main(capsys, *flags, *texts)[1]
    assert [row["filled"] for row in rows] == plain.splitlines()


def test_infill_draws_by_seed(capsys, run):
    def draw(seed):
        flags = ("--temperature", 1, "--seed", seed, "--max-new-tokens", 8)
        return tiny_run.run_main(capsys, "infill", "--checkpoint", run, *flags, "ka lo [gMASK]")[1]

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_infill_searches_and_forbids(capsys, run):
    def fill(*flags):
        text = "ka lo [gMASK]"
        flags = ("--checkpoint", run, "--max-new-tokens", 8, "--min-new-tokens", 8, *flags)
        return tiny_run.run_main(capsys, "infill", *flags, text)

    status, greedy, _ = fill()
    assert status == 0
    banned = load_tokenizer(run).encode_prompt(greedy.strip())
    assert fill("--ban", *banned)[1] != greedy
    assert fill("--repetition-penalty", 9)[1] != greedy
    assert fill("--num-beams", 2, "--no-repeat-ngram", 1)[0] == 0


def test_infill_from_one_checkpoint_of_a_run(capsys, run):
    text = "ka lo [MASK] mir."
    newest = tiny_run.run_main(capsys, "infill", "--checkpoint", f"{run}/checkpoints/60", text)
    assert newest[0] == 0
    assert newest == tiny_run.run_main(capsys, "infill", "--checkpoint", run, text)


def test_infill_over_several_devices(capsys, run):
    flags = ("infill", "--checkpoint", run, "ka lo [MASK] mir.")
    assert tiny_run.run_main(capsys, *flags, "--tensor", 2) == tiny_run.run_main(capsys, *flags)
    assert jax.sharding.get_mesh().empty
    status, _, err = tiny_run.run_main(capsys, *flags, "--tensor", 9)
    assert (status, err) == (
        1, "glmjax infill: --tensor 9 needs as many devices; there are 8\n"
    )  # fmt: skip


def test_infill_with_integers(capsys, run):
    flags = ("infill", "--checkpoint", run, "--max-new-tokens", 4, "ka lo [MASK] mir.")
    status, out, err = tiny_run.run_main(
        capsys, *flags, "--quantize", "int8", "--quantize-embeddings"
    )
    assert (status, err) == (0, "") and out.startswith("ka lo")
    status, _, err = tiny_run.run_main(capsys, *flags, "--group-size", 32)
    assert status == 1 and "add --quantize int8" in err


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A model with the vocabulary of GPT-2, which lies in the folder `vocabulary` of it."""
    folder = tmp_path_factory.mktemp("official")
    config = get_config("glm-tiny", vocab_size=50304, special_tokens=GPT2_TOKENS)
    save(folder, config, init(config, jax.random.key(0)))
    tiny_vocabularies.write_byte_pairs(folder / "vocabulary", "gpt2")
    return folder


def test_infill_with_an_official_vocabulary(capsys, official, tmp_path):
    flags = ("infill", "--checkpoint", official, "--max-new-tokens", 2, "hello [MASK].")
    status, _, err = tiny_run.run_main(capsys, *flags)
    assert status == 1
    assert err == (
        f"glmjax infill: {official} has no vocab.json or gpt2-vocab.json, the vocabulary of GLM 2B "
        "and 10B; it comes from github.com/THUDM/GLM, folder .pytorch_pretrained_bert\n"
    )
    status, named, err = tiny_run.run_main(capsys, *flags, "--tokenizer", official / "vocabulary")
    assert status == 0, err
    assert named.startswith("hello")
    tiny_vocabularies.write_byte_pairs(official, "gpt2")
    assert tiny_run.run_main(capsys, *flags) == (0, named, "")


@pytest.fixture
def short(tiny_experiment, tmp_path) -> Path:
    """The file of a run of two steps."""
    changes = {"train.run": str(tmp_path / "run"), "train.steps": 2}
    return tiny_run.write_experiment(tmp_path / "short.py", replace(tiny_experiment, **changes))


def test_train_as_json_prints_one_object(capsys, short, tmp_path):
    status, out, _ = tiny_run.run_main(capsys, "train", short, "--json")
    assert status == 0
    assert len(out.splitlines()) == 1
    assert json.loads(out) == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_train_shows_results_and_overrides_fields(capsys, short, tmp_path):
    status, out, err = tiny_run.run_main(capsys, "train", short, "--train.steps", 3)
    assert status == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3
    for words in ("held-out loss", "unigram baseline", "uniform baseline", "149,376", "truth"):
        assert words in out
    assert "step 3/3" in err
    again = tiny_run.run_main(capsys, "train", short, "--train.steps", 3)
    assert again[0] == 0 and "finished at step 3" in again[2]
    assert [line for line in again[1].splitlines() if "held-out loss" in line] == [
        line for line in out.splitlines() if "held-out loss" in line
    ]


def test_load_experiment_returns_what_the_file_makes(experiment_file, tiny_experiment):
    assert load_experiment(experiment_file) == tiny_experiment


def test_quickstart_is_an_experiment():
    quickstart = load_experiment(tiny_run.REPOSITORY / "experiments" / "quickstart.py")
    assert isinstance(quickstart, Experiment)
    assert quickstart.train.run == "runs/quickstart"


@pytest.mark.parametrize(
    ("text", "name"),
    [("x = 1\n", "empty.py"), ("def experiment():\n    return 3\n", "number.py"), ("", "a.txt")],
    ids=["no-function", "no-experiment", "no-python"],
)
def test_files_that_are_no_experiments(tmp_path, text, name):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        load_experiment(tmp_path / name)


def test_another_function_of_an_experiment_file(experiment_file):
    with experiment_file.open("a") as file:
        file.write("\n\ndef longer():\n    return Experiment()\n")
    assert load_experiment(Path(f"{experiment_file}:longer")) == Experiment()
    with pytest.raises(ValueError, match=r"tiny\.py does not define shorter\(\)"):
        load_experiment(Path(f"{experiment_file}:shorter"))


def test_folder_is_no_experiment_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no experiment file"):
        load_experiment(tmp_path)


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_signal_saves_and_says_how_to_go_on(capsys, short, monkeypatch, number, expected):
    def rate_and_signal(experiment, step):
        os.kill(os.getpid(), number)
        return 0.0

    monkeypatch.setattr("glmjax.training.loop.learning_rate", rate_and_signal)
    status, out, err = tiny_run.run_main(capsys, "train", short)
    assert (status, out) == (expected, "")
    assert err.endswith(
        f"stopped by {number.name} and saved at step 1; the same command continues\n"
    )
