"""The command line as a user meets it: what it prints, where, and its exit codes."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import underhood as uh
from underhood.cli.app import app
from underhood.methods import registry

PROMPT = "When Mary and John went to the store, John gave a drink to"
CONTRAST = "When Mary and John went to the store, Mary gave a drink to"


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def good(*words: str) -> str:
    """stdout of a call that must succeed without a word on stderr."""
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def rows(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.strip().splitlines()]


def shell(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "underhood.cli", *words],
        capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip


# The process ------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from underhood.cli.app import app\n"
        "for words in (['--help'], ['run', '--help'], ['organisms', 'build', '--help']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'xarray', 'scipy', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_refusal_in_a_process_of_its_own() -> None:
    done = shell("inspect", "no-such-model", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert done.stdout == ""
    what, given, because, instead = done.stderr.strip().splitlines()
    assert what.startswith("ModelNotFound: there is no model 'no-such-model'")
    assert given.strip() == "Given:   no-such-model"
    assert because.strip().startswith("Because: ")
    assert "leave the name out" in instead


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(uh, "load", interrupted)
    assert call("inspect").exit_code == 130


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(uh, "load", broken)
    result = call("inspect")
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_terminal_gets_an_aligned_table_with_colour_unless_no_color() -> None:
    for environment, colour in (({}, True), ({"NO_COLOR": "1"}, False)):
        text = _in_a_terminal(["organisms", "list"], environment)
        assert "784,000" in text  # numbers are grouped for people only
        assert "\t" not in text
        assert ("\x1b[2m" in text or "\x1b[1m" in text) or not colour
        assert "\x1b[3" not in text or colour


def _in_a_terminal(words: list[str], environment: dict[str, str]) -> str:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "underhood.cli", *words]
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | environment
    child = subprocess.Popen(command, stdout=slave, stderr=subprocess.DEVNULL, env=env)
    os.close(slave)
    seen = b""
    try:
        while piece := os.read(master, 4096):
            seen += piece
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(master)
    assert child.wait(60) == 0
    return seen.decode()


# Commands ---------------------------------------------------------------------------------------


def test_version_and_no_command() -> None:
    assert good("--version").strip() == f"underhood {uh.__version__}"
    assert "explain" in call().output


def test_inspect_prints_facts_sites_and_reasons() -> None:
    text = good("inspect", "random/jamba")
    assert ["class", "JambaForCausalLM"] in rows(text)
    assert "pattern.1\tbatch head=4 query key\tattention probabilities" in text
    absent = next(line for line in text.splitlines() if line.startswith("head_out, k"))
    assert "\t0,2-3\tthere is no attention in this layer" in absent
    assert "cross_*\tall\t" in text


def test_inspect_lists_every_site_and_every_module() -> None:
    model = uh.load("random/gpt2")
    listed = [row[0] for row in rows(good("inspect", "random/gpt2", "--sites"))]
    assert listed == ["site", *map(str, model.sites())]
    document = json.loads(good("inspect", "random/gpt2", "--modules", "--json"))
    paths = [name for name, _ in model.module.named_modules() if name]
    assert [row["module"] for row in document["modules"]][1:] == paths


def test_inspect_shows_the_modules_as_a_tree() -> None:
    model = uh.load("random/gpt2")
    listed = {row[0]: row for row in rows(good("inspect", "random/gpt2", "--tree"))}
    assert {name for name, _ in model.module.named_modules() if name} <= set(listed)
    sites = [site for row in listed.values() for site in row[-1].split()]
    assert set(map(str, model.sites())) <= set(sites)
    document = json.loads(good("inspect", "random/gpt2", "--tree", "--json"))
    assert document["kind"] == "tree" and document["root"]["type"] == "GPT2LMHeadModel"


def test_inspect_a_module_without_blocks() -> None:
    text = good("inspect", "random/plain_mlp")
    assert "none; address the parts as module:PATH" in text


def test_inspect_json_agrees_with_the_model() -> None:
    document = json.loads(good("inspect", "--json"))
    model = uh.load()
    assert document["model"]["layers"] == model.n_layers
    assert document["model"]["parameters"] == sum(p.numel() for p in model.module.parameters())
    assert document["not offered"]


def test_generate_shows_both_arms_and_what_fired() -> None:
    text = good("generate", PROMPT, "--edit", "z.1.2=zero", "--edit", "mlp_out=scale:0.5")
    table = rows(text.replace("\n\n", "\n"))
    assert table[0] == ["unedited", uh.load().generate(PROMPT).text[0]]
    assert table[1][0] == "edited"
    assert table[2] == ["edit", "places", "moved"]
    assert table[3][0] == "z.1.2, zero"
    # Zeroing moves an activation by all of its length, halving by half.
    assert [float(row[2]) for row in table[3:]] == pytest.approx([1.0] + [0.5] * uh.load().n_layers)


def test_generate_from_a_saved_plan_as_json(tmp_path: Path) -> None:
    plan = uh.Plan([uh.Edit("resid_post.1", uh.scale(0.0))])
    path = plan.save(tmp_path / "plan.json")
    document = json.loads(good("generate", PROMPT, "--edits", str(path), "--json"))
    model = uh.load()
    assert document["unedited"]["text"] == model.generate(PROMPT).text[0]
    assert document["edited"]["text"] == model.generate(PROMPT, edits=plan).text[0]
    assert document["fired"][0]["places"] > 0


def test_generate_samples_with_a_seed() -> None:
    words = ("generate", "Mary felt", "--sample", "--temperature", "3", "--json", "--seed")
    first, again, other = (json.loads(good(*words, seed)) for seed in ("1", "1", "2"))
    assert first == again
    assert first["unedited"] != other["unedited"]


def test_organisms_list_show_and_check() -> None:
    assert good("organisms") == good("organisms", "list")
    card = json.loads(good("organisms", "show", "town", "--json"))
    assert card in json.loads(good("organisms", "list", "--json"))
    assert f"parameters\t{card['parameters']}" in good("organisms", "show", "town")
    assert "what is inside" in good("organisms", "show", "wired/induction")
    header, *found = rows(good("organisms", "check", "town", "--n", "20"))
    assert header[0] == "task"
    assert [row[0] for row in found] == list(card["tasks"])
    for task, accuracy, *_ in found:  # of 20 prompts
        assert abs(float(accuracy) - card["tasks"][task]["accuracy"]) < 0.35, task


def test_organisms_build_passes_its_options_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from underhood.organisms import organism, trainer

    seen: dict[str, object] = {}

    def train(what: object, **options: object) -> object:
        seen.update(options, what=what)
        return organism("town").card

    monkeypatch.setattr(trainer, "train", train)
    words = ("--steps", "7", "--out", str(tmp_path), "--no-resume", "--seed", "3", "--quiet")
    header, *found = rows(good("organisms", "build", "town", *words))
    assert header == ["task", "accuracy", "prompts", "more"]
    assert [row[0] for row in found] == list(organism("town").tasks)
    assert seen == {
        "what": organism("town"), "out": tmp_path, "steps": 7, "resume": False, "seed": 3,
        "progress": False,
    }  # fmt: skip


def test_organisms_build_writes_the_card_of_a_wired_one(tmp_path: Path) -> None:
    good("organisms", "build", "wired/xor", "--out", str(tmp_path), "--quiet")
    assert json.loads((tmp_path / "card.json").read_text())["tasks"]["xor"]["accuracy"] == 1.0


def test_check_prints_every_law_and_fails_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(good("check", "random/gpt2", "--json"))
    assert document["ok"]
    assert {row["status"] for row in document["rows"]} <= {"ok", "not offered"}
    from underhood.core.check import CheckReport, CheckRow

    bad = CheckReport("m", [CheckRow("a law", "failed", 0.5, "off by a half")])
    monkeypatch.setattr(uh.Model, "check", lambda self: bad)
    result = call("check", "random/gpt2")
    assert result.exit_code == 1
    assert rows(result.stdout)[1] == ["a law", "failed", "0.5", "off by a half"]
    assert "1 failed" in result.stderr


def test_doctor_answers_every_question(monkeypatch: pytest.MonkeyPatch) -> None:
    from underhood.cli import doctor

    found = {row["what"]: row for row in json.loads(good("doctor", "--json"))}
    assert list(found) == list(doctor.QUESTIONS)
    assert {row["status"] for row in found.values()} <= {"ok", "absent"}
    assert "town" in found["built-in model"]["found"]

    def broken() -> str:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "QUESTIONS", {"disk": broken})
    result = call("doctor")
    assert result.exit_code == 1
    assert rows(result.stdout)[1] == ["disk", "failed", "OSError: no such thing"]


# The main job -----------------------------------------------------------------------------------


def test_explain_says_it_and_writes_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    result = call("explain", PROMPT, "--vs", CONTRAST, "--open")
    assert result.exit_code == 0, result.output
    assert "Mary" in result.stdout.splitlines()[0]
    assert result.stderr.startswith("wrote report.html (")
    assert opened == [(tmp_path / "report.html").as_uri()]
    assert "<html" in (tmp_path / "report.html").read_text()


def test_explain_as_json_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("explain", "The capital of France is", "--vs", "The capital of Italy is", "--json")
    document = json.loads(good(*words, "--answer", "Paris", "--wrong", "Rome"))
    assert (document["answer"].strip(), document["wrong"].strip()) == ("Paris", "Rome")
    assert document["sentences"]
    assert list(tmp_path.iterdir()) == []


# Methods ----------------------------------------------------------------------------------------


def test_methods_lists_all_with_their_own_summaries() -> None:
    header, *found = rows(good("methods"))
    assert header == ["family", "name", "summary"]
    assert [row[1] for row in found] == [n for some in registry.names().values() for n in some]
    for _, name, summary in found[:3]:
        assert registry.find(name).summary == summary


def test_a_card_names_each_parameter_and_how_to_give_it() -> None:
    text = good("methods", "logit_lens")
    assert "prompt\t--prompt\tstr\trequired" in text
    assert "top\t--set top=\tint\t5" in text
    assert "# Source" in text and "# Misleads" in text
    card = json.loads(good("methods", "logit_lens", "--json"))
    assert [p["name"] for p in card["parameters"]][:2] == ["prompt", "top"]


def test_run_prints_tsv_json_and_saves_by_suffix(tmp_path: Path) -> None:
    words = ("run", "logit_lens", "--prompt", "The capital of France is", "--set", "top=2")
    assert "\t" in good(*words)
    document = json.loads(good(*words, "--json"))
    assert document["schema"] == "view/1"
    assert document["provenance"]["model"] == "town"
    result = call(*words, "-o", str(tmp_path / "lens.json"))
    assert result.exit_code == 0
    assert "wrote" in result.stderr and "wrote" not in result.stdout
    saved = uh.Result.load(tmp_path / "lens.json")
    assert saved.data.sizes["rank"] == 2
    good(*words, "-q", "-o", str(tmp_path / "lens.html"))
    assert (tmp_path / "lens.html").read_text().startswith("<!doctype html")


def test_run_pairs_from_flags_and_from_a_file(tmp_path: Path) -> None:
    flags = ("--prompt", PROMPT, "--vs", CONTRAST, "--answer", "Mary", "--wrong", "John")
    uh.Pairs.one(PROMPT, CONTRAST, "Mary", "John").save(tmp_path / "pairs.json")
    words = ("run", "direct_attribution")
    assert good(*words, *flags) == good(*words, "--data", str(tmp_path / "pairs.json"))


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["inspect", "random/gtp2"], 2, "nearest: gpt2"),
        (["inspect", "./nowhere"], 2, "no folder ./nowhere"),
        (["inspect", "random/gpt2", "--device", "abacus"], 2, "no device 'abacus'"),
        (["inspect", "--dtype", "int4"], 2, "int4"),
        (["explain", PROMPT, "--vs", "Mary"], 2, "PairError"),
        (["explain", PROMPT, "-o", "report.pdf"], 2, ".html, .json"),
        (["explain", PROMPT, "--vs", CONTRAST, "--answer", "two words"], 2, "AnswerError"),
        (["run", "logit_lenz"], 2, "nearest: logit_lens"),
        (["methods", "logit_lenz"], 2, "nearest: logit_lens"),
        (["run", "logit_lens"], 2, "--prompt TEXT"),
        (["run", "logit_lens", "-p", "x", "--set", "topp=1"], 2, "nearest: top"),
        (["run", "logit_lens", "-p", "x", "--set", "top=many"], 2, "of type int"),
        (["run", "logit_lens", "-p", "x", "--set", "top"], 2, "NAME=VALUE"),
        (["run", "logit_lens", "-p", "x", "-p", "y"], 2, "reads one prompt"),
        (["run", "logit_lens", "-p", "x", "--vs", "y"], 2, "no use for --vs"),
        (["run", "logit_lens", "-p", "x", "--answer", "y"], 2, "--set answer=VALUE"),
        (["run", "logit_lens", "-p", "x", "-o", "lens.gif"], 2, ".html"),
        (["run", "logit_lens", "-p", "x", "-o", "nowhere/lens.json"], 2, "no folder nowhere"),
        (["run", "direct_attribution", "-p", "x"], 2, "--vs CONTRAST"),
        (["run", "direct_attribution", "--data", "none.json"], 2, "none.json"),
        (["generate", "Mary", "--edit", "zz.1=zero"], 2, "no site named 'zz'"),
        (["generate", "Mary", "--edit", "z.9=zero"], 2, "no layer 9"),
        (["generate", "Mary", "--edit", "z.1=half"], 2, "SITE=scale:FACTOR"),
        (["generate", "Mary", "--edit", "z.1=scale:much"], 2, "SITE=scale:FACTOR"),
        (["generate", "Mary", "--edits", "none.json"], 2, "no file none.json"),
        (["generate", "Mary", "--seed", "1"], 2, "--sample"),
        (["generate", "Mary", "-m", "random/gpt2"], 3, "tokenizer"),
        (["organisms", "show", "twon"], 2, "town"),
        (["organisms", "build", "twon"], 2, "town"),
    ],
)
def test_refusals(words: list[str], code: int, said: str) -> None:
    result = call(*words)
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


# What it would take, and the bench ----------------------------------------------------------------


def test_a_dry_run_says_what_the_sweeps_take_and_runs_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from underhood.core import sweep as engine

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a cell was run")

    monkeypatch.setattr(engine, "Growing", never)
    monkeypatch.setattr(engine, "Plain", never)
    words = ("run", "activation_patching", "-p", PROMPT, "--vs", CONTRAST, "--answer", "Mary",
             "--wrong", "John", "--dry-run", "--quiet")  # fmt: skip
    text = good(*words)
    assert "passes of up to" in text and "shared prefix" in text
    assert "3 sweeps, about" in text


def test_a_dry_run_of_a_method_without_sweeps_gives_its_cost() -> None:
    text = good("run", "logit_lens", "-p", PROMPT, "--dry-run", "--quiet")
    assert text.startswith("logit_lens makes no sweep. Cost: one forward")


def test_the_bench_prints_its_tables(tmp_path: Path) -> None:
    text = good("bench", "circuits", "shift_by", "--quiet")
    row = next(line for line in text.splitlines() if line.startswith("| shift_by | 2 / 23"))
    assert row.split(" | ")[2] == "1.00 / 1.00"  # the exact way
    refused = call("bench", "circuits", "shift_by", "--write")
    assert refused.exit_code != 0
