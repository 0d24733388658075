"""The production checklist of ``serve-app check``: each line ok, warn or fail, and what to change.

A config is judged by itself (:mod:`checklist`), its rendered manifests by the rules of
``serve-app validate``, and, when asked, a running cluster (:mod:`on_cluster`) by what it has
(:mod:`inventory`).
"""
