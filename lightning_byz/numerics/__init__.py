"""Numbers alone: rows and their distances, order statistics, checks for nan and inf, memory.

Nothing here knows of rounds or workers. Everything else may import it.
"""
