"""What goes wrong with the files of a memory bank."""


class BankError(ValueError):
    """Files of a memory bank that cannot be read or written as asked."""
