"""Other engines at the same points. Nothing here needs Baton's packages where the peer's are installed instead."""
