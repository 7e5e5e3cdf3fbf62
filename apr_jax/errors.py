"""The one error that says: a user can mend this."""


class UserError(ValueError):
    """Wrong input: a setting, a flag, a file, a folder. The message is one line that names the value given and the
    values allowed, or what to do. Command lines print the line alone.

    Every other exception is a bug or a failure of the system, and keeps its traceback. A function that is called in a
    way its contract excludes raises a plain ValueError.
    """
