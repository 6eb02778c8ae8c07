"""Numbers alone: rows and their distances, order statistics, checks for nan and inf, memory that is
used again.

Nothing here knows of rounds or workers. Everything else may import it.
"""
