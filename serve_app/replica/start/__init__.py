"""Around the start of an engine: its phases, its time limit, and why it failed."""
