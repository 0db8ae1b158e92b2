"""Lab 07, eviction: references in one module, one module per exercise (or per kind of them) for its check."""
