"""Many requests on one cache: who holds which block of memory."""
