"""docs/settings.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serve_app.config.document import _DEPLOYMENT_KEYS, parse_document
from serve_app.config.keys import Key
from serve_app.config.notices import notices
from serve_app.config.settings import GatewayConfig, ModelConfig
from serve_app.config.yaml_files import read
from serve_app.kuberay.render.profile import ClusterProfile
from tools import settings_reference
from tools.settings_reference import CLASSES, PAGE, docstrings

TEXT = PAGE.read_text()


def test_the_page_is_as_the_generator_writes_it() -> None:
    assert settings_reference.page(TEXT) == TEXT, "run: make settings"


def test_every_class_has_its_table() -> None:
    marked = re.findall(r"<!-- from (\w+): make settings -->\n\| ", TEXT)
    assert sorted(marked) == sorted([*CLASSES, "HTTP_OPTIONS"])


@pytest.mark.parametrize("name", CLASSES)
def test_every_setting_says_what_it_does(name: str) -> None:
    assert docstrings(CLASSES[name]).keys() == settings_reference.own(CLASSES[name])
    bases = [
        base.__name__ for base in CLASSES[name].__mro__[1:] if getattr(base, "model_fields", 0)
    ]
    assert set(bases) <= CLASSES.keys()


def test_no_class_of_settings_is_left_out() -> None:
    """Whatever a person may write is reached from these four; one stands elsewhere than in them."""
    seen: set[str] = set()
    for top in (ModelConfig, GatewayConfig, ClusterProfile, Key):
        schema = top.model_json_schema()
        seen |= {top.__name__, *schema.get("$defs", {})}
    assert seen | {"LiveConfig"} == CLASSES.keys()


def test_every_deployment_key_of_serve_is_named() -> None:
    section = TEXT.partition("## Serve's deployment keys")[2].partition("\n## ")[0]
    assert [key for key in _DEPLOYMENT_KEYS if f"`{key}`" not in section] == []


def test_the_example_is_a_config(tmp_path: Path) -> None:
    file = tmp_path / "example.yaml"
    file.write_text(re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[0])
    fleet = parse_document(read(file), file)
    assert fleet.gateway is not None
    assert fleet.models["llama-3.3-70b"].tensor_parallel_size == 4
    assert notices(fleet) == []
