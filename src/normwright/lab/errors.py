"""What the laboratory says when the user can mend it."""

__all__ = ["UserError"]


class UserError(Exception):
    """One sentence saying what is wrong and what to do; the command line prints it and exits with code 2."""
