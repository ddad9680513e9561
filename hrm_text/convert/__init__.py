"""Conversion into the weights folder: from checkpoints of this project, and from the reference trainer's."""
