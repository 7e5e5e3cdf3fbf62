"""A protocol for threads of free text with tags, and two small tasks that use it: factor search and sums."""
