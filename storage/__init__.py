"""Tensors in files: whole or not at all, and cached by bytes. Knows nothing of layers."""

if __name__ != "mneme.storage":  # under two names, it would be two packages
    raise ImportError("import mneme.storage, not storage")
