"""What `labkit release` makes of a commit: files, what was verified, checksums; twice the same, byte for byte."""
