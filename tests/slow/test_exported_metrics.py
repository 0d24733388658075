"""A real run of today, and the metrics that it exports."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from harness import exported_metrics
from harness.queries import every_query, exported, kept_labels, queried, relabeled
from prometheus_client.parser import text_string_to_metric_families


def test_a_run_of_today_exports_what_the_queries_ask_for(tmp_path: Path) -> None:
    """The recorded list has not drifted; `make metrics` refreshes it."""
    page = exported_metrics.run(tmp_path)
    series = Counter(
        (relabeled(sample.name), *sorted(kept_labels(sample.labels).items()))
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if relabeled(sample.name)
    )
    assert [key for key, count in series.items() if count > 1] == []
    names = {key[0] for key in series}
    asked = set().union(*map(queried, every_query())) & exported().keys()
    assert asked - names == set()
