"""Metrics, charts and report.html of a run."""
