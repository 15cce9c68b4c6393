"""Feed-forward layers widened by blocks that are fetched for a sequence."""
