"""Memory-augmented sequence models behind one protocol."""
