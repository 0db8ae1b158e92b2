"""What a terminal shows of any text: one line, whatever is in it. Nothing but Python is needed for it."""


def printable(text: str) -> str:
    """The text, what is no visible character written out: a line break, an escape, a byte of no character."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
