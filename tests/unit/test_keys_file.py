"""``serve-app keys``: the file keeps what people wrote around the entries."""

from __future__ import annotations

import multiprocessing
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
    assert str(said) == (
        f"{absent} cannot be written: a new file in {absent.parent} takes its place (No such file "
        "or directory)"
    )


def test_without_a_file_the_entry_is_printed() -> None:
    key, entry = typed("new", "ann", "--expires", "2127-01-31").stdout.split("\n", 1)
    [kept] = keys.parse_all(keys_file.yaml_files.parse(entry, "printed"), "printed")
    assert kept.hash == keys.digest(key.encode())
    assert f"{kept.expires:%Y-%m-%d %H:%M %Z}" == "2127-01-31 00:00 UTC"


def test_an_added_key_leaves_the_rest_as_it_was(file: Path) -> None:
    typed("new", "ann", "--file", str(file))
    assert file.read_text().startswith(WRITTEN)
    assert [key.name for key in keys_file.listed(file)] == ["team-a", "booth", "ann"]
    again = typed("new", "ann", "--file", str(file), status=1)
    assert str(again.exception) == (
        f"{file} has a key 'ann' already; choose another name, or first revoke that one "
        f"(serve-app keys revoke {file} ann)"
    )
    assert again.stdout == ""  # no key that is in no file


def test_the_list(file: Path) -> None:
    assert typed("list", str(file)).stdout == (
        "team-a  m, org/*\nbooth  *  expires 2027-01-31\n"
        if not keys_file.expired(keys_file.listed(file)[1])
        else "team-a  m, org/*\nbooth  *  expired 2027-01-31\n"
    )


@pytest.mark.parametrize(
    ("name", "first", "last", "comment"),
    [("team-a", 0, 6, "# Team A pays for this one."), ("booth", 6, 8, "# Until the fair.")],
)
def test_a_revoked_key_goes_with_its_lines_and_its_comment(
    file: Path, name: str, first: int, last: int, comment: str
) -> None:
    done = typed("revoke", str(file), name)
    assert (done.stdout, done.stderr) == (f"revoked {name}\n", f"with its comment:\n{comment}\n")
    lines = WRITTEN.splitlines(keepends=True)
    assert file.read_text() == "".join(lines[:first] + lines[last:])


def test_comments_about_the_file_and_about_other_keys_stay(file: Path) -> None:
    made = [keys.new()[1] for _ in range(4)]
    file.write_text(f"""\
# Of the production gateway.

# Of a.
- name: a
  hash: {made[0]}
  # models: [m]

# Of b.
-   # the dash alone
  name: b
  hash: {made[1]}
  # expires: 2027-01-31
# Of c.
- name: c
  hash: {made[2]}

# The end.
""")
    typed("revoke", str(file), "b")
    typed("revoke", str(file), "a")
    assert (
        file.read_text()
        == f"""\
# Of the production gateway.

# Of c.
- name: c
  hash: {made[2]}

# The end.
"""
    )
    typed("revoke", str(file), "c")
    assert file.read_text() == "# Of the production gateway.\n\n# The end.\n"
    assert keys_file.listed(file) == []
    typed("new", "d", "--file", str(file))
    assert [key.name for key in keys_file.listed(file)] == ["d"]


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
        "keys new: name: 'a b' must be up to 64 letters (a to z), digits and . _ @ -, and begin "
        "with a letter or digit"
    )
    assert refused.stdout == ""


def test_keys_made_at_the_same_time_are_all_in_the_file(file: Path) -> None:
    names = [f"k{n}" for n in range(16)]
    file.chmod(0o640)

    with multiprocessing.get_context("fork").Pool(8) as pool:
        pool.starmap(_come_and_go, [(file, name) for name in names], chunksize=1)
    left = [key.name for key in keys_file.listed(file)]
    assert sorted(left) == sorted(["team-a", "booth", *names[:5], *names[6:15]])
    assert [path.name for path in file.parent.iterdir()] == ["keys.yaml"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def _come_and_go(file: Path, name: str) -> None:
    keys_file.add(file, name, f"- name: {name}\n  hash: {keys.new()[1]}\n")
    if name.endswith("5"):
        keys_file.revoke(file, name)


def test_what_a_killed_command_left_is_no_part_of_the_file(file: Path) -> None:
    beside = file.with_name(".keys.yaml.new")
    beside.write_text("- half of an entry that is longer than what comes" * 100)
    typed("new", "ann", "--file", str(file))
    assert [key.name for key in keys_file.listed(file)] == ["team-a", "booth", "ann"]
    assert not beside.exists()


def test_a_refused_change_leaves_nothing_beside_the_file(file: Path) -> None:
    typed("new", "booth", "--file", str(file), status=1)
    typed("revoke", str(file), "nobody", status=1)
    assert [path.name for path in file.parent.iterdir()] == ["keys.yaml"]
    assert file.read_text() == WRITTEN


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tomorrow", "'tomorrow' is no day or time; write a day, from whose first moment"),
        ("2020-01-31", "'2020-01-31' is past (it is "),
        ("2020-01-31T18:00+02:00", "'2020-01-31T18:00+02:00' is past (it is "),
        ("", "'' is no day or time; write a day"),
    ],
)
def test_an_end_that_is_none_or_past_makes_no_key(tmp_path: Path, given: str, said: str) -> None:
    file = tmp_path / "keys.yaml"
    refused = typed("new", "ann", "--expires", given, "--file", str(file), status=1)
    assert str(refused.exception).startswith(f"keys new: expires: {said}")
    assert refused.stdout == ""
    assert not file.exists()


