"""Findings: what is wrong, by code, with evidence and remedy."""
