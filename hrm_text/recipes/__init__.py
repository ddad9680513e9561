"""Recipes: whole workflows. The only place, with the command line, that wires rooms together."""
