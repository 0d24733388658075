"""The HAProxy that Serve is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from serve_app.cluster import haproxy

# Of Serve's configuration what our lines need around them.
CONFIGURATION = f"""global
    stats socket /tmp/serve-app-test.sock mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout client 5s
    timeout connect 5s
    timeout server 5s
{haproxy.FRONTEND}    bind 127.0.0.1:8000
    default_backend nothing
backend nothing
    http-request return status 200
frontend prometheus
    bind :9101
    http-request use-service prometheus-exporter if {{ path /metrics }}
listen stats
  bind *:8404
  stats enable
"""


def test_the_command_is_haproxy() -> None:
    environment = haproxy.environment()  # as Serve's HAProxy has it too
    path = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert Path(path).is_absolute()
    shown = subprocess.run(
        [path, "-vv"], env=os.environ | environment, timeout=60,
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert shown.startswith("HAProxy version")


def test_it_does_not_splice_and_passes_on_what_serve_says(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda binary, arguments: became.append(arguments))
    monkeypatch.setattr(sys, "argv", [haproxy.COMMAND, "-db", "-f", "haproxy.cfg"])
    haproxy.main()
    assert became[0][1:] == ["-dS", "-db", "-f", "haproxy.cfg"]


def test_serve_s_configuration_has_the_frontend_that_ours_go_into() -> None:
    assert HAPROXY_CONFIG_TEMPLATE.count("\n" + haproxy.FRONTEND) == 1


def test_what_serve_opens_to_all_is_closed() -> None:
    """As Serve's template has it: HAProxy's metrics, statistics and command socket."""
    opened = [
        ("frontend prometheus\n    bind :{{ config.metrics_port }}", "bind 127.0.0.1:9101"),
        ("listen stats\n  bind *:{{ config.stats_port }}", "bind 127.0.0.1:8404"),
        ("stats socket {{ config.socket_path }} mode 666 level admin", "mode 600 level admin"),
    ]
    ours = haproxy.with_ours(CONFIGURATION)
    for theirs, closed in opened:
        assert HAPROXY_CONFIG_TEMPLATE.count(theirs) == 1
        assert closed in ours
    assert ours.count("bind 127.0.0.1:") == 3 and haproxy.with_ours(ours) == ours


def test_haproxy_takes_our_lines_from_the_file_that_serve_wrote(tmp_path: Path) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text(CONFIGURATION)
    command = haproxy.environment()["RAY_SERVE_HAPROXY_BINARY_PATH"]
    for _ in range(2):  # Serve starts it again with the same file
        done = subprocess.run([command, "-c", "-f", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "WARNING" not in done.stderr
    assert file.read_text() == haproxy.with_ours(CONFIGURATION)
    assert file.read_text().count("timeout http-request") == 1


def test_a_configuration_without_the_frontend_stays_as_it_is() -> None:
    assert haproxy.with_ours("global\n") == "global\n"
