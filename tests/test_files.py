"""Writing: whole or not at all, through no link, and nothing is lost that is not ours."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import dijiang
from dijiang import files, hidden
from dijiang.errors import DijiangError, ExportError
from dijiang.files import check_output, move_file, new_folder, write_file

LONG = "n" * 240


class Refused(DijiangError):
    """What these tests expect."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def nothing_foreign(folder):
    return []


def replace(target, text, meanwhile=lambda: None, foreign=nothing_foreign):
    """Write a folder; something happens meanwhile."""
    with new_folder(target, Refused, foreign=foreign) as folder:
        fill(folder, text)
        meanwhile()


def fill(folder, text):
    (folder / "file").write_text(text)


# One file.


def test_file_is_written_and_replaced(tmp_path):
    for data in (b"one", b"two"):
        write_file(tmp_path / "f", data, Refused)
        assert (tmp_path / "f").read_bytes() == data
        assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_link_is_replaced_and_what_it_leads_to_stays(tmp_path, link):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "d").mkdir()
    link(outside, tmp_path / "d" / "f")
    write_file(tmp_path / "d" / "f", b"new", Refused)
    assert outside.read_text() == "mine"
    assert (tmp_path / "d" / "f").read_bytes() == b"new"
    assert not (tmp_path / "d" / "f").is_symlink()
    assert outside.stat().st_nlink == 1


def test_link_to_a_device_or_a_pipe_is_refused_and_stays(tmp_path):
    """As /dev/stdout is one."""
    os.mkfifo(tmp_path / "pipe")
    for number, place in enumerate((Path("/dev/null"), tmp_path / "pipe")):
        link = tmp_path / f"link-{number}"
        link.symlink_to(place)
        with pytest.raises(Refused, match="something stands there that is no file"):
            write_file(link, b"new", Refused)
        assert link.is_symlink()
    assert not any("partial" in path.name for path in tmp_path.iterdir())


def test_link_to_an_open_file_is_refused_and_stays(tmp_path):
    """As /dev/stdout is one where it goes to a file: root could replace it."""
    link, far = tmp_path / "stdout", tmp_path / "far"
    far.symlink_to("stdout")  # as a container's log file
    with (tmp_path / "out").open("w") as out:
        link.symlink_to(f"/proc/self/fd/{out.fileno()}")
        for one in (link, far):
            with pytest.raises(Refused, match="something stands there that is no file"):
                write_file(one, b"new", Refused)
            assert one.is_symlink()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_file_of_somebody_else_stays_theirs(tmp_path):
    """`sudo dijiang sign` of a bundle that a service runs."""
    file = tmp_path / "f"
    file.write_bytes(b"old")
    file.chmod(0o600)
    os.chown(file, 12345, 54321)
    write_file(file, b"new", Refused)
    found = file.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (12345, 54321, 0o600)


@pytest.mark.usefixtures("either")
def test_folder_of_a_lower_layer_says_what_it_is(old, monkeypatch):
    """Of an overlay, as a container has: it cannot be renamed."""
    rename = Path.rename

    def lower(path, target):
        if path == old:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    monkeypatch.setattr(files, "_rename", lambda *_: False)
    monkeypatch.setattr(Path, "rename", lower)
    with pytest.raises(Refused, match="a folder of a container's image cannot be replaced"):
        replace(old, "new")
    assert (old / "file").read_text() == "old"
    assert names(old.parent) == ["t"]


def test_link_to_nowhere_makes_no_file_there(tmp_path):
    (tmp_path / "f").symlink_to(tmp_path / "nowhere")
    write_file(tmp_path / "f", b"new", Refused)
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_ordinary_or_those_of_the_old_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "f", b"", Refused)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o666 & ~umask
    (tmp_path / "f").chmod(0o640)
    write_file(tmp_path / "f", b"", Refused)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_pipes_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="something stands there that is no file"):
        write_file(tmp_path / "pipe", b"", Refused)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("name", ["", "..", "a\0b", "\ud800"])
def test_what_is_no_name_is_one_line(tmp_path, name):
    path = Path(name) if name in ("", "..") else tmp_path / name
    for write in (lambda: write_file(path, b"", Refused), lambda: check_output(path, [], Refused)):
        with pytest.raises(Refused, match="cannot be the name") as caught:
            write()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [240, 255])
