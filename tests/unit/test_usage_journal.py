"""The journal of requests: no line is lost with its writer, or read before its file is closed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from serve_app.gateway.usage import journal
from serve_app.gateway.usage.journal import Journal

WRITER = """
import sys
from pathlib import Path
from serve_app.gateway.usage.journal import Journal

journal = Journal(Path(sys.argv[1]), max_file_bytes=20_000, max_file_age_s=60)
number = 0
while True:
    journal.append(b"%d\\n" % number)
    print(number, flush=True)  # after the line is written
    number += 1
"""


def opened(folder: Path, max_file_bytes: int = 1000, max_file_age_s: float = 60) -> Journal:
    return Journal(folder, max_file_bytes=max_file_bytes, max_file_age_s=max_file_age_s)


def lines(folder: Path) -> list[bytes]:
    return [line for file in journal.closed(folder) for line in file.lines()]


def test_a_killed_process_loses_no_line(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = []
    for writer in writers:
        assert writer.stdout
        said.append([int(writer.stdout.readline()) for _ in range(10_000)])
        writer.send_signal(signal.SIGKILL)
        said[-1] += [int(line) for line in writer.stdout.read().split("\n")[:-1] if line]
        writer.wait()
        writer.stdout.close()
    found = sorted(map(int, lines(tmp_path)))
    wanted = sorted(number for each in said for number in each)
    # It may have been killed between the writing of a line and the telling of it.
    assert len(found) - len(wanted) in (0, 1, 2)
    for number in {*found, *wanted}:
        assert found.count(number) >= wanted.count(number)
    assert len(list(tmp_path.iterdir())) > 4


def test_a_file_with_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    writer.append(b"a\n")
    assert list(journal.closed(tmp_path)) == []
    writer.close()
    assert lines(tmp_path) == [b"a"]
    writer.append(b"b\n")
    assert lines(tmp_path) == [b"a"]
    writer.close()
    assert lines(tmp_path) == [b"a", b"b"]


def test_two_readers_do_not_get_the_same_file(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    writer.append(b"a\n")
    writer.close()
    for file in journal.closed(tmp_path):
        assert list(journal.closed(tmp_path)) == []
        file.remove()
    assert list(tmp_path.iterdir()) == []


def test_two_writers_with_one_process_number_in_one_second_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20261127T000000Z")
    for line in (b"first\n", b"second\n"):
        writer = opened(tmp_path)
        writer.append(line)
        writer.close()
    assert sorted(lines(tmp_path)) == [b"first", b"second"]


def test_a_file_of_which_the_writer_was_killed_as_it_made_it_is_removed(tmp_path: Path) -> None:
    made, left = (tmp_path / f".{name}.jsonl.new" for name in "ab")
    made.touch()
    left.touch()
    os.utime(left, (0, 0))
    assert list(journal.closed(tmp_path)) == []
    assert os.listdir(tmp_path) == [made.name]


def test_a_line_that_was_cut_off_is_no_line(tmp_path: Path) -> None:
    (tmp_path / "dead.jsonl").write_bytes(b"a\nb\nhalf of")
    assert lines(tmp_path) == [b"a", b"b"]


def test_a_full_file_and_an_old_one_are_followed_by_another(tmp_path: Path) -> None:
    small = opened(tmp_path / "small", max_file_bytes=4)
    for _ in range(4):
        small.append(b"a\n")
    assert len(list((tmp_path / "small").iterdir())) == 2
    old = opened(tmp_path / "old", max_file_age_s=0)
    for _ in range(4):
        old.append(b"a\n")
    assert len(list((tmp_path / "old").iterdir())) == 4


def test_what_a_full_disk_took_half_of_is_an_error_and_spoils_no_other_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, write = opened(tmp_path), os.write
    writer.append(b"first\n")
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, line: write(file, line[:3]))
        with pytest.raises(OSError, match="3 of 7 bytes"):
            writer.append(b"second\n")
    writer.append(b"third\n")
    writer.close()
    assert lines(tmp_path) == [b"first", b"third"]


def test_lines_of_several_threads_stay_whole(tmp_path: Path) -> None:
    writer = opened(tmp_path, max_file_bytes=10_000)

    def write(letter: str) -> None:
        for _ in range(500):
            writer.append(f"{letter * 50}\n".encode())

    threads = [threading.Thread(target=write, args=[letter]) for letter in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        writer.close()
    writer.close()
    assert sorted(lines(tmp_path)) == sorted((c * 50).encode() for c in "abcd" for _ in range(500))
