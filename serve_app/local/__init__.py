"""``serve-app run``, on one machine and beside whatever else runs there."""
