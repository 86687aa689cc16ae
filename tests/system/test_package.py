"""The package as a whole: public names, what importing costs, and the documentation's promises."""

import importlib
import inspect
import os
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rwalk
from rwalk import bench, replay
from rwalk.cli.main import main
from rwalk.cli.options import parse
from rwalk.rules import rules

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("module", [rwalk, bench, replay], ids=lambda m: m.__name__)
def test_public_names_exist(module):
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


def test_the_core_imports_none_of_the_extras():
    extras = {"sklearn", "pyarrow", "PIL", "datasets", "tyro", "rich", "pandas", "jinja2", "vl_convert"}
    code = f"import sys; from rwalk import Anchor, Consolidator, RWalk; sys.exit(bool({extras!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ELSEWHERE = r"""
import os, signal, sys
import loky, numba, optuna, rich, torch, torch.distributed.checkpoint, tyro, vl_convert  # others come first
POSIX = ("chown chroot confstr ctermid fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp"
         " getpriority getuid killpg lchown mkfifo mknod nice pipe2 posix_spawn pread pwrite register_at_fork sched_getaffinity"
         " sched_yield setsid setuid statvfs sync sysconf tcgetpgrp uname wait wait3 O_CLOEXEC O_DIRECTORY O_DSYNC O_NOCTTY"
         " O_NOFOLLOW O_NONBLOCK O_SYNC").split()
for name in POSIX:
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "alarm", "pthread_kill", "setitimer", "sigwait"):
    delattr(signal, name)
for name in ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
real_open = os.open
def opened(path, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied")  # Windows opens no folders
    return real_open(path, *rest, **more)
os.open = opened

from rwalk import Anchor, Consolidator, RWalk, bench, kernels, replay
from rwalk._io import files
from rwalk.cli import main
for backend in ("numba", "blocked"):
    kernels.use(backend)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, RWalk()).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).square().mean().backward()
        optimizer.step()
    memory.consolidate()
    for _ in range(2):  # the second time over the first file
        memory.save(backend)
        memory.anchor.save("anchor")
    memory.load(backend)
    memory.adopt(Anchor.load("anchor"), lambda name: name)
buffer = replay.Buffer(2)
buffer.save("buffer")
buffer.load("buffer")
quick = ["split-digits", "--seeds", "1", "--tasks", "2", "--hidden", "4", "--out", "runs"]
assert main.main(["run", *quick, "--methods", "finetune,recipe"]) == 0
assert main.main(["run", *quick, "--methods", "finetune,recipe"]) == 0
assert main.main(["tune", *quick, "--methods", "rwalk", "--strength", "0.1,1", "--tune-tasks", "1"]) == 0
assert main.main(["report", "runs"]) == main.main(["compare", "runs", "runs"]) == 0
assert not files.is_locked("runs/x.lock")
"""


@pytest.mark.filterwarnings("ignore:Got")
def test_the_package_works_without_what_windows_lacks(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(on disk)") == 2


def test_every_rule_says_where_it_comes_from():
    for name, rule in rules().items():
        assert rule.__doc__, name
        assert re.search(r"(19|20)\d\d", sys.modules[rule.__module__].__doc__), name


ELSEWHERE_RUN = {"docs/distributed.md", "docs/hosts.md", "docs/language_models.md"}
"""Pages whose Python runs on two ranks, and in tests/hosts."""
PAGES = {
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if "_build" not in path.parts and "```python" in path.read_text()
}


@pytest.mark.parametrize("page", sorted(PAGES - ELSEWHERE_RUN))
def test_the_python_of_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    scope = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)


def test_pages_that_run_elsewhere_exist():
    assert PAGES > ELSEWHERE_RUN


def commands(page):
    """The words of each `rwalk` command that a page shows."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.S) for line in block.splitlines()]
    return [line.split("#")[0].split()[1:] for line in lines if line.startswith("rwalk ")]


def test_the_readmes_commands_run(tmp_path, monkeypatch):
    """In this process: that `rwalk` is a program too is tested with pools, terminals and the disk."""
    monkeypatch.chdir(tmp_path)
    assert len(commands("README.md")) >= 3
    for words in commands("README.md"):
        assert main(words) == 0, words


def test_the_command_line_takes_the_commands_of_all_pages():
    pages = [path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts]
    found = [words for page in pages for words in commands(page)]
    assert len(found) > 8
    for words in found:
        parse(words)


def test_the_makefile_has_the_readmes_targets():
    targets = set(re.findall(r"^make (\w+)", README, re.M))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def test_the_demo_command_is_one_that_the_command_line_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dry = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = next(line for line in dry.splitlines() if " run permuted-digits" in line).split()
    assert main([*command[1:], "--seeds", "1", "--epochs", "1", "--tasks", "2"]) == 0
    assert "joint" in capsys.readouterr().out


def test_contributings_rule_is_found_by_laws_and_command_line(tmp_path):
    """The example of CONTRIBUTING.md, dropped beside the other rules of a copy of the package, with no other edit."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    (tmp_path / "src" / "rwalk" / "rules" / "plain.py").write_text(code)
    place = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path / "src")}, "capture_output": True, "text": True}
    words = ["run", "split-digits", "--methods", "plain", "--seeds", "1", "--out", "out"]
    both = f"""
import sys, pytest
status = pytest.main(["tests/laws/test_laws.py", "-k", "plain"])
from rwalk.cli.main import main
sys.exit(status or main({words}))
"""
    done = subprocess.run([sys.executable, "-c", both], check=False, **place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert '"method": "plain"' in next((tmp_path / "out").glob("*.json")).read_text()


@pytest.mark.parametrize("name", ["rwalk", *(f"rwalk.{part}" for part in rwalk._SHOWN)])
def test_completion_shows_the_public_names_and_help_lists_them(name):
    module = importlib.import_module(name)
    assert {*module.__all__} <= {*dir(module)}
    assert not [shown for shown in dir(module) if shown not in (*module.__all__, *rwalk._SHOWN, "__version__")]
    assert all(getattr(module, shown) is not None for shown in dir(module))
    text = pydoc.plain(pydoc.render_doc(module))
    classes = [shown for shown in module.__all__ if inspect.isclass(getattr(module, shown))]
    assert all(f"class {shown}(" in text for shown in classes)
