"""The stages of a run. A module per stage has what the stage reads, which output it makes, and how."""
