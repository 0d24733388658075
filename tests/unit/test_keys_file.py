"""``serve-app keys``: the file keeps what people wrote around the entries."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from serve_app.cli import cli
from serve_app.config import keys
from serve_app.local import keys_file

FIRST, SECOND = keys.new()[1], keys.new()[1]
WRITTEN = f"""\
# Team A pays for this one.
- name: team-a
  hash: {FIRST}
  models:
  - m
  - "org/*"   # and what they fine-tune
# Until the fair.
- {{name: booth, hash: "{SECOND}", expires: 2027-01-31}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "keys.yaml").write_text(WRITTEN)
    return tmp_path / "keys.yaml"


def typed(*words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["keys", *words], standalone_mode=False)
    if status:
        assert result.exception is not None
    else:
        assert result.exit_code == 0, result.exception
    return result


def test_a_new_key_is_shown_once_and_its_hash_kept(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    made = typed("new", "ann", "--models", "m, org/*", "--admin", "--file", str(file))
    key = made.stdout.strip()
    assert made.stderr == f"its entry is in {file}\n"
    [kept] = keys_file.listed(file)
    assert (kept.name, kept.models, kept.admin) == ("ann", ["m", "org/*"], True)
    assert kept.hash == keys.digest(key.encode())
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_key_for_no_model_is_not_one_for_all(file: Path) -> None:
    said = typed("new", "ann", "--models", " , ", "--file", str(file), status=1).exception
    assert str(said).startswith("--models names no model")
    assert file.read_text() == WRITTEN


def test_a_link_stays_one(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    typed("revoke", str(link), "booth")
    assert link.is_symlink()
    assert [key.name for key in keys_file.listed(file)] == ["team-a"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent/keys.yaml"
    said = typed("new", "ann", "--file", str(absent), status=1).exception
    assert str(said) == f"{absent} cannot be written (No such file or directory)"


def test_without_a_file_the_entry_is_printed() -> None:
    key, entry = typed("new", "ann", "--expires", "2027-01-31").stdout.split("\n", 1)
    [kept] = keys.parse_all(keys_file.yaml_files.parse(entry, "printed"), "printed")
    assert kept.hash == keys.digest(key.encode())
    assert f"{kept.expires:%Y-%m-%d %H:%M %Z}" == "2027-01-31 00:00 UTC"


def test_an_added_key_leaves_the_rest_as_it_was(file: Path) -> None:
    typed("new", "ann", "--file", str(file))
    assert file.read_text().startswith(WRITTEN)
    assert [key.name for key in keys_file.listed(file)] == ["team-a", "booth", "ann"]
    again = typed("new", "ann", "--file", str(file), status=1)
    assert str(again.exception) == f"{file}: key ann is there twice; keep one"
    assert again.stdout == ""  # no key that is in no file


def test_the_list(file: Path) -> None:
    assert typed("list", str(file)).stdout == (
        "team-a  m, org/*\nbooth  *  expires 2027-01-31\n"
        if not keys_file.expired(keys_file.listed(file)[1])
        else "team-a  m, org/*\nbooth  *  expired 2027-01-31\n"
    )


@pytest.mark.parametrize(("name", "first", "last"), [("team-a", 1, 6), ("booth", 7, 8)])
def test_a_revoked_key_goes_with_its_lines_alone(
    file: Path, name: str, first: int, last: int
) -> None:
    assert typed("revoke", str(file), name).stdout == f"revoked {name}\n"
    lines = WRITTEN.splitlines(keepends=True)
    assert file.read_text() == "".join(lines[:first] + lines[last:])


def test_a_key_that_is_not_there(file: Path) -> None:
    said = str(typed("revoke", str(file), "team-b", status=1).exception)
    assert said == f"{file} has no key 'team-b'; did you mean 'team-a'?"


def test_entries_on_one_line_are_left_to_people(file: Path) -> None:
    file.write_text(f"[{{name: a, hash: '{FIRST}'}}, {{name: b, hash: '{SECOND}'}}]\n")
    before = file.read_text()
    assert "shares its lines with others" in str(
        typed("revoke", str(file), "a", status=1).exception
    )
    assert file.read_text() == before


def test_a_wrong_name_makes_no_key(tmp_path: Path) -> None:
    refused = typed("new", "a b", status=1)
    assert str(refused.exception) == (
        "keys new: key a b: name: has up to 64 letters, digits and . _ @ -"
    )
    assert refused.stdout == ""


def test_limits_are_written_and_listed(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    limits = {
        "requests-per-minute": 60, "tokens-per-minute": 100_000,
        "concurrent-requests": 8, "tokens-per-day": 2_000_000,
    }  # fmt: skip
    words = [word for name, limit in limits.items() for word in (f"--{name}", str(limit))]
    typed("new", "ann", *words, "--file", str(file))
    [kept] = keys_file.listed(file)
    assert kept.words() == "60 requests/min, 100,000 tokens/min, 8 at once, 2,000,000 tokens/day"
    with file.open("a") as out:
        out.write("  model_limits:\n    org/*: {concurrent_requests: 2}\n")
    assert typed("list", str(file)).stdout == f"ann  *  {kept.words()}  of org/*: 2 at once\n"
    wrong = typed("new", "bob", "--tokens-per-day", "0", "--file", str(file), status=1)
    assert str(wrong.exception) == (
        "keys new: key bob: tokens_per_day is 0, but should be greater than or equal to 1"
    )
