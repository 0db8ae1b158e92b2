"""Text from anywhere, as a message can hold it."""

from labkit.printable import printable


def test_what_is_visible_stays_and_what_is_not_is_written_out() -> None:
    assert printable("kv labs é → 行") == "kv labs é → 行"
    assert printable("a\nb\t\x1b[31m\x00\u2028\udcff") == r"a\nb\t\x1b[31m\x00\u2028\udcff"
