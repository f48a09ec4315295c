"""What a user can mend."""


class InputError(Exception):
    """What a user wrote is wrong: one line a mistake, naming file, field, value and what would be right."""
