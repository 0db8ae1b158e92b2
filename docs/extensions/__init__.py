"""What Sphinx has to be told about this repository, one concern a module."""
