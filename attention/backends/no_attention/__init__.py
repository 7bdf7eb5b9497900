"""NO_ATTENTION: stores keys and values, attends to nothing."""
