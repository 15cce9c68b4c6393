"""What goes wrong with routers through a user's files, texts or options."""


class RouterError(ValueError):
    """A router that cannot be made, saved, loaded or used."""
