"""Where files are written and what is read of them: links, permissions, pipes and devices, and files beyond all size."""

import os
import stat
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from records import made
from rwalk import L2, Anchor, Consolidator, report
from rwalk._io import files, states
from rwalk.bench import Record
from rwalk.bench.checkpoint import scores_so_far
from rwalk.bench.tuned import Tuned
from rwalk.replay import Buffer

HUGE = 60 * 2**30
"""Bytes of a file with a hole, which takes no room."""


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def usual_mask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_mask")
def test_a_file_keeps_its_permissions_and_a_new_one_gets_the_usual_ones(tmp_path):
    for bits in (0o600, 0o640, 0o664, 0o755):
        (tmp_path / "old").write_bytes(b"old")
        (tmp_path / "old").chmod(bits)
        files.write(tmp_path / "old", b"new")
        assert ((tmp_path / "old").read_bytes(), mode(tmp_path / "old")) == (b"new", bits)
    files.write(tmp_path / "new", b"new")
    assert mode(tmp_path / "new") == 0o644
    os.umask(0o077)
    files.write(tmp_path / "mine", b"new")
    assert mode(tmp_path / "mine") == 0o600


def test_nobody_else_can_read_what_replaces_a_private_file_while_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "f").chmod(0o600)
    seen, chmod, fsync = [], os.chmod, os.fsync

    def look(act):
        return lambda *arguments: (seen.extend(map(mode, tmp_path.glob(".rwalk-*"))), act(*arguments))[1]

    monkeypatch.setattr(os, "chmod", look(chmod))
    monkeypatch.setattr(os, "fsync", look(fsync))
    files.write(tmp_path / "f", b"new")
    assert seen == [0o600, 0o600]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_somebody_else_stays_theirs(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    os.chown(tmp_path / "f", 12345, 54321)
    files.write(tmp_path / "f", b"new")
    assert ((tmp_path / "f").stat().st_uid, (tmp_path / "f").stat().st_gid) == (12345, 54321)


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_bytes(b"old")
    (tmp_path / "far" / "file").chmod(0o600)
    (tmp_path / "link").symlink_to(Path("far") / "file")
    (tmp_path / "second").symlink_to("link")
    (tmp_path / "new").symlink_to(Path("far") / "absent")
    for name, target in (("second", "file"), ("new", "absent")):
        files.write(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "far" / target).read_bytes() == b"new"
    assert mode(tmp_path / "far" / "file") == 0o600
    assert {p.name for p in tmp_path.rglob("*")} == {"far", "file", "absent", "link", "second", "new"}


@pytest.fixture(params=["pipe", "socket", "device", "folder", "circle"])
def obstacle(request, tmp_path):
    place = tmp_path / request.param
    if request.param == "pipe":
        os.mkfifo(place)
    elif request.param == "socket":
        os.mknod(place, stat.S_IFSOCK)
    elif request.param == "device":
        place.symlink_to("/dev/null")
    elif request.param == "folder":
        place.mkdir()
    else:
        place.symlink_to(place)
    return place


def savers(place):
    """What writes where a user says."""
    memory = Consolidator(torch.nn.Linear(1, 1), L2())
    memory.estimate()
    buffer = Buffer(2)
    return [memory.save, memory.anchor.save, buffer.save, lambda path: report.write(place.parent / "runs", path)]


def test_what_is_no_file_is_refused_and_stays(obstacle):
    made().save(obstacle.parent / "runs")
    before = os.lstat(obstacle)
    for save in savers(obstacle):
        with pytest.raises((OSError, ValueError), match=r"`.*(cannot be written|is a folder).*[Nn]ame "):
            save(obstacle)
    assert os.path.samestat(os.lstat(obstacle), before)
    assert {p.name for p in obstacle.parent.iterdir()} == {obstacle.name, "runs"}


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises((OSError, ValueError), match=r"cannot be written|^No file can have"):
        files.write(tmp_path / name, b"")
    assert not any(tmp_path.iterdir())


def test_folders_that_cannot_be_made_are_named(tmp_path):
    (tmp_path / "f").touch()
    for save in (made().save, bench_tuned().save):
        with pytest.raises(OSError, match=r"^`.*f.*` cannot be written .*name a folder"):
            save(tmp_path / "f" / "g")


def bench_tuned(**changes):
    config = {"stream": {"name": "s-x"}, "training": {"lr": 0.1}}
    return Tuned(**{"method": "rwalk", "stream": "s-x", "strength": 0.5, "lr": 0.1, "accuracy": 0.5, "tasks": 1} | changes,
                 config=config)  # fmt: skip


def sparse(path, start=b""):
    path.write_bytes(start)
    os.truncate(path, HUGE)


def claiming(size):
    """The start of a safetensors file whose header says that one tensor has so many bytes."""
    header = b'{"__metadata__":{"format":"rwalk-buffer-1","content":"{}","sha256":"%s"},' % (b"0" * 64)
    header += b'"x":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    return struct.pack("<Q", len(header)) + header


STARTS = {"hole": b"", "json": b'{"method": "', "header": struct.pack("<Q", 2**62), "wide": struct.pack("<Q", 10**9) + b"{",
          "claim": claiming(2**40), "short": claiming(2**20)}  # fmt: skip


@pytest.mark.parametrize("start", STARTS)
def test_a_file_beyond_all_size_is_refused_before_it_is_read(tmp_path, start, monkeypatch):
    made().save(tmp_path)
    for name in ("a.json", "b.tuned", "c.checkpoint", "state"):
        sparse(tmp_path / name, STARTS[start])
    records, problems = report.read(tmp_path)
    assert (len(records), len(problems)) == (1, 2)
    assert all(problem.startswith(f"`{tmp_path}") for problem in problems)
    assert "Left out" in report.write(tmp_path).read_text()
    assert scores_so_far(tmp_path / "c.checkpoint") == []
    for load in (Consolidator(torch.nn.Linear(1, 1)).load, Anchor.load, Buffer(2).load):
        with pytest.raises(ValueError, match=r"^`.*another file that `.*` wrote"):
            load(tmp_path / "state")


def test_what_does_not_fit_into_memory_is_named(tmp_path, monkeypatch):
    record, buffer = made().save(tmp_path), Buffer(2)
    buffer.save(tmp_path / "buffer")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(files, "parse", full)
    with pytest.raises(ValueError, match=r"is no record of `rwalk run`: .*too large for this machine's memory"):
        Record.load(record)
    with pytest.raises(ValueError, match=r"^`.*does not fit into memory.*another file that `Buffer.save` wrote"):
        buffer.load(tmp_path / "buffer")


def test_pipes_among_the_files_of_a_run_keep_nobody_waiting(tmp_path):
    made().save(tmp_path)
    for name in ("a.json", "b.tuned", "c.checkpoint", "c.lock"):
        os.mkfifo(tmp_path / name)
    records, problems = report.read(tmp_path)
    assert (len(records), len(problems)) == (1, 2)
    assert not files.is_locked(tmp_path / "c.lock")


def test_a_large_state_is_read_without_a_second_copy_of_it(tmp_path):
    """Truth: the largest piece that the file gives at once is one tensor, and the rest is read for the checksum by pieces."""
    content = {f"t{i}": torch.full((2**17,), float(i)) for i in range(8)}
    states.save(tmp_path / "f", "checkpoint", content)
    largest = 0

    class Watched:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size):
            nonlocal largest
            largest = max(largest, size)
            return self.file.read(size)

        def readinto(self, data):
            nonlocal largest
            largest = max(largest, len(data))
            return self.file.readinto(data)

    real = files.opened
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "opened", lambda path: Watched(real(path)))
        loaded = states.load(tmp_path / "f", "checkpoint")
    assert all(torch.equal(loaded[name], value) for name, value in content.items())
    assert largest <= max(states.PIECE, 2**19)


