"""Which of a model's replicas gets a call: by what they have cached, and by what they have to do.

:mod:`prefix` makes a call's key, :mod:`index` remembers which replica has which prefix,
:mod:`work` what each has to do, and :mod:`choice` decides. :mod:`router` is the policy that the
queue asks: it has one choice for each model. docs/routing.md explains it for people.
"""