def test_an_end_with_an_hour_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    typed("new", "ann", "--expires", "2127-01-31T18:00+02:00", "--file", str(file))
    assert typed("list", str(file)).stdout == "ann  *  expires 2127-01-31 16:00\n"


def test_the_list_has_all_that_is_not_the_default(file: Path) -> None:
    file.write_text(f"""\
- name: a
  hash: {FIRST}
  priority: 5
  weight: 2.5
  tokens_per_minute: 10
  cached_token_weight: 0.1
  model_limits:
    m: {{cached_token_weight: 0}}
    "*": {{}}
""")
    assert typed("list", str(file)).stdout == (
        "a  *  priority 5  weight 2.5  10 tokens/min, cached tokens count 0.1  "
        "of m: cached tokens count 0  of *: no limit\n"
    )


@pytest.mark.parametrize("first", ["", "\ufeff", "\ufeff# All.\r\n\r\n", "---\r\n"])
def test_another_systems_line_ends_stay(file: Path, first: str) -> None:
    before = first + WRITTEN.replace("\n", "\r\n")
    file.write_bytes(before.encode())
    typed("new", "ann", "--file", str(file))
    after = file.read_bytes().decode()
    assert after.startswith(before)
    assert after.count("\n") == after.count("\r\n")
    typed("revoke", str(file), "team-a")
    typed("revoke", str(file), "ann")
    left = file.read_bytes().decode()
    booth = "".join(WRITTEN.splitlines(keepends=True)[6:]).replace("\n", "\r\n")
    assert left in (first + booth, booth)


def test_a_list_that_is_indented_goes_on_so(file: Path) -> None:
    file.write_text("".join(f"   {line}" for line in WRITTEN.splitlines(keepends=True)))
    typed("new", "ann", "--models", "m,n", "--file", str(file))
    assert [key.name for key in keys_file.listed(file)] == ["team-a", "booth", "ann"]
    typed("revoke", str(file), "booth")
    assert [key.name for key in keys_file.listed(file)] == ["team-a", "ann"]


def test_a_text_in_a_block_is_no_part_of_what_follows(file: Path) -> None:
    rest = f"# Of b.\n- name: b\n  hash: {SECOND}\n"
    for space in ("", "\n\n"):
        file.write_text(f"\ufeff-\n  name: a\n  hash: |-\n    {FIRST}\n{space}{rest}")
        typed("revoke", str(file), "a")
        assert file.read_text() == rest
    file.write_text(f"{rest}- name: a\n  hash: >-\n    {FIRST}")
    typed("revoke", str(file), "a")
    assert file.read_text() == rest


@pytest.mark.parametrize(
    "text", ["[]\n", f"[{{name: a, hash: '{FIRST}'}}]\n"], ids=["empty", "one"]
)
def test_a_list_in_brackets_is_left_to_people(file: Path, text: str) -> None:
    file.write_text(text)
    said = str(typed("new", "ann", "--file", str(file), status=1).exception)
    assert said.startswith(f"{file}: nothing can be put at its end, since its list is in brackets")
    assert file.read_text() == text


def test_an_entry_to_which_others_refer_is_left_to_people(file: Path) -> None:
    text = f"""\
- &team
  name: a
  hash: {FIRST}
  models: &models
  - m
- <<: *team
  name: b
  hash: {SECOND}
- name: c
  hash: {keys.new()[1]}
  models: *models
"""
    file.write_text(text)
    said = str(typed("revoke", str(file), "a", status=1).exception)
    assert "or they refer to it (&, *); delete it in an editor" in said
    assert file.read_text() == text
    typed("revoke", str(file), "c")
    typed("revoke", str(file), "b")
    assert file.read_text() == "".join(text.splitlines(keepends=True)[:5])


def test_a_file_that_is_no_yaml_is_one_sentence(file: Path) -> None:
    for text, said in (
        ("- name: a\n\thash: x", "line 2, column 1: there is a tab, which YAML refuses"),
        ("- {name: a, expires: 2027-13-45}", "line 1, column 22: '2027-13-45' is no date (month"),
        ("[" * 5000, "is nested too deeply to be read"),
        ("---\n---\n", "has 2 YAML documents (---), but must be one"),
    ):
        file.write_text(text)
        for words in (("list", str(file)), ("new", "b", "--file", str(file))):
            assert said in str(typed(*words, status=1).exception)
        assert file.read_text() == text
    file.write_bytes(b"- name: caf\xe9\n")
    assert "not UTF-8 text" in str(typed("list", str(file), status=1).exception)


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
        "keys new: tokens_per_day is 0, but should be greater than or equal to 1"
    )
