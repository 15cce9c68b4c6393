"""From a command line to objects: composing, checking, building."""
