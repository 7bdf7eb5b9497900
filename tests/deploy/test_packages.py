"""What is built from a checkout: the two distributions, and the service that is installed from one."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

from chat_templates import HERMES_THINK
from scripted_service import scripted_service

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "deploy" / "models"
MODEL_FILES = {str(path.relative_to(MODELS)) for name in ("recall", "recall-mla") for path in (MODELS / name).iterdir()}
CLASHES = ("attention", "benchmarks", "cluster", "kv_transfer", "protos", "workers")
MOST_BYTES = 50e6


def project(path: str) -> dict:
    return tomllib.loads((ROOT / path).read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=~\[ ]", requirement)[0] for requirement in requirements}


def test_the_client_needs_less_of_what_the_service_needs_and_nothing_heavy() -> None:
    service, client = project("pyproject.toml"), project("deploy/client/pyproject.toml")
    assert set(client["dependencies"]) < set(service["dependencies"])
    heavy = {"nixl-cu13", "numpy", "ray", "tokenizers", "torch", "transformers"}
    assert heavy <= names(service["dependencies"]) - names(client["dependencies"])
    assert client["requires-python"] == service["requires-python"]
    assert client["scripts"] == service["scripts"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files here as they are now, with their history: a build leaves folders of its own behind."""
    folder = tmp_path_factory.mktemp("checkout")
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(folder)], check=True)
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, check=True, text=True, stdout=subprocess.PIPE).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).unlink(missing_ok=True)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, env=clean_environment())


def wheel(source: Path, folder: Path) -> Path:
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source))
    return next(folder.glob("*.whl"))


def install(environment: Path, *arguments: str) -> None:
    pip("--python", str(environment / "bin" / "python"), "install", "--quiet", *arguments)


def environment(folder: Path, wheel: Path) -> Path:
    """An empty environment with the wheel; what it depends on comes from where the tests run."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    install(folder, "--no-deps", str(wheel))
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "baton"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder whose own modules are called as Baton's."""
    folder = tmp_path / "elsewhere"
    for name in CLASHES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise ImportError('{name} of the working directory')\n")
    return folder


def own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def actors_of(process: int) -> list[int]:
    """The processes of Ray actors below this one; at least two."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], check=True, text=True, stdout=subprocess.PIPE).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    below, size = {process}, 0
    while len(below) > size:
        size = len(below)
        below |= {int(pid) for pid, parent, *_ in rows if int(parent) in below}
    found = [int(pid) for pid, _, *args in rows if int(pid) in below and args and re.match(r"ray::\w*Worker", args[0])]
    assert len(found) >= 2, listed
    return found


@pytest.mark.slow
@pytest.mark.ray
def test_the_wheel_serves_from_a_folder_that_has_modules_of_the_same_names(
    checkout: Path, tmp_path: Path, elsewhere: Path
) -> None:
    built = wheel(checkout, tmp_path / "built")
    with ZipFile(built) as archive:
        held = set(archive.namelist())
    assert {f"cluster/checkpoints/{name}" for name in MODEL_FILES} <= held
    assert {name.split("/")[0] for name in held} - set(CLASHES) == {f"{'-'.join(built.name.split('-')[:2])}.dist-info"}
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/results/"))]
    baton = environment(tmp_path / "venv", built)
    env = clean_environment()
    env.pop("RAY_worker_niceness", None)

    def run(*arguments: str) -> str:
        command = [str(baton), *arguments]
        return subprocess.run(command, cwd=elsewhere, env=env, check=True, text=True, stdout=subprocess.PIPE).stdout

    shown = run("--version")
    assert shown.startswith(f"baton {built.name.split('-')[1]}")
    assert "commit " in shown
    command = [str(baton), "up", "--port", "0"]
    pipe = subprocess.PIPE
    up = subprocess.Popen(command, cwd=elsewhere, env=env, text=True, stdout=pipe, stderr=pipe)
    try:
        assert up.stdout is not None
        address = re.search(r"on (127\.0\.0\.1:\d+)", up.stdout.readline())
        assert address is not None, up.communicate(timeout=60)[1]
        assert run("generate", "ada 4127, bob 9083; bob?", "--server", address[1]).strip() == "9083"
        assert f"baton {built.name.split('-')[1]}" in run("status", "--server", address[1])
        assert {os.getpriority(os.PRIO_PROCESS, worker) for worker in actors_of(up.pid)} == {own_niceness()}
    finally:
        up.send_signal(signal.SIGTERM)
        up.communicate(timeout=60)
    assert up.returncode == 0


@pytest.mark.slow
def test_the_client_says_what_only_the_service_can(checkout: Path, tmp_path: Path, elsewhere: Path) -> None:
    venv, built = tmp_path / "venv", wheel(checkout / "deploy" / "client", tmp_path / "built")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    install(venv, str(built))
    files = [path for path in venv.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    command = [str(venv / "bin" / "baton"), "up"]
    ran = subprocess.run(command, cwd=elsewhere, env=clean_environment(), text=True, capture_output=True, check=False)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "pip install baton-llm" in ran.stderr
    with scripted_service(HERMES_THINK) as service:
        service.engine.text = "Good morning."
        address = service.grpc.address
        code = f"from cluster.client import BatonClient; print(BatonClient('{address}').generate_once('Hi').text)"
        for asked in (
            ["baton", "generate", "Hi", "--server", address],
            ["baton", "generate", "--chat", "Hi", "--server", address],
            ["python", "-P", "-c", code],
        ):
            run = [str(venv / "bin" / asked[0]), *asked[1:]]
            told = subprocess.run(
                run, cwd=elsewhere, env=clean_environment(), text=True, capture_output=True, check=False
            )
            assert (told.stdout.strip(), told.stderr) == ("Good morning.", "")
