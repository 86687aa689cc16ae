"""What the library never does: run what it reads, leave its folder, or reach for the network unasked."""

import ast
import io
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rwalk
from rwalk import L2, Consolidator
from rwalk.bench import Record
from rwalk.bench.sealed import file_name
from rwalk.distributed import checkpoint as checkpoints
from rwalk.distributed.checkpoint import read_metadata
from spoilt import mutations, refused

SOURCES = sorted(Path(rwalk.__file__).parent.rglob("*.py"))
EXECUTING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "runpy", "ctypes",
             "subprocess", "pty"}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
METHODS = {"torch.load", "torch.save", "torch.hub.load", "os.system", "os.popen", "np.load", "numpy.load", "yaml.load",
           "yaml.unsafe_load"}  # fmt: skip


def dotted(node):
    """Write `a.b.c` for an expression of names, else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def offences(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ({alias.name.split(".")[0] for alias in node.names} & EXECUTING)
        elif isinstance(node, ast.ImportFrom):
            yield from ({(node.module or "").split(".")[0]} & EXECUTING)
        elif isinstance(node, ast.Call):
            yield from ({dotted(node.func)} & (CALLS | METHODS))
            yield from ("allow_pickle" for keyword in node.keywords if keyword.arg in ("allow_pickle", "trust_remote_code"))


def test_no_source_executes_what_it_reads():
    assert len(SOURCES) > 40
    found = {path.parent.name + "/" + path.name: bad for path in SOURCES if (bad := list(offences(path.read_text())))}
    assert found == {"distributed/checkpoint.py": ["pickle"]}  # whose reader finds no class or function; see below


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "import os.path, dill", "eval('1')", "exec(x)", "torch.load(f)",
    "os.system('a')", "np.load(f, allow_pickle=True)", "def f():\n    import marshal",
])  # fmt: skip
def test_the_scan_finds_what_it_looks_for(source):
    assert list(offences(source))


@given(st.text(max_size=300), st.text(max_size=300), st.integers())
def test_names_of_records_stay_in_their_folder(stream, method, seed):
    name = file_name(stream, method, seed, {})
    assert Path(name).name == name
    assert name not in (".", "..")
    assert "\\" not in name
    assert name.isascii()
    assert name.isprintable()
    assert len(name) < 255


HOSTILE = [
    "../../escape",
    "/etc/passwd",
    "..",
    "a/../../b",
    "c:\\windows\\x",
    "a\0b",
    "~root",
    "x" * 1000,
    "-rf",
    "$(id)",
    "\n",
    "",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda h: repr(h)[:20])
def test_hostile_records_are_saved_in_their_folder(tmp_path, hostile):
    folder = tmp_path / "in" / "runs"
    for record in (Record(hostile, "s", 0, [[1.0]]), Record("m", hostile, 0, [[1.0]])):
        path = record.save(folder)
        assert path.resolve().parent == folder.resolve()
        again = Record.load(path)
        assert again == record
        assert again.save(folder) == path
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["runs"]
    assert len(list(folder.iterdir())) == 2


WATCHED = """
import sys
import tracemalloc
import warnings
from pathlib import Path
from rwalk.cli.main import main
inside, seen = Path(sys.argv[1]).resolve(), []
TEMPLATE = "_remote_module_non_scriptable.py"  # PyTorch 2.8 writes it to a temporary folder
def watch(event, arguments):
    if event == "subprocess.Popen" and Path(arguments[0]).name == "ldconfig":
        return  # as torch for CUDA looks for its libraries
    if event.startswith("socket.") or event in ("pickle.find_class", "os.system", "subprocess.Popen", "urllib.Request"):
        seen.append((event, str(arguments)))
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        path = Path(arguments[0])
        ours = path.resolve().parent == inside and path.match(".rwalk-*.part")
        if not ours and path != Path("/dev/null") and path.name != TEMPLATE:
            seen.append((event, str(arguments)))
import socket
sys.dont_write_bytecode = True
sys.addaudithook(watch)
status = main(["run", "split-digits", "--methods", "finetune,recipe", "--kernels", "blocked", "--seeds", "1", "--tasks", "2",
               "--hidden", "6", "--out", sys.argv[1]])  # Numba keeps and unpickles code of its own beside ours
status = status or main(["report", sys.argv[1]])
if seen or status:
    sys.exit(f"status {status}, seen {seen}")
there = [path.name for path in Path().iterdir()]
open("outside", "w"), socket.socket()
print("watched", there, seen)
"""


def test_a_run_on_digits_reaches_for_no_network_and_writes_in_its_folder_and_never_in_place(tmp_path):
    """What the watch has to see comes last: a file outside, and a socket."""
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert last.startswith("watched ['runs'] ")
    assert "'outside'" in last
    assert "socket.__new__" in last


@pytest.fixture
def checkpoint(tmp_path):
    """A function that saves a consolidator's state as a distributed checkpoint, and the consolidator."""
    from torch.distributed import checkpoint

    model = torch.nn.Linear(2, 3)
    memory = Consolidator(model, L2())
    memory.estimate()
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        checkpoint.save({"memory": memory.state_dict(), "other": 1}, checkpoint_id=tmp_path / "run", no_dist=True)
    return tmp_path / "run", memory


