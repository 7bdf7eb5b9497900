"""Traces by OpenTelemetry: one a request, through the gateway and both workers. Off unless it is configured."""
