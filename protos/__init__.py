"""The wire format (`baton.v1`) and its generated code."""
