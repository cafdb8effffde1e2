"""What `flextok` answers before it imports anything heavy, against what the commands' parsers take."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

import flextok_pl.modules
from flextok_pl.cli import COMMANDS, load, main
from flextok_pl.cli.front import MODELS, answer, options_for
from flextok_pl.cli.options import Options, options_of
from flextok_pl.cli.sweep import sweep_parser
from flextok_pl.cli.tool import tool_parser
from flextok_pl.cli.training import CALLBACKS, FlexTokCLI
from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.data import Augmentation
from flextok_pl.errors import UserError

ROOT = Path(__file__).parents[2]
TOOLS = [name for name, command in COMMANDS.items() if command.run == "tool:run"]
# `env` parses what `fit` does, and nothing without --config.
TRAININGS = [name for name, command in COMMANDS.items() if command.groups and name != "env"]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def names(options: Options, prefix: str = "") -> set[str]:
    """Of the options, in full; those of a group in place of the group."""
    found: set[str] = set()
    for name, option in options.items():
        found |= names(option.below, f"{prefix}{name}.") if option.below else {prefix + name}
    return found


def assert_same(options: Options, parser: Any, but: Collection[str] = ()) -> None:
    """The names of the options are those that jsonargparse's parser takes, which keeps some dataclasses whole."""
    found = {action.dest for action in parser._actions if not action.dest.endswith("help")} - {*but}
    found -= {name.rpartition(".")[0] for name in found}
    below = {name: [whole for whole in found if name.startswith(f"{whole}.")] for name in names(options)}
    assert {(whole or [name])[0] for name, whole in below.items()} == found


def class_parser(target: type) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(target, None)
    return parser


