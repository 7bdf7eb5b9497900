"""The OpenAI HTTP server."""
