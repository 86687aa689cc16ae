"""Every example runs, and prints a line that begins `without` and one that begins `with`, which has the better figure."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import hosts
import rwalk

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("RWALK_DATA") or ROOT.parent / "shared" / "data")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def imported(script):
    """The packages that a script imports, or reads files of, without those that are part of Python."""
    read = set(re.findall(r'find_spec\("(\w+)"\)', script.read_text()))
    nodes = list(ast.walk(ast.parse(script.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return read | {name.split(".")[0] for name in names} - sys.stdlib_module_names


def run(script, folder):
    """Run a script as a user does; what a script with Avalanche needs before its first line is in `hosts`."""
    packages = imported(script)
    start = [str(script)]
    if "avalanche" in packages:
        hosts.avalanche()
        start = ["-c", f"import hosts, runpy; hosts.avalanche(); runpy.run_path({str(script)!r}, run_name='__main__')"]
    missing = [name for name in packages if name != "avalanche" and find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: make test-integrations")
    if "RWALK_DATA" in script.read_text() and not DATA.is_dir():
        pytest.skip("needs real data: set RWALK_DATA")
    paths = [Path(rwalk.__file__).parents[1], ROOT, Path(__file__).parent, ROOT / "tests"]
    found = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RWALK_DATA": str(DATA),
    }
    environment = os.environ | found
    done = subprocess.run([sys.executable, *start], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def figure(printed, beginning):
    """The first number of the line that begins like this: how well the first task, or all, are done after the last."""
    found = re.findall(rf"^{beginning}\b[^\d\n]*(\d+\.\d+)", printed, re.MULTILINE | re.IGNORECASE)
    assert len(found) == 1, f"{beginning} in:\n{printed}"
    return float(found[0])


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_keeps_more_with_us_than_without(script, tmp_path):
    printed = run(script, tmp_path)
    plain, ours = figure(printed, "(?:without|no memory)"), figure(printed, "(?:with )?(?:RWalk|a memory)")
    worse, better = (ours, plain) if "lower is better" in printed else (plain, ours)
    assert better > 1.1 * worse, printed
    MORE.get(script.stem, lambda printed: None)(printed)


def avalanches(printed):
    lines = [line.split() for line in printed.splitlines() if "forgetting" in line]
    accuracy = {line[0]: float(line[2].rstrip("%,")) for line in lines}
    assert accuracy.keys() == {"without", "RWalk", "EWC", "default"}
    assert all(figure > accuracy["without"] for name, figure in accuracy.items() if name != "without")


def lightnings(printed):
    without, held = (float(line.split("mean ")[1].rstrip("%")) for line in printed.splitlines()[:2])
    assert held > without + 5
    assert "tasks: 3" in printed


def transformers(printed):
    shown = printed.splitlines()
    kitchen = {line[:29].strip(): float(line.split()[-3]) for line in shown if line.count("kitchen ") and "harbour " in line}
    assert kitchen["kitchen alone"] < kitchen["EWC"] < kitchen["RWalk"] + 0.2 < kitchen["no memory"] - 1


MORE = {"with_avalanche": avalanches, "with_lightning": lightnings, "with_transformers": transformers}
"""What else single examples show."""


def test_there_is_an_example_for_each_host():
    modules = {path.stem for path in (ROOT / "src" / "rwalk" / "integrations").glob("[a-z]*.py")}
    assert {f"with_{name}" for name in modules} <= {script.stem for script in EXAMPLES}
