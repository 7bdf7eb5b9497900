"""The `baton` command itself: help, wrong commands, errors as one line."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cluster.cli import main as cli
from workers.errors import ConfigError

ROOT = Path(__file__).parents[3]


def test_help_lists_every_command_without_importing_any(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and summary in text for name, (summary, _) in cli.COMMANDS.items())
    code = "import sys; from cluster.cli.main import main; main(['--help']); sys.exit('grpc' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0
    )


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("statsu", "did you mean status?"),
        ("zzz", "the commands are up, generate"),
        ("--server", "the command comes first"),
    ],
)
def test_an_unknown_command_gets_a_hint(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name]) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["up", "generate", "status"])
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: baton {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("server.port is x"), 1, "baton fake: server.port is x\n"),
        (KeyboardInterrupt(), 130, "baton fake: interrupted\n"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> int:
        raise error

    module = ModuleType("fake_command")
    module.add_arguments, module.run = (lambda parser: None), run
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", ("a fake", "fake_command"))
    assert cli.main(["fake"]) == code
    assert capsys.readouterr().err == line


def test_settings_are_checked_without_a_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("server: {auth_token: s3cret}\n")
    assert cli.main(["up", "--check", "--config", str(path)]) == 0
    assert capsys.readouterr().out == "The settings are right.\n"
    path.write_text(f"server: {{tls_cert: {path}, tls_key: {path}}}\n")
    assert cli.main(["up", "--check", "--config", str(path)]) == 1
    assert "no certificate with its key" in capsys.readouterr().err
