"""What stands between a config and a result: checks, building, run directories, training."""

if __name__ != "mneme.harness":  # under two names, it would be two packages
    raise ImportError("import mneme.harness, not harness")