def test_a_checkpoints_metadata_are_read_as_torch_reads_them(checkpoint):
    """Truth: torch's own reader, which unpickles them."""
    from torch.distributed.checkpoint import FileSystemReader

    folder, _ = checkpoint
    theirs = FileSystemReader(folder).read_metadata()
    found = read_metadata(folder)
    assert set(found) == set(theirs.planner_data.values())
    for name, place in theirs.planner_data.items():
        entry = theirs.state_dict_metadata[name]
        assert found[place] == ((entry.size, entry.properties.dtype) if hasattr(entry, "size") else None)


def test_a_state_comes_back_from_a_distributed_checkpoint(checkpoint):
    from torch.distributed import checkpoint as torchs

    folder, memory = checkpoint
    state = {"memory": memory.blank_state_dict(folder, "memory")}
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        torchs.load(state, checkpoint_id=folder, no_dist=True)
    other = Consolidator(torch.nn.Linear(2, 3), L2())
    other.load_state_dict(state["memory"])
    assert torch.equal(other.anchor.point["weight"], memory.anchor.point["weight"])
    with pytest.raises(ValueError, match=r"`.*run`.*`mine`.*`memory`, `other`"):
        memory.blank_state_dict(folder, "mine")
    with pytest.raises(ValueError, match=r"`.*run`.*`other`"):
        memory.blank_state_dict(folder, "other")
    with pytest.raises(FileNotFoundError):
        memory.blank_state_dict(folder / "absent", "memory")


def naming(module, name, argument):
    """A pickle that calls something by its name."""
    return b"\x80\x04" + b"".join(pickle.SHORT_BINUNICODE + bytes([len(t)]) + t.encode() for t in (module, name)) + (
        pickle.STACK_GLOBAL + pickle.SHORT_BINUNICODE + bytes([len(argument)]) + argument.encode()
        + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
    )  # fmt: skip


def test_what_earlier_pythons_name_the_values_of_an_enumeration_by_does_nothing():
    """Before 3.11.4 they are pickled as `getattr(Enumeration, name)`."""
    stand_in = checkpoints._MetadataUnpickler(io.BytesIO(b"")).find_class("builtins", "getattr")
    assert stand_in is not getattr
    assert isinstance(stand_in(os, "system"), stand_in)


@pytest.mark.parametrize(("module", "name"), [
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"),
    ("subprocess", "Popen"), ("torch", "load"), ("torch.hub", "load"), ("torch", "Size.__class__"), ("functools", "partial"),
    ("torch.distributed.checkpoint.metadata", "torch.load"), ("torch.distributed.checkpoint.metadata", "os"),
    ("pathlib", "os.system"), ("webbrowser", "open"),
])  # fmt: skip
def test_nothing_that_a_checkpoints_metadata_name_is_run(checkpoint, tmp_path, module, name, monkeypatch):
    folder, memory = checkpoint
    monkeypatch.chdir(tmp_path)
    (folder / ".metadata").write_bytes(naming(module, name, "touch harm"))
    with pytest.raises(ValueError, match=rf"`.*run`.*`{re.escape(module)}\.{re.escape(name)}`"):
        memory.blank_state_dict(folder, "memory")
    assert not (tmp_path / "harm").exists()


def test_damaged_metadata_of_a_checkpoint_are_refused_in_words(checkpoint):
    folder, memory = checkpoint
    raw = (folder / ".metadata").read_bytes()
    for spoiled in mutations(raw, 300):
        (folder / ".metadata").write_bytes(spoiled)
        try:
            memory.blank_state_dict(folder, "memory")
        except ValueError as error:
            refusal = error
        else:
            continue  # the place of a byte in a file, say, is of no interest here
        assert f"`{folder}`" in str(refusal)
        assert refused(refusal)


@pytest.mark.parametrize("raw", [
    b"\x80\x02}r\0\0\0\x04.", b"\x80\x02}p67108864\n.", b"\x80\x04\x95\0\0\0\x04\0\0\0\0}.", b"\x80\x02X\0\0\0\x04a.",
    b"\x80\x04\x8d\0\0\0\x04\0\0\0\0a.", b"\x80\x05\x96\0\0\0\x04\0\0\0\0a.", b"\x80\x02\x8b\0\0\0\x041.",
], ids=["table", "table in words", "frame", "text", "long text", "array", "number"])  # fmt: skip
def test_metadata_of_a_few_rawask_for_no_more_memory_than_that(tmp_path, raw):
    """Each asks for 64 MB or more, the table for sixteen times as much; Python's own counts say what was asked for."""
    (tmp_path / ".metadata").write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(ValueError, match=re.escape(f"`{tmp_path}`")):
        read_metadata(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_metadata_beyond_all_size_are_not_read(tmp_path):
    (tmp_path / ".metadata").touch()
    os.truncate(tmp_path / ".metadata", 2**40)
    with pytest.raises(ValueError, match="larger than 1 GiB"):
        read_metadata(tmp_path)
