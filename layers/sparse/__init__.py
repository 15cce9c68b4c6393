"""Tables and experts of which a token reads a few."""
