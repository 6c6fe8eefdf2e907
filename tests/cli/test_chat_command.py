"""`glmjax chat` as a user meets it: a question from the command line or a pipe, and the terminal."""

import io
import json
import sys

import jax
import pytest
import terminals
import tiny_chat
import tiny_run
from jax.experimental.compilation_cache import compilation_cache

from glmjax import get_config, init, save
from glmjax.cli.terminal import read_rounds
from glmjax.inference.chat import Round


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat.write_model(tmp_path_factory.mktemp("tiny-chatglm"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder that holds the cache of a user."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def settings(monkeypatch, programs):
    """What the program sets for its whole process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(programs))
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_one_question(capsys, model, monkeypatch):
    flags = ("--checkpoint", model, "--max-new-tokens", 8)
    status, answer, err = tiny_run.run_main(capsys, "chat", *flags, "--prompt", "why?")
    assert (status, err) == (0, "")
    assert len(answer.strip()) > 3

    monkeypatch.setattr(sys, "stdin", io.StringIO("why?\n"))
    assert tiny_run.run_main(capsys, "chat", *flags) == (0, answer, "")

    status, out, err = tiny_run.run_main(capsys, "chat", *flags, "--prompt", "why?", "--json")
    assert (status, err) == (0, "")
    record = json.loads(out)
    assert (record["prompt"], record["answer"]) == ("why?", answer.removesuffix("\n"))
    assert (record["tokens"], record["end"]) == (8, "length")
    assert 0 < record["seconds_to_first_token"] <= record["seconds"]

    other = tiny_run.run_main(capsys, "chat", *flags, "--prompt", "why?", "--seed", 1)
    assert other[0] == 0 and other[1] != answer


def test_a_run_folder_continues_texts(capsys, tiny_experiment, tiny_summary):
    assert tiny_summary.steps == tiny_experiment.train.steps
    flags = ("--checkpoint", tiny_experiment.train.run, "--prompt", "ka lo", "--max-new-tokens", 8)
    outs = set()
    for seed in range(3):
        status, out, err = tiny_run.run_main(
            capsys, "chat", *flags, "--temperature", 1, "--seed", seed
        )
        assert (status, err) == (0, "")
        outs.add(out)
    assert len(outs) > 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--checkpoint", "nowhere", "--prompt", "a"], "nowhere"),
        (["--checkpoint", "MODEL", "--prompt", " "], "the question is empty"),
        (["--checkpoint", "MODEL", "--prompt", "a", "--temperature", "-1"], "temperature must be"),
        (["--checkpoint", "MODEL", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must"),
        (["--checkpoint", "MODEL", "--prompt", "word " * 99], "leave room for 80"),
        (["--checkpoint", "MODEL", "--prompt", "a", "--prefix", "nowhere"], "nowhere"),
        (["--checkpoint", "MODEL", "--prompt", "a", "--beams", "2"], "--beams"),
        (["--checkpoint", "SUCCESSOR", "--prompt", "a"], "does not read the vocabularies of ChatGLM2"),
        (["--checkpoint", "BARE", "--prompt", "a"], "has no ice_text.model"),
    ],
    ids=[
        "path", "question", "temperature", "tokens", "long", "prefix", "flag", "successor",
        "vocabulary",
    ],
)  # fmt: skip
def test_mistakes_are_explained(capsys, model, tmp_path, arguments, sentence):
    paths = {"MODEL": str(model)}
    for name, preset in (("SUCCESSOR", "glm-4-tiny"), ("BARE", None)):
        if name in arguments:
            config, params = tiny_chat.make_model(hidden_size=8, ffn_size=8)
            if preset:
                config = get_config(preset)
                params = init(config, jax.random.key(0))
            save(tmp_path / name, config, params)
            paths[name] = str(tmp_path / name)
    status, out, err = tiny_run.run_main(capsys, "chat", *(paths.get(a, a) for a in arguments))
    assert status in (1, 2)
    assert out == ""
    assert sentence in " ".join(err.replace("│", " ").split())
    if status == 1:
        assert err.startswith("glmjax chat: ") and len(err.splitlines()) == 1


def test_without_a_question_and_a_terminal(capsys, model, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda _: True})()
    )
    assert tiny_run.run_main(capsys, "chat", "--checkpoint", model, "--json") == (
        1, "", "glmjax chat: --json needs a --prompt or a question on standard input\n"
    )  # fmt: skip
    assert tiny_run.run_main(capsys, "chat", "--checkpoint", model) == (
        1, "", "glmjax chat: standard output is no terminal; give a --prompt\n"
    )  # fmt: skip


def test_help_has_examples(capsys):
    status, out, _ = tiny_run.run_main(capsys, "chat", "--help")
    assert status == 0
    assert 'glmjax chat --checkpoint chatglm-6b-int4 --prompt "Why is the sky blue?"' in out


@pytest.fixture
def environment(programs, tmp_path):
    return tiny_run.environment(
        devices=1,
        TERM="xterm-256color",
        PROMPT_TOOLKIT_NO_CPR="1",
        XDG_CACHE_HOME=str(programs),
        XDG_STATE_HOME=str(tmp_path / "state"),
    )


def open_chat(model, environment, *flags):
    arguments = ["chat", "--checkpoint", str(model), *flags]
    return terminals.Terminal([sys.executable, "-m", "glmjax", *arguments], environment)


def test_a_conversation_on_a_terminal(model, environment, tmp_path, programs):
    file = tmp_path / "talk.json"
    with open_chat(model, environment, "--max-new-tokens", "24") as terminal:

        def enter(keys):
            terminal.wait_for(">")
            terminal.type(keys)

        # Ctrl-C while the answer is prepared: it ends with its first token, and the chat goes on.
        enter("你好\r")
        terminal.wait_for("preparing programs")
        terminal.type("\x03")
        terminal.wait_for("stopped")
        enter(f"/save {file}\r")
        terminal.wait_for("the conversation is in")
        (stopped,) = read_rounds(file)
        assert stopped.question == "你好" and stopped.answer

        # The whole answer, of the next seed.
        enter("/retry\r")
        terminal.wait_for("cut off after 24 tokens")
        enter("/stats\r")
        shown = terminal.wait_for("at most")
        assert "tokens per second" in shown and "24 new" in shown and "slots filled" in shown
        enter(f"/save {file}\r")
        terminal.wait_for("the conversation is in")
        (whole,) = read_rounds(file)
        assert whole.question == "你好" and len(whole.answer) > len(stopped.answer)

        # Lines, and a first Ctrl-C that forgets what is typed.
        enter("to be forgotten\x03")
        terminal.type("one\\\rtwo\x1b\rthree\r")
        terminal.wait_for("cut off after 24 tokens")
        enter("/help\r")
        terminal.wait_for("/stats")
        enter("/what\r")
        terminal.wait_for("there is no command /what")
        enter(f"/save {file}\r")
        terminal.wait_for("the conversation is in")
        assert [round.question for round in read_rounds(file)] == ["你好", "one\ntwo\nthree"]

        enter("/clear\r")
        terminal.wait_for("anew")
        enter("/retry\r")
        terminal.wait_for("there is no question yet")
        enter(f"/load {file}\r")
        terminal.wait_for("rounds so far: 2")
        enter("\x04")
        assert terminal.wait_for_end() == 0
    assert "Traceback" not in terminal.shown
    assert any((programs / "glmjax" / "compiled").iterdir())
    history = tmp_path / "state" / "glmjax" / "chat_history"
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("keys", ["\x03", "/quit\r"], ids=["Ctrl-C", "quit"])
def test_ways_to_leave(model, environment, keys):
    with open_chat(model, environment) as terminal:
        terminal.wait_for("/help")
        terminal.wait_for(">")
        terminal.type(keys)
        assert terminal.wait_for_end() == 0


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"question": "a"}]', '[{"question": 1, "answer": ""}]']
)
def test_files_that_are_no_conversation(tmp_path, content):
    file = tmp_path / "talk.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"talk\.json is no conversation that /save wrote"):
        read_rounds(file)


def test_a_saved_conversation_is_read_again(tmp_path):
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"question": "a", "answer": "b"}]))
    assert read_rounds(file) == (Round("a", "b"),)
