"""What configs/rag.yaml says is to be changed for GPUs, changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from click.testing import CliRunner

from serve_app.check.cli import check

RAG = Path(__file__).parents[3] / "configs/rag.yaml"
ON_CPU = "resources: {device: cpu, num_cpus: 0.5}  # CPU"


def test_with_the_lines_for_gpus_it_fits_the_gpus_that_it_names(tmp_path: Path) -> None:
    text, changed = re.subn(r"\S+  # GPU: ", "", RAG.read_text())
    assert changed == 4  # three models and a context length
    for gpu in ("L40S", "L4", "L4"):
        text = text.replace(ON_CPU, f"resources: {{accelerator_type: {gpu}}}", 1)
    config = tmp_path / "rag.yaml"
    config.write_text(re.sub(r".*  # CPU\n", "", text))

    result = CliRunner().invoke(check, [str(config), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["configs"][str(config)]
    fits = [finding for finding in found if finding["check"] == "memory"]
    assert [finding["status"] for finding in fits] == ["ok", "ok", "ok"]
