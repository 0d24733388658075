"""What a person may write: the config file, its settings, engine arguments, and YAML itself."""
