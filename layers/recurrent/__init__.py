"""State spaces, convolutions and cells."""