def test_a_record_under_the_name_of_another_run_is_left_out(tmp_path):
    """A copy would stand in for another method, seed or stream; under a name of the user's own it is the run that it is."""
    mine = made("finetune")
    for other in (made("rwalk"), made("finetune", seed=1), made("finetune", stream="split-x")):
        folder = tmp_path / other.name.removesuffix(".json")
        place = mine.save(folder).rename(folder / other.name)
        with pytest.raises(ValueError, match=rf"named like another one; .*`{mine.name}`.*Move the file away and run again"):
            Record.load(place)
        made("joint").save(folder)
        records, problems = report.read(folder)
        assert [record.method for record in records] == ["joint"]
        assert len(problems) == 1
        assert Record.load(place.rename(folder / "kept.json")) == mine


def test_a_record_may_be_saved_under_any_name(tmp_path):
    place = made("rwalk").save(tmp_path / "new" / "r.json")
    assert place == tmp_path / "new" / "r.json"
    assert Record.load(place) == made("rwalk")


def test_a_run_is_not_taken_for_done_by_a_record_of_other_settings(tmp_path):
    """The name of a run's record tells its settings by a digest, which only the runner has to find again."""
    weak, strong = (made(config=made().config | {"strength": s}) for s in (1.0, 2.0))
    place = weak.save(tmp_path).rename(tmp_path / strong.name)
    assert Record.load(place) == weak
    with pytest.raises(ValueError, match="named like another one"):
        Record.load(place, exact=True)


def test_copies_of_a_record_count_once(tmp_path):
    path = made().save(tmp_path)
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup" / path.name).write_bytes(path.read_bytes())
    records, problems = report.read(tmp_path)
    assert records == [made()]
    assert problems[0].startswith(f"`{path}` is a copy of `{tmp_path / 'backup' / path.name}`")


@pytest.mark.parametrize("save", [lambda folder: made().save(folder), lambda folder: bench_tuned().save(folder)])
def test_a_file_without_its_checksum_is_refused(tmp_path, save):
    path = save(tmp_path)
    text = path.read_text()
    path.write_text(text[: text.rindex(",")] + "}")
    load = Record.load if path.suffix == ".json" else Tuned.load
    with pytest.raises(ValueError, match=r"without its checksum: damaged, or written by an early version.*(run|Tune) again"):
        load(path)


def test_tuning_for_other_settings_is_refused_by_name(tmp_path):
    one, other = bench_tuned(), bench_tuned(method="si")
    place = one.save(tmp_path).rename(tmp_path / other.name)
    with pytest.raises(ValueError, match=f"it is named like another one; .*`{one.name}`.*Tune again"):
        Tuned.load(place)


def test_a_large_file_that_is_no_record_is_not_read(tmp_path, monkeypatch):
    """Python's own counts say how much memory was asked for; a record is read whatever its size."""
    place = made().save(tmp_path)
    (tmp_path / "a.json").write_bytes(b"{")
    os.truncate(tmp_path / "a.json", files.UNCHECKED + 1)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^`.*a.json` is no record of `rwalk run`: larger than 64 MB, and without a checksum"):
        Record.load(tmp_path / "a.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    monkeypatch.setattr(files, "UNCHECKED", 200)
    assert Record.load(place) == made()
