"""The production checklist of ``serve-app check``: each line ok, warn or fail, and what to change.

Three things are checked: the config (:mod:`checklist`); its rendered manifests, by the rules of
``serve-app validate``; and on request a running cluster (:mod:`on_cluster`), by its resources
(:mod:`inventory`).
"""
