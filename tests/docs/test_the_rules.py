"""What is wrong in a page is found, in a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import shell
from harness.documented import Command, Shown
from reader import Reader, problems
from ways import ANSWERS


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with Reader(tmp_path_factory.mktemp("reader") / "serve_app") as reader:
        yield reader


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("serve-app plna configs/demo.yaml", "`serve-app` has no command `plna`"),
        ("serve-app plan configs/demo.yaml --gpus H100", "No such option '--gpus'"),
        ("serve-app plan configs/nope.yaml", "configs/nope.yaml: no such file"),
        ("serve-app plan configs/demo.yaml | xargs serve-app chekc", "no command `chekc`"),
        ("serve-app diff | deploy | status", "Missing argument 'CONFIG'"),
        ("serve-app run configs/nope.yaml", "there is no configs/nope.yaml"),
        ("serve-app validate out", "out: no such file"),
        ("serve-app deploy configs/demo.yaml", "http_options.host is 127.0.0.1"),
        ("serve-app delete llama71b", "there is no configs/llama71b.yaml"),
        ("serve statsu", "`serve` has no command `statsu`"),
        ("ray start --heads", "No such option '--heads'"),
        ("make dmeo", "No rule to make target"),
        ("kubectl apply -k kuberay/monitorign", "there is no kuberay/monitorign"),
        ("helm install a b -f kuberay/values.yaml", "there is no kuberay/values.yaml"),
        ("docker build --target rocm .", "the Dockerfile has no target rocm"),
        ("docker run a:1 serve-app rnu b.yaml", "`serve-app` has no command `rnu`"),
        ("python -m benchmarks --armz bare", "-m benchmarks has no option --armz"),
        ("python -m benchmarks.quik", "there is no module benchmarks.quik"),
        ("pip install -r requirements/nope.txt", "there is no requirements/nope.txt"),
        ("cp kuberay/porfile.yaml profile.yaml", "cannot stat"),
        ("echo $CLUSTR", "$CLUSTR is set nowhere on this page before"),
        ("frobnicate --now", "no rule of tests/docs/ways.py takes `frobnicate`"),
        ("echo 'open", "the shell cannot read it"),
    ],
)
def test_what_is_wrong_is_found(text: str, said: str, reader: Reader) -> None:
    [problem] = problems([Command(text, "page.md", 7)], reader)
    assert problem.startswith(f"page.md:7: {text}\n")
    assert said in problem


def test_a_documented_exit_status_is_taken(reader: Reader) -> None:
    text = "serve-app diff configs/llama70b.yaml --cluster profile.yaml"
    [problem] = problems([Command(text, "page.md", 1)], reader)
    said = Command(text, "page.md", 1, comment="exit status 1 if they differ")
    assert not list(problems([said], reader))
    assert "exit status 1" in problem


@pytest.mark.parametrize(
    ("block", "lines"),
    [
        ("one \\\n  two  # why\nthree", ["one    two", "three"]),
        ("# only this\n\na | \n b", ["a |  b"]),
        ("curl -d '{\n  \"a\": 1}' url # its end", ["curl -d '{\n  \"a\": 1}' url"]),
        ("cat > a <<'E'\nx # y\nE\nnext", ["cat > a <<'E'\nx # y\nE", "next"]),
        ("echo a#b 'c # d' \"e # f\"", ["echo a#b 'c # d' \"e # f\""]),
    ],
)
def test_lines_are_read_as_a_shell_reads_them(block: str, lines: list[str]) -> None:
    assert [line.text for line in shell.lines_of(block)] == lines


@pytest.mark.parametrize("block", ["echo 'a", "cat <<E\nb", "one \\"])
def test_a_block_that_does_not_end_is_refused(block: str) -> None:
    with pytest.raises(ValueError, match="does not end"):
        shell.lines_of(block)


def test_a_line_is_taken_apart() -> None:
    text = 'A=1 x "$(aws sts get-caller-identity)" <(y -z) 2>&1 > out | jq . && B=2; (w)'
    found = shell.simple_commands(text, ANSWERS)
    assert [one.words for one in found] == [
        ("aws", "sts", "get-caller-identity"),
        ("y", "-z"),
        ("x", "answer", "answer"),
        ("jq", "."),
        (),
        ("w",),
    ]
    assert found[2].environment == (("A", "1"),)
    assert (found[2].output, found[3].piped) == ("out", True)


def test_files_that_a_page_shows_are_there_for_its_commands(reader: Reader) -> None:
    here = "cat > made/a.yaml <<'EOF'\napplications: []\nEOF"
    typed = Command("serve-app plan made/a.yaml", "page.md", 2)
    [problem] = problems([Command(here, "page.md", 1), typed], reader)
    assert "'applications' must be a list with at least one model" in problem
    shown = Shown("nothing: 1\n", "page.md", 3, "b.yaml")
    [problem] = problems([shown, Command("serve-app check b.yaml", "page.md", 4)], reader)
    assert "it has no 'applications' list" in problem
