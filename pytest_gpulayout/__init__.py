"""Fail a test run when an LLM server's GPU layout, transport or speed has regressed."""
