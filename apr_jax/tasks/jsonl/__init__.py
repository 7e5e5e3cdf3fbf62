"""A task read from files: problems and demonstrations as JSON lines, without Python of one's own."""
