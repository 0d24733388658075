"""``serve-app run``: one machine, which may be somebody else's too."""