def test_long_names_fit(tmp_path, length):
    for name in ("n" * length, "é" * (length // 2)):
        write_file(tmp_path / name, b"x", Refused)
        with new_folder(tmp_path / f"d{name}"[: length // 2], Refused) as folder:
            fill(folder, "x")
    assert len(names(tmp_path)) == 4
    with pytest.raises(Refused, match="File name too long"):
        write_file(tmp_path / ("n" * 256), b"x", Refused)
    with pytest.raises(Refused, match="File name too long"):
        check_output(tmp_path / ("n" * 256), [], Refused)


def test_long_targets_that_begin_alike_have_their_own_leftovers(tmp_path):
    leftover = tmp_path / hidden.hidden_name(LONG + "a")
    leftover.write_text("of another")
    write_file(tmp_path / (LONG + "b"), b"", Refused)
    assert leftover.exists()
    write_file(tmp_path / (LONG + "a"), b"", Refused)
    assert names(tmp_path) == [LONG + "a", LONG + "b"]


def failing(monkeypatch, call, code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, call, fail)


@pytest.mark.parametrize(
    ("call", "code"), [("fsync", errno.ENOSPC), ("fdopen", errno.EIO), ("rename", errno.EROFS)]
)
def test_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, call, code):
    write_file(tmp_path / "f", b"old", Refused)
    failing(monkeypatch, call, code)
    with pytest.raises(Refused, match=rf"f: cannot be written \({os.strerror(code)}\)"):
        write_file(tmp_path / "f", b"new", Refused)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "choose a folder where you may write")]
)
def test_advice_is_about_what_was_refused_and_names_what_was_asked_for(tmp_path, monkeypatch, code, advice):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    def write():
        with new_folder(tmp_path / "t", Refused) as folder:
            monkeypatch.setattr(os, "fsync", refuse)
            write_file(folder / "file", b"", Refused)

    with pytest.raises(Refused, match=rf"{tmp_path}/t/file: cannot be written \({os.strerror(code)}\); {advice}"):
        write()
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_file_system_without_permissions_takes_files_and_folders(tmp_path, monkeypatch, code):
    """As those of Windows and of memory cards."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    for call in ("fchmod", "chmod"):
        monkeypatch.setattr(os, call, refuse)
    for text in ("one", "two"):
        write_file(tmp_path / "f", text.encode(), Refused)
        with new_folder(tmp_path / "t", Refused, foreign=nothing_foreign) as folder:
            (folder / "inner").mkdir()
            fill(folder / "inner", text)
        assert (tmp_path / "f").read_text() == (tmp_path / "t" / "inner" / "file").read_text() == text


def test_state_without_room_keeps_the_saved_one(tmp_path):
    """A real failing write: the child may not write files of more than 100 kB."""
    script = (
        "import resource, sys, numpy as np, dijiang\n"
        "def state(n): return dijiang.State([np.ones((1, 2, n, n), 'f4')], np.array([1]), 'f' * 64, 50)\n"
        "state(8).save(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: state(256).save(sys.argv[1])\n"
        "except dijiang.InputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "s"], capture_output=True, text=True, check=True
    )
    assert "s: cannot be written (File too large)" in done.stdout
    assert dijiang.State.load(tmp_path / "s").layers[0].shape == (1, 2, 8, 8)
    assert names(tmp_path) == ["s"]


def test_folder_that_vanishes_is_one_line(tmp_path):
    with pytest.raises(Refused, match=r"f: cannot be written \(No such file"):
        write_file(tmp_path / "gone" / "f", b"", Refused)
    with pytest.raises(Refused, match="cannot be written"):
        replace(tmp_path / "a" / "b", "x", lambda: shutil.rmtree(tmp_path / "a"))
    assert names(tmp_path) == []


def test_moved_file_replaces_a_link(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "f").symlink_to(tmp_path / "outside")
    (tmp_path / "made").write_text("new")
    move_file(tmp_path / "made", tmp_path / "f", Refused)
    assert ((tmp_path / "f").read_text(), (tmp_path / "outside").read_text()) == ("new", "mine")
    assert names(tmp_path) == ["f", "outside"]


# Leftovers.


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path):
    living, dead, other = (tmp_path / hidden.hidden_name(name) for name in ("t", "t", "u"))
    for folder in (living, dead, other):
        folder.mkdir()
        fill(folder, "x")
    descriptor = os.open(living, os.O_RDONLY)
    assert hidden.lock(descriptor, wait=False)
    write_file(tmp_path / "t", b"", Refused)
    assert names(tmp_path) == sorted([living.name, other.name, "t"])
    os.close(descriptor)
    hidden.sweep(tmp_path)
    assert names(tmp_path) == ["t"]


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    ours = hidden.hidden_name("t")
    for name in (ours[:-1], ours.replace(".partial", ".part"), f"x{ours}", ".t.12.partial", ".t.partial"):
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    hidden.sweep(tmp_path)
    assert names(tmp_path) == before


def test_sweeping_follows_no_link_and_waits_for_no_pipe(tmp_path):
    (tmp_path / "outside").mkdir()
    fill(tmp_path / "outside", "mine")
    (tmp_path / hidden.hidden_name("t")).symlink_to(tmp_path / "outside")
    os.mkfifo(tmp_path / hidden.hidden_name("t"))
    hidden.sweep(tmp_path)
    assert (tmp_path / "outside" / "file").read_text() == "mine"


def test_without_locks_nothing_is_taken_for_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(hidden, "lock", lambda descriptor, *, wait: wait)
    (tmp_path / hidden.hidden_name("t")).mkdir()
    write_file(tmp_path / "t", b"", Refused)
    assert len(names(tmp_path)) == 2


# One folder.


@pytest.fixture(params=["exchange", "no exchange"])
def either(request, monkeypatch):
    """With renameat2, and without."""
    if request.param == "no exchange":
        monkeypatch.setattr(files, "_rename", lambda *_: False)


@pytest.fixture
def old(tmp_path):
    """A folder that stands at the target."""
    (tmp_path / "t").mkdir()
    fill(tmp_path / "t", "old")
    return tmp_path / "t"


@pytest.mark.usefixtures("either")
def test_folder_is_new_or_replaced(tmp_path):
    for text in ("one", "two"):
        replace(tmp_path / "t", text)
        assert (tmp_path / "t" / "file").read_text() == text
        assert names(tmp_path) == ["t"]


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(
    "error",
    [Refused("no"), KeyboardInterrupt(), SystemExit(143), OSError(errno.ENOSPC, "full"), FileNotFoundError("x")],
)
def test_folder_that_fails_leaves_the_old_one(old, error):
    def fail():
        raise error

    with pytest.raises((type(error), Refused)):
        replace(old, "new", fail)
    assert (old / "file").read_text() == "old"
    assert names(old.parent) == ["t"]


@pytest.mark.usefixtures("either")
def test_folder_that_comes_meanwhile_is_not_replaced(tmp_path):
    def come():
        (tmp_path / "t").mkdir()
        fill(tmp_path / "t", "theirs")

    with pytest.raises(Refused, match="never overwritten: it came meanwhile"):
        replace(tmp_path / "t", "mine", come, foreign=None)
    assert (tmp_path / "t" / "file").read_text() == "theirs"
    assert names(tmp_path) == ["t"]


@pytest.mark.usefixtures("either")
def test_file_that_comes_in_at_the_last_moment_is_not_lost(old):
    def foreign(folder):
        found = [name for name in names(folder) if name != "file"]
        (old / "thesis").write_text("years of work")  # after it was looked at
        return found

    with pytest.raises(Refused, match="thesis is no part of"):
        replace(old, "new", foreign=foreign)
    assert ((old / "file").read_text(), (old / "thesis").read_text()) == ("old", "years of work")
    assert names(old.parent) == ["t"]


def test_link_that_comes_meanwhile_is_not_followed(tmp_path, old):
    with pytest.raises(Refused, match="is a link"):
        replace(tmp_path / "l", "new", lambda: (tmp_path / "l").symlink_to(old))
    assert (old / "file").read_text() == "old"
    assert names(tmp_path) == ["l", "t"]


@pytest.mark.parametrize("where", [".", "inside", "inside/file"])
def test_output_that_is_or_holds_its_input_is_refused(tmp_path, where):
    (tmp_path / "t" / "inside").mkdir(parents=True)
    fill(tmp_path / "t" / "inside", "x")
    (tmp_path / "way").symlink_to(tmp_path / "t")
    for source in (tmp_path / "t" / where, tmp_path / "way" / where):
        with pytest.raises(Refused, match=r"is or holds .*, which is read"):
            check_output(tmp_path / "t", [source], Refused)
    check_output(tmp_path / "t" / "inside" / "new", [tmp_path / "t"], Refused)


@pytest.mark.parametrize("to", ["t", "nowhere"])
def test_link_as_output_is_refused(tmp_path, old, to):
    (tmp_path / "l").symlink_to(tmp_path / to)
    with pytest.raises(Refused, match="is a link"):
        check_output(tmp_path / "l", [], Refused)


def test_what_was_put_aside_is_brought_back(tmp_path, old):
    aside = tmp_path / hidden.hidden_name("t", hidden.REPLACED)
    old.rename(aside)
    (tmp_path / hidden.hidden_name("t")).mkdir()
    check_output(old, [], Refused)
    assert (old / "file").read_text() == "old"
    hidden.sweep(tmp_path, "t")
    assert names(tmp_path) == ["t"]


def test_what_somebody_is_replacing_is_not_brought_back(tmp_path, old, monkeypatch):
    """The fallback holds the lock of what it puts aside."""
    monkeypatch.setattr(files, "_rename", lambda *_: False)
    rename, seen = Path.rename, []

    def watched(path, target):
        if Path(target) == old and path.suffix == hidden.PARTIAL:
            hidden.recover(old)  # another process looks just now
            seen.append(old.exists())
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    replace(old, "new")
    assert seen == [False]
    assert (old / "file").read_text() == "new"
    assert names(tmp_path) == ["t"]


def test_interrupt_between_the_renames_brings_the_old_one_back(tmp_path, old, monkeypatch):
    monkeypatch.setattr(files, "_rename", lambda *_: False)
    rename = Path.rename

    def interrupted(path, target):
        if Path(target) == old and path.suffix == hidden.PARTIAL:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(old, "new")
    assert (old / "file").read_text() == "old"
    assert names(tmp_path) == ["t"]


@pytest.mark.usefixtures("either")
def test_what_cannot_be_removed_is_said(tmp_path, old, monkeypatch):
    monkeypatch.setattr(hidden.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(Refused, match=r"t is written, but what it replaced cannot be removed; remove .*partial"):
        replace(old, "new")
    assert (old / "file").read_text() == "new"
    monkeypatch.undo()
    hidden.sweep(tmp_path)
    assert names(tmp_path) == ["t"]


def test_files_of_a_folder_get_ordinary_permissions(tmp_path):
    with new_folder(tmp_path / "t", Refused) as folder:
        fill(folder, "x")
        (folder / "file").chmod(0o600)
    mode = stat.S_IMODE((tmp_path / "t").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "t" / "file").stat().st_mode) == mode & 0o666


def test_folders_in_a_folder_can_be_entered(tmp_path):
    """As Triton's model repository has them. Who runs as root notices nothing."""
    with new_folder(tmp_path / "new", Refused) as folder:
        (folder / "a" / "b").mkdir(parents=True, mode=0o700)
        (folder / "a" / "b" / "file").write_text("x")
        (folder / "a" / "b" / "file").chmod(0o600)
    made = (tmp_path / "new").stat().st_mode & 0o777
    modes = [(tmp_path / "new" / name).stat().st_mode & 0o777 for name in ("a", "a/b", "a/b/file")]
    assert modes == [made, made, made & 0o666]


