"""What stands between a config and a result: checks, building, run directories, training."""
