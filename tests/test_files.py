"""Promises of support/files.py: a file is whole under its name or not there, and what is read is bounded."""

import os

import pytest
from conftest import files, no_hang, special_file

from support.errors import UserError
from support.files import Damaged, entry_of, read_file, remove, write_file


def refused(*_):
    raise OSError(5, "Input/output error")


def test_what_is_written_is_read(tmp_path):
    path = str(tmp_path / "x")
    write_file(path, b"old")
    write_file(path, b"new")
    assert read_file(path, 3) == b"new" and files(tmp_path) == {"x": b"new"}
    assert entry_of(b"new")["bytes"] == 3
    remove(path, path)
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_the_old_file_survives_a_failed_write(tmp_path, monkeypatch, name):
    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, name, refused)
    with pytest.raises(UserError, match="x: could not be written .*make room"):
        write_file(str(tmp_path / "x"), b"new")
    assert files(tmp_path) == {"x": b"old"}


def test_a_disk_that_keeps_something_else_is_noticed(tmp_path, monkeypatch):
    def fsync(handle):
        os.ftruncate(handle, 1)

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="x: could not be written .it does not read back"):
        write_file(str(tmp_path / "x"), b"new")
    assert files(tmp_path) == {"x": b"old"}


def test_a_file_is_flushed_before_it_has_its_name_and_its_folder_after(tmp_path, monkeypatch):
    events, real = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real(a, b)))
    write_file(str(tmp_path / "x"), b"new")
    assert events == [os.stat(tmp_path / "x").st_ino, "rename", os.stat(tmp_path).st_ino]


@pytest.mark.parametrize("how", ["sparse", "pipe", "folder", "device", "loop", "missing"])
def test_what_is_no_file_of_that_size_is_refused_unread(tmp_path, how):
    path = tmp_path / "x"
    path.write_bytes(b"1234")
    assert read_file(path, 4) == b"1234"
    special_file(path, how)
    with no_hang(), pytest.raises(Damaged, match="x: .*; restore it"):
        read_file(path, 4)
