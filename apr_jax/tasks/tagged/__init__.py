"""Threads of free text with tags, and two small tasks on them: factor search and sums."""
