"""Blocks of code in the documentation are what they say they are."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import fragments
import pytest
import yaml
from harness import documented
from harness.documented import Block

from serve_app.errors import UserError

LANGUAGES = {
    "python": "compiled; run where it asks this machine's server (test_at_a_server.py)",
    "yaml": "parsed as ours (fragments.py)",
    "json": "parsed",
    "sh": "test_commands.py", "bash": "test_commands.py", "console": "test_commands.py",
    "": "not code, or commands: test_commands.py", "text": "not code",
    "promql": "not tried", "diff": "not tried", "mermaid": "not tried", "dockerfile": "not tried",
    "toml": "not tried", "javascript": "not tried", "js": "not tried", "http": "not tried",
}  # fmt: skip
"""Languages of blocks, with what becomes of them."""

BLOCKS = [block for page in documented.PAGES for block in documented.blocks(page)]


def of(*languages: str) -> list[object]:
    return [pytest.param(b, id=b.where) for b in BLOCKS if b.language in languages]


@pytest.mark.parametrize("block", of("python"))
def test_python_compiles(block: Block) -> None:
    ast.parse(block.text, block.where)


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_is_taken_by_its_parser(block: Block) -> None:
    try:
        fragments.check(block.text)
    except (UserError, yaml.YAMLError) as error:
        pytest.fail(f"{block.where}: {error}", pytrace=False)


@pytest.mark.parametrize("block", of("json"))
def test_json_parses(block: Block) -> None:
    json.loads(block.text)


def test_the_language_of_each_block_is_known() -> None:
    unknown = {block.where: block.language for block in BLOCKS if block.language not in LANGUAGES}
    assert not unknown, f"say in LANGUAGES what becomes of them: {unknown}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("applications:\n- name: a", "import_path is missing"),
        (
            "- name: a\n  import_path: serve_app.model:app\n  args: {modle: x}",
            "did you mean 'model'",
        ),
        ("hang_timeout_sec: 5", "'hang_timeout_sec' is no key"),
        ("hang_timeout_s: soon", "hang_timeout_s is 'soon'"),
        ("engine: {max_model_length: 5}", "max_model_length"),
        ("karpenter: automode", "karpenter is 'automode'"),
        ("client_cidrs: [10.0.0.0/8]\nzone: [a]", "'zone' is no key"),
        ("deployments: [{name: ModelServer, num_replica: 1}]", "'num_replica' is not a key"),
        ("apiVersion: ray.io/v1\nkind: RayService\nspec: {}", "metadata.name is missing"),
    ],
)
def test_wrong_yaml_is_found(text: str, said: str) -> None:
    with pytest.raises((UserError, fragments.NotOurs), match=said):
        fragments.check(text)


def test_blocks_of_others_are_left_alone(tmp_path: Path) -> None:
    fragments.check("model_list:\n- model_name: a\n")
    fragments.check("services: {open-webui: {image: a}}\n")
