"""The content of the course, one folder a lab: references, checks, questions, figures and its widget."""