def test_file_that_is_also_another_keeps_its_permissions(tmp_path):
    """As the weights that a folder for onnxruntime-genai shares with its bundle."""
    (tmp_path / "own").write_text("x")
    (tmp_path / "own").chmod(0o600)
    with new_folder(tmp_path / "new", Refused) as folder:
        os.link(tmp_path / "own", folder / "linked")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o600


def test_parents_are_made_and_vanish_with_a_failure(tmp_path):
    for fails in (True, False):
        try:
            with new_folder(tmp_path / "a" / "b" / "c", Refused) as folder:
                fill(folder, "x")
                if fails:
                    raise Refused("no")
        except Refused:
            assert names(tmp_path) == []
    assert (tmp_path / "a" / "b" / "c" / "file").is_file()


def test_temporary_folder_is_its_users_and_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    with files.temporary_folder() as folder:
        assert folder.parent == tmp_path
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert names(tmp_path) == []


def test_files_of_a_folder_are_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power cut an export may not be there, but may not be empty."""
    synced, renamed, fsync, rename = set(), [], os.fsync, files._rename
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(files, "_rename", lambda *names: (renamed.append(set(synced)), rename(*names))[1])
    target = tmp_path / "target"
    with files.new_folder(target, ExportError) as folder:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).write_text("x")
    assert {(target / name).stat().st_ino for name in ("", "a", "sub", "sub/b")} <= renamed[0]
    assert tmp_path.stat().st_ino in synced  # and then its name
