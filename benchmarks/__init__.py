"""One script per claim. The last line each prints is one JSON object: figures, and bars with whether they hold."""
