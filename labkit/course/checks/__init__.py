"""Tools that the checks of every lab share, by what they look at."""
