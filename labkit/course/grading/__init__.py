"""Classes: assignments for nbgrader made from the notebooks, graded in a confined process, with reasons in words."""
