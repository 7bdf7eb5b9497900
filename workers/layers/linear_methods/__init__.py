"""How a projection keeps its weight and multiplies with it; one file a format (after vLLM's `LinearMethodBase`)."""