def training_parser(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = []

    def parse_arguments(cli: FlexTokCLI, parser: Any, args: Any) -> None:
        found.append(parser)
        raise KeyboardInterrupt

    monkeypatch.setattr(FlexTokCLI, "parse_arguments", parse_arguments)
    with pytest.raises(KeyboardInterrupt):
        load(f"flextok_pl.cli.{COMMANDS[name].run}")(name, [])
    return found[0]


@pytest.mark.parametrize("name", TOOLS)
def test_options_of_a_tool(name: str) -> None:
    assert_same(options_for(name), tool_parser(name, load(COMMANDS[name].options[0])))


@pytest.mark.parametrize("name", TRAININGS)
def test_options_of_a_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_for(name)
    groups = {group: options.pop(group).below for group in CALLBACKS}
    assert (options.pop("smoke", None) is not None) == (name == "fit"), "it decides which parser is made"
    assert_same(options, training_parser(name, monkeypatch), but=CALLBACKS)
    for group, below in groups.items():
        assert below is not None
        assert_same(below, class_parser(CALLBACKS[group]))


@pytest.mark.parametrize("name", MODELS)
def test_options_of_a_model(name: str) -> None:
    below = options_for("fit", name)["model"].below
    assert below is not None
    assert_same(below, class_parser(getattr(flextok_pl.modules, name)))


@pytest.mark.parametrize("target", [Augmentation, FlexTokConfig, VAEConfig, PriorConfig])
def test_options_of_a_dataclass(target: type) -> None:
    fields = {field.name for field in dataclasses.fields(target)}
    assert set(options_of(f"{target.__module__}:{target.__name__}")) == fields


def test_options_of_a_sweep() -> None:
    options = options_for("sweep")
    assert {"dry_run", "check"} < set(options) and "watch" in options_for("sweep status")
    for name in ("file", "dry_run", "check"):
        del options[name]
    assert_same(options, sweep_parser("sweep"))


def test_types_and_defaults_are_spelled_out() -> None:
    options = options_of("flextok_pl.data:write_folder")
    assert (
        options["image_format"].kind == "Literal['png', 'jpg', 'webp']" and options["image_format"].default == "'jpg'"
    )
    assert options["src"].positional and options["src"].default is None and not options["size"].positional
    assert options_of("flextok_pl.sweeps.sweep:Sweep")["seeds"].default == "[0]"


TINY = "--config experiments/tokenizer/tiny.yaml"
WRONG = [
    ("fit", f"{TINY} --model.lrr 1", "no option model.lrr; did you mean model.lr?"),
    ("fit", f"{TINY} --model.net.causal_register false", "did you mean model.net.causal_registers?"),
    ("fit", "--config experiments/tokenizer/distill_demo.yaml --model.num_stepz 3", "did you mean model.num_steps?"),
    ("fit", f"{TINY} --batch_size 1", "no option batch_size; did you mean data.batch_size?"),
    ("fit", f"{TINY} --trainer.max_step=1", "did you mean trainer.max_steps?"),
    ("fit", f"{TINY} --rfid.nosuch=1", "no option rfid.nosuch"),
    ("test", f"{TINY} --tokeniser x", "did you mean tokenizer?"),
    ("plan", "--machin h100", "did you mean machine?"),
    ("fit", "--config nowhere.yaml", "no file nowhere.yaml"),
    ("fit", f"{TINY} --data nowhere.yaml", "data=nowhere.yaml: there is no such file"),
    ("fit", f"{TINY} --data.train nowhere --data.val x", "data.train: nowhere is not a folder"),
    ("fit", f"{TINY} --data.train [nowhere] --data.val x", "data.train: nowhere is not a folder"),
    ("validate", f"{TINY} --data.val nowhere", "data.val: nowhere is not a folder"),
    ("test", f"{TINY} --tokenizer nowhere.safetensors", "tokenizer=nowhere.safetensors: there is no such file"),
    ("fit", f"{TINY} --ckpt_path nowhere.ckpt", "ckpt_path=nowhere.ckpt: there is no such file"),
    ("fit", f"{TINY} --model.vae ./nowhere", "model.vae=./nowhere: there is no such file or folder"),
    ("sweep", "nowhere.yaml", "no file nowhere.yaml"),
    ("sweep", "experiments/sweeps/tiny.yaml --trails 3", "did you mean trials?"),
    ("sweep status", "", "FILE is missing"),
    ("data folder", "nowhere out", "src=nowhere: there is no such file or folder"),
    ("data folder", "tests", "DST is missing"),
    ("data folder", "tests out more", "'more' is one argument too many"),
    ("data tokens", "tests out", "--tokenizer is missing"),
    ("data folder", "tests out --image_fromat png", "did you mean image_format?"),
    ("data verify", "nowhere", "shards=nowhere"),
    ("fid", "nowhere.npz tests", "images=nowhere.npz"),
    ("reconstruct", "nowhere.png", "images=nowhere.png"),
    ("reconstruct", "README.md --out README.md/grid.png", "out=README.md/grid.png: it cannot be written"),
    ("data folder", "tests README.md/shards", "dst=README.md/shards: it cannot be written"),
    ("report", "nowhere", "folder=nowhere"),
    ("compare", "nowhere.json tests", "first=nowhere.json"),
    ("data folders", "", "'data folders' is not one of the commands above; did you mean data folder?"),
    ("fti", "", "did you mean fit?"),
]


def test_wrong_command_lines_and_help_need_no_torch() -> None:
    lines = [f"{name} {arguments}" for name, arguments, _ in WRONG] + [f"{name} --help" for name in COMMANDS]
    script = f"""
import contextlib, io, json, sys
from flextok_pl.cli import main
said = []
for line in {lines}:
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            main(line.split())
    except SystemExit as stop:
        said.append([line, stop.code if isinstance(stop.code, int) else 1, f"{{text.getvalue()}}{{stop.code}}"])
print(json.dumps([said, sorted({{"torch", "lightning", "scipy", "matplotlib", "jsonargparse"}} & {{*sys.modules}})]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said, heavy = json.loads(done.stdout)
    assert heavy == [] and [line for line, _, _ in said] == lines
    for (line, code, text), (_, _, message) in zip(said, WRONG, strict=False):
        assert message in text and code in (1, 2), line
    for line, code, text in said[len(WRONG) :]:
        assert code == 0 and f"usage: flextok {line.removesuffix(' --help')} " in text, line


def test_names_in_files_are_checked(tmp_path: Path) -> None:
    (tmp_path / "net.yaml").write_text("encoder_widht: 3\n")
    model = "model:\n  class_path: flextok_pl.modules.TokenizerModule\n  init_args:\n"
    for text, message in (
        ("trainr: {}", "x.yaml: there is no option trainr; did you mean trainer?"),
        ("data: {trian: x}", "x.yaml: there is no option data.trian; did you mean data.train?"),
        ("data: nowhere.yaml", "nowhere.yaml"),
        (f"{model}    lrr: 1", "did you mean model.lr?"),
        (f"{model}    budget_groups: 4", "option model.budget_groups was removed: .*delete it"),
        (f"{model}    init: somewhere", "option model.init was removed: use init_from"),
        (f"{model}    net: net.yaml", "net.yaml: there is no option model.net.encoder_widht; did you mean"),
        ("a: [", "x.yaml is not valid YAML"),
        ("- a", "x.yaml holds list"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            answer("fit", ["--config", str(tmp_path / "x.yaml"), "--print_config"])


@pytest.mark.parametrize("name", ["[2024] x/out", "[2024]", "{a,b}/out"])
def test_folders_may_be_called_like_lists_and_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    for given in (name, f"{name}/*"):
        answer(
            "fit", ["--config", str(ROOT / "experiments/tokenizer/tiny.yaml"), f"--data.train={given}", "--data.val=*"]
        )


def test_what_only_a_class_decides_is_let_through() -> None:
    given = [
        "--trainer.logger.nosuch=1",
        "--trainer.callbacks+=X",
        "--trainer.strategy.init_args.x=1",
        "--seed_everything=-1",
    ]
    assert answer("fit", [*given, "--print_config"]) == [*given, "--print_config"]
    assert answer("fit", ["--model=mine.Model", "--model.nosuch=1"]) == ["--model=mine.Model", "--model.nosuch=1"]
    assert answer("data verify", ["s3://bucket/set"]) == ["--shards=s3://bucket/set"]
    assert answer("data verify", ["no/{a,b}/*"]) == ["--shards=no/{a,b}/*"]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("data tokens", "--ckpt t --src tests --dst out", "--tokenizer=t --src=tests --dst=out"),
        (
            "data tokens",
            "--tokenizer t --dst out tests --num_views 10",
            "--tokenizer=t --num_views=10 --src=tests --dst=out",
        ),
        (
            "reconstruct",
            "pyproject.toml Makefile --ckpt t --num_tokens 1,4",
            '--tokenizer=t --budgets=1,4 --images=["pyproject.toml","Makefile"]',
        ),
        ("generate", "--num_tokens 1 --class a --class b", '--budgets=1 --classes=["a","b"]'),
        ("data reshard", "tests out --classes LICENSE", "--class_names=LICENSE --src=tests --dst=out"),
        ("fid", "--reference tests --images docs", "--images=docs --reference=tests"),
        ("sweep", "experiments/sweeps/tiny.yaml --dry_run", "experiments/sweeps/tiny.yaml --dry_run=true"),
        ("data folder", "tests out --overwrite --size 3", "--overwrite=true --size=3 --src=tests --dst=out"),
        ("data folder", "tests out --overwrite false", "--overwrite=false --src=tests --dst=out"),
    ],
)
def test_former_and_other_spellings(name: str, given: str, expected: str) -> None:
    assert answer(name, given.split()) == expected.split()


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(ROOT))
    given = ["~/tests", "--dst=~/out", "--captions", "~/README.md"]
    expected = [f"--captions={ROOT}/README.md", f"--src={ROOT}/tests", f"--dst={ROOT}/out"]
    assert answer("data folder", given) == expected


def test_help_of_groups(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, shown in (
        ([], "reconstruct "),
        (["--help"], "data verify "),
        (["data", "--help"], "data verify "),
        (["sweep", "--help"], "flextok sweep status: "),
        (["fit", "--rfid.help"], "--rfid.fit_budgets"),
        (["fit", "--model.help", "TokenizerModule"], "--model.net.encoder_width"),
        (["fit", "--model.help"], "TokenizerModule"),
        (["fit", "--trainer.logger.help"], "depend on its class"),
    ):
        try:
            main(arguments)
        except SystemExit as stop:
            assert stop.code == 0
        assert shown in capsys.readouterr().out
